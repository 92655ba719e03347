// penalize: out = logits, less penalties for tokens of the history, plus a bias, less DRY, -inf where not allowed
//
// Work split  one block per row. A hash table in the workspace holds, of every id met, how near its newest occurrence
//               is, how often it occurs, and so on, all as integers. Then one thread per entry computes the entry's new
//               logit; all other logits are copied, biased and masked only where that is asked for.
// Numerics    float64, single roundings in the order of the reference, then float32, then Y. Counts and distances are
//             integers, so the order in which threads come does not show.
// Limits      history <= 2^24 tokens a row; workspace: `slots` entries of 32 bytes a row, `slots` a power of two of at
//             least twice the ids that can be met.
// Traffic     rows * vocab * (sizeof(X) + sizeof(Y)) bytes where out is not logits, plus bias and mask; else only the
//             history and the table.
// Reference   cupyq/ops/penalties.py: penalize_reference
#include "ptx.cuh"

constexpr int threads = 1024;

// Members in the order of the settings' table.
struct Penalties {
    float repetition, frequency, presence;
    int sustain, decay;
    float dry_multiplier, dry_base;
    int dry_allowed_length, dry_max_ngram, dry_range;
    int padding[6];
};

// What is known of one id.
struct Entry {
    uint64 steps;     // sum over occurrences of how far each is decayed
    int id;           // -1: free
    uint32 distance;  // of the newest occurrence from the end of the history; later the bits of the new logit
    uint32 count;     // occurrences
    uint32 followed;  // times that the token followed the longest repetition
    int bias;         // index of its bias, -1: none
    uint32 padding;
};

// The entry of an id, claimed if it is new: open addressing.
__device__ __forceinline__ Entry &find(Entry *entries, uint32 mask, int id) {
    for (uint32 at = (uint32)id * 2654435761u;; at++) {
        int before = atomicCAS(&entries[at & mask].id, -1, id);
        if (before == -1 || before == id) return entries[at & mask];
    }
}

