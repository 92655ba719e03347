// kv_encode: codes, scales = codec(x) for the tokens [first, first + width) of each sequence, first = lengths[b] or start
//
// Work split  grid y strides over the pages that tokens of a sequence may touch (one, if contiguous), grid x over a page. A
//             lane takes 8 values, a quarter of a warp a chunk of 64, `rounds` chunks loaded before the first is encoded.
//             e4m3: a warp takes a head.
// Numerics    the chain of float16 roundings of formats/kv_cache.py, bit for bit.
// Limits      any token_values; tokens are rounded outward to whole chunks of 64 values, so the tensor must hold whole ones
//             (fp8, e4m3: exactly the tokens). lengths and block_table are never trusted: what lies outside is dropped.
// Traffic     values * (2 + bytes of a code) + 2 * values / 32 bytes; e4m3 has a scale for head_dim values, fp8 none.
// Reference   cupyq/ops/kv_codec.py: kv_encode_reference
#include "kv_codec.cuh"

// At least 5 blocks an SM: left to itself, ptxas spills to fit in 8.
template <CacheKind kind, bool aligned>
__global__ void __launch_bounds__(256, 5) kv_encode(
    const uint16 *x,         // [pages, page_size, token_values], float16
    uint8 *codes,            // [pages, page_size, token_values], half of that for q4
    half *scales,            // [pages, page_size, token_values / 32]; e4m3: [.., token_values / head_dim]; fp8: null
    const int *lengths,      // [batch], tokens before the new ones, or null: `start`
    const int *block_table,  // [batch, max_pages], or null: page b
    int batch, int pieces, int start, int width, int pages, int page_size, int max_pages, int token_values,
    int head_dim) {
    constexpr int rounds = 2, code_bytes = 4 * cache_code_words<kind>;
    for (int sequence_piece = blockIdx.y; sequence_piece < batch * pieces; sequence_piece += gridDim.y) {
        int b = sequence_piece / pieces, piece = sequence_piece % pieces;
        int64 first = lengths ? lengths[b] : start;
        CacheSpan span =
            cache_span(block_table, first, first + width, b, piece, pages, page_size, max_pages, token_values);
        if constexpr (kind == e4m3) {
            int64 first_head = span.begin / head_dim, heads = (span.end - span.begin) / head_dim;
            for (int64 h = (int64)blockIdx.x * 8 + threadIdx.x / 32; h < heads; h += (int64)gridDim.x * 8) {
                int64 head = first_head + h;
                encode_e4m3<aligned ? 4 : 1>(
                    (const half *)x + head * head_dim, codes + head * head_dim, scales + head, head_dim);
            }
            continue;
        }
        CacheSpan shares = lane_shares<kind>(span);
        // Bounds are the block's, not the thread's: the lanes of a warp stay together.
        for (int64 base = shares.begin + (int64)blockIdx.x * (256 * rounds); base < shares.end;
            base += (int64)gridDim.x * (256 * rounds)) {
            LaneValues values[rounds];
            for (int r = 0; r < rounds; r++) {
                int64 share = base + r * 256 + threadIdx.x;
                bool is_whole = share < shares.end && (kind != fp8 || span.holds(share * lane_values, lane_values));
                values[r] = is_whole ? load_words<aligned, LaneValues>(x + share * lane_values) : LaneValues{};
            }
            for (int r = 0; r < rounds; r++) {
                int64 share = base + r * 256 + threadIdx.x;
                if constexpr (kind == fp8) {
                    if (span.holds(share * lane_values, lane_values)) {
                        store_words<aligned>(codes + share * code_bytes, encode_fp8(values[r]));
                    } else {
                        for (int64 e = share * lane_values; e < (share + 1) * lane_values; e++)
                            if (span.holds(e, 1)) codes[e] = (uint8)(x[e] >> 8);
                    }
                } else {
                    LaneCodes<kind> lane_codes;
                    half scale = encode_chunk<kind>(values[r], lane_codes);
                    if (share < shares.end) {
                        store_words<aligned>(codes + share * code_bytes, lane_codes);
                        if (share % 4 == 0) scales[share / 4] = scale;
                    }
                }
            }
        }
    }
}
