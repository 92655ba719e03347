// cache_rotate: page[order[i]] = page[order[i + 1]] for i = 0 .. n - 2 in turn; page[order[n - 1]] = what page[order[0]] was
//
// Work split  a thread owns one Word of 1 to 16 bytes of every page and walks the whole order, so nobody waits for anybody.
//             Four pages are read before the first of them is written, unless one of the four was to be written before.
// Numerics    bits are copied.
// Limits      any n, any bytes a page. An index outside of the cache anywhere in the order: nothing is moved.
// Traffic     2 * n * page bytes
// Reference   cupyq/ops/cache_pages.py: cache_rotate_reference
#include "types.cuh"

template <typename Word>
__global__ void __launch_bounds__(256) cache_rotate(
    Word *cache,       // [pages, page_words]
    const int *order,  // [n]
    int pages, int64 page_words, int n) {
    bool is_wrong = false;
    for (int i = threadIdx.x; i < n; i += 256) is_wrong |= order[i] < 0 || order[i] >= pages;
    if (__syncthreads_or(is_wrong)) return;
    int64 own = (int64)blockIdx.x * 256 + threadIdx.x;
    if (own >= page_words) return;

    auto word_of = [&](int i) -> Word & { return cache[order[i] * page_words + own]; };
    Word first = word_of(0);
    int i = 0;
    for (; i + 4 < n; i += 4) {
        int page[5];
        for (int j = 0; j < 5; j++) page[j] = order[i + j];
        if (page[2] == page[0] || page[3] == page[0] || page[3] == page[1] || page[4] == page[0] ||
            page[4] == page[1] || page[4] == page[2]) {
            for (int j = 0; j < 4; j++) word_of(i + j) = word_of(i + j + 1);
            continue;
        }
        Word words[4];
        for (int j = 0; j < 4; j++) words[j] = cache[page[j + 1] * page_words + own];
        for (int j = 0; j < 4; j++) cache[page[j] * page_words + own] = words[j];
    }
    for (; i + 1 < n; i++) word_of(i) = word_of(i + 1);
    word_of(n - 1) = first;
}