template <typename X, typename Y>
__global__ void __launch_bounds__(threads) penalize(
    const X *logits,         // [rows, vocab]
    const void *histories,   // [rows, width] int, or int64 where is_int64
    const int *lengths,      // [rows], or null: all of width
    const Penalties *table,  // [rows], or null: the ten numbers below are for all rows
    float repetition, float frequency, float presence, int sustain, int decay, float dry_multiplier, float dry_base,
    int dry_allowed_length, int dry_max_ngram, int dry_range,
    const uint8 *dry_breakers,  // [vocab] or null
    const float *bias,          // [vocab] or [rows, vocab]; [bias_count] or [rows, bias_count] with bias_ids; null
    const int *bias_ids,        // bias's shape, or null
    const uint8 *allowed,       // [vocab] or [rows, vocab], or null
    Y *out,                     // [rows, vocab]
    Entry *entries,             // [rows, slots]
    int is_int64, int width, int bias_count, int has_bias_by_row, int has_allowed_by_row, int slots, int vocab) {
    __shared__ int longest;
    let_next_kernel_start();
    wait_for_previous_kernel();
    int64 row = blockIdx.x;
    Penalties penalties = {repetition, frequency, presence, sustain, decay, dry_multiplier, dry_base,
        dry_allowed_length, dry_max_ngram, dry_range};
    if (table) penalties = table[row];
    int length = lengths ? min(max(lengths[row], 0), width) : width;
    logits += row * vocab;
    out += row * vocab;
    if (bias && has_bias_by_row) bias += row * (bias_ids ? bias_count : vocab);
    if (bias_ids && has_bias_by_row) bias_ids += row * bias_count;
    if (allowed && has_allowed_by_row) allowed += row * vocab;
    // The id at a place of the history, -1 if there is no such token.
    auto said = [&](int at) -> int {
        int64 id = is_int64 ? ((const int64 *)histories)[row * width + at] : ((const int *)histories)[row * width + at];
        return id >= 0 && id < vocab ? (int)id : -1;
    };

    // --- an empty table, as large as this row needs
    uint32 needed = 32;
    while (needed < 2 * (uint32)min(vocab, length + bias_count)) needed *= 2;
    entries += row * slots;
    needed = min(needed, (uint32)slots);
    for (uint32 i = threadIdx.x; i < needed; i += threads) entries[i] = {0, -1, 0xffffffffu, 0, 0, -1, 0};
    if (threadIdx.x == 0) longest = 0;
    __syncthreads();

    // --- what was said
    int full_for = penalties.sustain < 0 ? length : penalties.sustain;
    if (penalties.repetition != 1.0f || penalties.frequency != 0.0f || penalties.presence != 0.0f) {
        int reach = (int)min((int64)length, (int64)full_for + penalties.decay);
        for (int i = threadIdx.x; i < reach; i += threads) {
            int id = said(length - 1 - i);
            if (id < 0) continue;
            Entry &entry = find(entries, needed - 1, id);
            atomicMin(&entry.distance, (uint32)i);
            atomicAdd(&entry.count, 1u);
            if (penalties.decay > 0 && i > full_for) atomicAdd(&entry.steps, (uint64)(i - full_for));
        }
    }

    // --- the longest repetition of the end of the history, and what followed it
    int oldest = penalties.dry_range > 0 ? max(length - penalties.dry_range, 0) : 0;
    auto is_usable = [&](int id) { return id >= 0 && !(dry_breakers && dry_breakers[id]); };
    auto match_before = [&](int at) {
        int n = 0;
        if (is_usable(said(at)))
            for (; n < penalties.dry_max_ngram && at - 1 - n >= oldest; n++) {
                int id = said(at - 1 - n);
                if (id != said(length - 1 - n) || !is_usable(id)) break;
            }
        return n;
    };
    if (penalties.dry_multiplier > 0.0f) {
        int mine = 0;
        for (int at = oldest + 1 + threadIdx.x; at < length; at += threads) mine = max(mine, match_before(at));
        atomicMax(&longest, mine);
        __syncthreads();
        if (longest >= max(penalties.dry_allowed_length, 1))
            for (int at = oldest + 1 + threadIdx.x; at < length; at += threads)
                if (match_before(at) == longest) atomicAdd(&find(entries, needed - 1, said(at)).followed, 1u);
    }

    // --- biases of single tokens
    if (bias_ids)
        for (int i = threadIdx.x; i < bias_count; i += threads)
            if (bias_ids[i] >= 0 && bias_ids[i] < vocab) atomicMax(&find(entries, needed - 1, bias_ids[i]).bias, i);
    __syncthreads();

    // --- the new logits of all that was met; `out` may be `logits`, so they wait in the table
    double full = penalties.decay > 0 ? penalties.decay : 1;
    double dry = penalties.dry_multiplier;
    if (longest >= max(penalties.dry_allowed_length, 1)) {
        double power = 1.0;
        for (int i = max(penalties.dry_allowed_length, 1); i < longest; i++)
            power = __dmul_rn(power, (double)penalties.dry_base);
        dry = __dmul_rn(dry, power);
    }
    for (uint32 i = threadIdx.x; i < needed; i += threads) {
        const Entry entry = entries[i];
        int id = entry.id;
        if (id < 0) continue;
        double x = (double)to_float(logits[id]);
        if (entry.count > 0) {
            double decayed = penalties.decay > 0 ? max((int)entry.distance - full_for, 0) : 0;
            double r = __ddiv_rn(__dmul_rn(__dadd_rn(1.0, -(double)penalties.repetition), decayed), full);
            r = __dadd_rn((double)penalties.repetition, r);
            x = x > 0.0 ? __ddiv_rn(x, r) : __dmul_rn(x, r);
            x = __dadd_rn(x, -__ddiv_rn(__dmul_rn((double)penalties.presence, __dadd_rn(full, -decayed)), full));
            double left = (double)((int64)entry.count * (int64)full - (int64)entry.steps);
            x = __dadd_rn(x, -__ddiv_rn(__dmul_rn((double)penalties.frequency, left), full));
        }
        if (!bias_ids && bias) x = __dadd_rn(x, (double)bias[id]);
        if (entry.bias >= 0) x = __dadd_rn(x, (double)bias[entry.bias]);
        if (entry.followed > 0) x = __dadd_rn(x, -__dmul_rn(dry, (double)entry.followed));
        if (allowed && !allowed[id]) x = -(double)infinity_float();
        entries[i].distance = __float_as_uint(__double2float_rn(x));
    }

    // --- all logits, where more than those change
    bool has_all = (const void *)out != (const void *)logits || (bias && !bias_ids) || allowed;
    __syncthreads();
    if (has_all) {
#pragma unroll 4
        for (int i = threadIdx.x; i < vocab; i += threads) {
            float x = to_float(logits[i]);
            if (bias && !bias_ids) x = __fadd_rn(x, bias[i]);
            if (allowed && !allowed[i]) x = -infinity_float();
            out[i] = from_float<Y>(x);
        }
        __syncthreads();
    }
    for (uint32 i = threadIdx.x; i < needed; i += threads)
        if (entries[i].id >= 0) out[entries[i].id] = from_float<Y>(__uint_as_float(entries[i].distance));
}
