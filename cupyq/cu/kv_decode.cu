// kv_decode: x = decoded codes and scales for the tokens [start, lengths[b]) or [start, start + width) of each sequence
//
// Work split  as kv_encode: grid y strides over the pages of the sequences, so that those past a sequence's end cost next to
//             nothing; a lane takes 8 values, a quarter of a warp a chunk, `rounds` chunks (16 bytes of codes a lane) loaded
//             before the first is decoded. e4m3: a warp takes a head.
// Numerics    the chain of float16 roundings of formats/kv_cache.py, bit for bit.
// Limits      as kv_encode. Pages that sequences share are decoded for each, to the same bits.
// Traffic     values * (2 + bytes of a code) + 2 * values / 32 bytes; e4m3 has a scale for head_dim values, fp8 none.
// Reference   cupyq/ops/kv_codec.py: kv_decode_reference
#include "kv_codec.cuh"

// At least 5 blocks an SM: left to itself, ptxas spills to fit in 8.
template <CacheKind kind, bool aligned>
__global__ void __launch_bounds__(256, 5) kv_decode(
    const uint8 *codes,      // [pages, page_size, token_values], half of that for q4
    const half *scales,      // [pages, page_size, token_values / 32]; e4m3: [.., token_values / head_dim]; fp8: null
    uint16 *x,               // [pages, page_size, token_values], float16
    const int *lengths,      // [batch], where tokens end, or null: start + width
    const int *block_table,  // [batch, max_pages], or null: page b
    int batch, int pieces, int start, int width, int pages, int page_size, int max_pages, int token_values,
    int head_dim) {
    constexpr int rounds = kind == q4 ? 4 : 2, code_bytes = 4 * cache_code_words<kind>;
    for (int sequence_piece = blockIdx.y; sequence_piece < batch * pieces; sequence_piece += gridDim.y) {
        int b = sequence_piece / pieces, piece = sequence_piece % pieces;
        int64 last = lengths ? lengths[b] : (int64)start + width;
        CacheSpan span = cache_span(block_table, start, last, b, piece, pages, page_size, max_pages, token_values);
        if constexpr (kind == e4m3) {
            int64 first_head = span.begin / head_dim, heads = (span.end - span.begin) / head_dim;
            for (int64 h = (int64)blockIdx.x * 8 + threadIdx.x / 32; h < heads; h += (int64)gridDim.x * 8) {
                int64 head = first_head + h;
                decode_e4m3<aligned ? 4 : 1>(
                    codes + head * head_dim, to_float(scales[head]), (half *)x + head * head_dim, head_dim);
            }
            continue;
        }
        CacheSpan shares = lane_shares<kind>(span);
        // Bounds are the block's, not the thread's: the lanes of a warp stay together.
        for (int64 base = shares.begin + (int64)blockIdx.x * (256 * rounds); base < shares.end;
            base += (int64)gridDim.x * (256 * rounds)) {
            LaneCodes<kind> lane_codes[rounds];
            half lane_scales[rounds];
            for (int r = 0; r < rounds; r++) {
                int64 share = base + r * 256 + threadIdx.x;
                bool is_whole = share < shares.end && (kind != fp8 || span.holds(share * lane_values, lane_values));
                lane_codes[r] =
                    is_whole ? load_words<aligned, LaneCodes<kind>>(codes + share * code_bytes) : LaneCodes<kind>{};
                if constexpr (kind != fp8) lane_scales[r] = is_whole ? scales[share / 4] : half{0};
            }
            for (int r = 0; r < rounds; r++) {
                int64 share = base + r * 256 + threadIdx.x;
                if constexpr (kind == fp8) {
                    if (span.holds(share * lane_values, lane_values)) {
                        store_words<aligned>(x + share * lane_values, decode_fp8(lane_codes[r]));
                    } else {
                        for (int64 e = share * lane_values; e < (share + 1) * lane_values; e++)
                            if (span.holds(e, 1)) x[e] = (uint16)(codes[e] << 8);
                    }
                } else {
                    LaneValues values = decode_chunk<kind>(lane_codes[r], lane_scales[r]);
                    if (share < shares.end) store_words<aligned>(x + share * lane_values, values);
                }
            }
        }
    }
}
