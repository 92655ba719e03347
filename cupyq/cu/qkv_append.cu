// qkv_append: of each token's row [q heads | k heads | v heads] q is turned into an array of its own, k turned and v copied
// into the caches at the token's position; heads of q and k are normalised by rms_norm first where there are weights
//
// Work split  blocks (token, four heads), one warp per head; rotation and copies in accesses of `vector` values. A normalised
//             head waits in shared memory, as the two columns of a pair belong to different lanes, and so does a turned one
//             that is then encoded.
// Numerics    head_norm's sum of squares (a lane adds up `columns` neighbours at a time), rounded to T, then rope's rotation in
//             fp32, rounded to T, then the codec: the bits of head_norm, rope and kv_append one after the other.
// Limits      none on tokens (grid x); positions and block_table are never trusted: no access leaves the caches or tables. Keys
//             and values outside of the capacity are dropped, what stands outside of the tables becomes NaN.
// Traffic     2 * tokens * (heads + 2 * kv_heads) * head_dim * sizeof(T) + 2 * tokens * pairs * sizeof(S) bytes, less what codes
//             are smaller by
// Reference   cupyq/ops/qkv_append.py: qkv_append_reference
#include "kv_codec.cuh"
#include "norm.cuh"
#include "rope.cuh"

// At least 8 blocks an SM: left to itself, ptxas spills to fit in 12.
template <typename T, typename S, typename W, bool is_neox, int columns, int vector, CacheKind k_kind, CacheKind v_kind>
__global__ void __launch_bounds__(128, 8) qkv_append(
    const T *qkv,            // [tokens, heads + 2 * kv_heads, head_dim]
    const S *sin,            // [table_len, pairs]; null, with pairs = 0 and table_len = -1, where nothing turns
    const S *cos,            // as sin
    const int *positions,    // [batch], of each row's first token
    const int *block_table,  // [at least batch, max_pages]; or null: row b is the page of sequence b
    const W *q_norm,         // [q_norm_rows, head_dim] or null
    const W *k_norm,         // [k_norm_rows, head_dim] or null
    T *q,                    // [tokens, heads, head_dim]
    void *k_cache,           // [pages, page_size, kv_heads, head_dim] of T, or of k_kind's codes
    half *k_scales,          // [pages, page_size, kv_heads, ...] or null, as k_kind has them
    void *v_cache,           // as k_cache
    half *v_scales,          // as k_scales
    int seq, int heads, int kv_heads, int head_dim, int pairs, int table_len, int pages, int page_size, int max_pages,
    int q_norm_rows, int k_norm_rows, float eps) {
    extern __shared__ __align__(16) uint8 shared[];  // [4, head_dim] of T where there are norms or k is encoded
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, all_heads = heads + 2 * kv_heads;
    int64 token = blockIdx.x;
    int head = blockIdx.y * 4 + warp, kv_head = (head - heads) % kv_heads, batch = blockIdx.x / seq;
    bool is_q = head < heads, is_v = head >= heads + kv_heads;
    const W *weight = is_v ? (const W *)0 : is_q ? q_norm : k_norm;
    if (weight) {
        weight += (is_q ? head % q_norm_rows : kv_head % k_norm_rows) * (int64)head_dim;
        prefetch_row<32 * vector>(weight, lane * vector, head_dim);
    }
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (head >= all_heads) return;  // whole warps leave

    int64 position = (int64)positions[batch] + blockIdx.x % seq;
    const T *from = qkv + (token * all_heads + head) * head_dim;
    T *to = q + (token * heads + head) * head_dim, *waiting = (T *)shared + warp * head_dim;
    int64 row = 0;  // of the caches, whose rows are heads
    if (!is_q) {
        int64 slot = token_slot(block_table, position, batch, pages, page_size, max_pages);
        if (slot < 0) return;
        row = slot * kv_heads + kv_head;
        if (is_v) return store_head<v_kind, vector>(from, v_cache, v_scales, row, head_dim);
        to = k_kind == dense ? (T *)k_cache + row * head_dim : waiting;
    }

    if (weight) {
        float scale = head_scale<columns, vector>(from, head_dim, 0, eps);
        for (int c = lane * vector; c < head_dim; c += 32 * vector) {
            auto xs = *(const Vector<T, vector> *)(from + c);
            auto ws = *(const Vector<W, vector> *)(weight + c);
            for (int i = 0; i < vector; i++) xs[i] = from_float<T>(to_float(xs[i]) * to_float(ws[i]) * scale);
            *(Vector<T, vector> *)(waiting + c) = xs;
        }
        __syncwarp();
        from = waiting;
    }

    bool is_inside = table_len < 0 || (position >= 0 && position < table_len);
    const S *sin_row = sin + position * pairs, *cos_row = cos + position * pairs;
    for (int j = lane * vector; j < head_dim - pairs; j += 32 * vector) {
        if (j < pairs)
            rotate_pairs<T, S, is_neox, vector>(from, to, sin_row, cos_row, j, pairs, is_inside);
        else
            copy_columns<T, vector>(from + pairs + j, to + pairs + j, is_inside);
    }
    if (k_kind != dense && !is_q) {
        __syncwarp();
        store_head<k_kind, vector>(waiting, k_cache, k_scales, row, head_dim);
    }
}
