// sample: one token id per row, drawn from softmax(logits / temperature) after top-k, then top-p, then min-p
//
// Work split  one block per row, one contiguous segment of the row per warp. Passes over the row (L2 after the first):
//               maximum; histogram of 1024 bins by distance from the maximum; for each of top-k and top-p three passes
//               of radix selection within the bin where the cut falls, and one to find the last of several tokens tied
//               at the cut; weights of the segments. Filters that are off cost nothing; greedy rows stop after the
//               maximum.
// Numerics    a token's weight is 2^40 * exp((logit - max) / temperature) as an integer, so every sum of weights is
//             exact and the same in any order; all float arithmetic is written out in single roundings that NumPy
//             repeats. The drawn id is therefore the reference's.
// Order       by logit, descending, ties by lowest id. `rank` is the logit as a uint32 that ascends so.
// Draw        the first id whose cumulative weight, in id order, exceeds floor(U * total / 2^64), U from Philox.
// Limits      vocab <= 2^23 (totals below 2^63).
// Traffic     rows * (vocab * sizeof(X) + 4) bytes from DRAM.
// Reference   cupyq/ops/sampling.py: sample_reference
#include "philox.cuh"

constexpr int threads = 1024, segments = threads / 32;
constexpr uint32 rank_of_infinity = 0x007fffffu, rank_of_minus_infinity = 0xff800000u, rank_of_nan = 0xffffffffu;
constexpr float most_halvings = 40.0f;  // tokens less likely than 2^-40 of the likeliest have weight 0
constexpr float bins_per_halving = 25.0f;

__device__ __forceinline__ uint32 rank_of(float x) {
    if (x != x) return rank_of_nan;
    uint32 bits = __float_as_uint(__fadd_rn(x, 0.0f));  // -0 becomes +0: the two are a tie
    return bits & 0x80000000u ? bits : bits ^ 0x7fffffffu;
}

// How many times the maximum's probability must be halved to give x's; NaN for NaN. Non-decreasing in rank_of(x).
__device__ __forceinline__ float halvings(float maximum, float x, float scale) {
    return __fmul_rn(__fsub_rn(maximum, x), scale);
}

// floor(2^40 * 2^-y), at least 1, for y < 40; 0 for larger y and NaN. The polynomial is a minimax fit of 2^-f on
// [0, 1], exact at both ends (relative error 3e-7), without FMA because NumPy has none.
__device__ __forceinline__ uint64 weight_of(float y) {
    if (!(y < most_halvings)) return 0;
    int n = (int)y;
    float f = __fsub_rn(y, (float)n);
    float p = -0.000939659308642149f;
    p = __fadd_rn(__fmul_rn(p, f), 0.00919379387050867f);
    p = __fadd_rn(__fmul_rn(p, f), -0.0552879199385643f);
    p = __fadd_rn(__fmul_rn(p, f), 0.2401772290468216f);
    p = __fadd_rn(__fmul_rn(p, f), -0.6931434273719788f);
    p = __fadd_rn(__fmul_rn(p, f), 1.0f);
    return ((uint64)(uint32)__fmul_rn(fmaxf(p, 0.5f), 16777216.0f) << 16) >> n;
}

// Counts and weights by bin. Shared memory has no native 64-bit addition: the carry of the low word travels by hand,
// which keeps the sum exact in any order.
template <int size> struct Histogram {
    uint32 count[size], low[size], high[size];

    __device__ void clear() {
        for (int i = threadIdx.x; i < size; i += threads) count[i] = low[i] = high[i] = 0;
        __syncthreads();
    }
    __device__ __forceinline__ void add(int i, uint64 weight) {
        atomicAdd(&count[i], 1u);
        uint32 before = atomicAdd(&low[i], (uint32)weight);
        uint32 carry = before + (uint32)weight < before;
        uint32 upper = (uint32)(weight >> 32) + carry;
        if (upper) atomicAdd(&high[i], upper);
    }
    __device__ __forceinline__ uint64 mass(int i) const { return (uint64)high[i] << 32 | low[i]; }
};

// Exclusive prefix sum over the block's threads; `total` gets the whole sum. `partial`: 32 values of shared memory.
__device__ __forceinline__ uint64 block_prefix(uint64 x, uint64 *partial, uint64 &total) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64 sum = x;
    for (int step = 1; step < 32; step *= 2) {
        uint64 below = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += below;
    }
    if (lane == 31) partial[warp] = sum;
    __syncthreads();
    uint64 before = 0;
    total = 0;
#pragma unroll 4
    for (int w = 0; w < segments; w++) {
        if (w == warp) before = total;
        total += partial[w];
    }
    __syncthreads();
    return before + sum - x;
}

// The bin in which a cumulative count or mass reaches `want`, and the sums of the bins before it.
struct Crossing {
    int index;
    uint64 count, mass;
};

template <int size>
__device__ Crossing find_crossing(
    const Histogram<size> &histogram, bool is_by_mass, uint64 want, uint64 *partial, Crossing *shared) {
    constexpr int run = size / threads;
    int first = threadIdx.x * run;
    uint64 count = 0, mass = 0, total;
    for (int i = first; i < first + run; i++) count += histogram.count[i], mass += histogram.mass(i);
    count = block_prefix(count, partial, total);
    mass = block_prefix(mass, partial, total);
    for (int i = first; i < first + run; i++) {
        uint64 before = is_by_mass ? mass : count;
        uint64 here = is_by_mass ? histogram.mass(i) : histogram.count[i];
        if (before < want && want <= before + here) *shared = {i, count, mass};  // true for one bin of one thread
        count += histogram.count[i], mass += histogram.mass(i);
    }
    __syncthreads();
    Crossing found = *shared;
    __syncthreads();
    return found;
}

// Tokens up to a place in the order: every smaller rank, and the `ties` lowest ids of `rank`. `mass`: their weight.
struct Cut {
    uint32 rank;
    uint64 ties, mass;
    bool splits_a_tie;
};

// A setting is one number for all rows, or an array when its pointer is not null.
template <typename T> __device__ __forceinline__ T setting(const T *per_row, T for_all) {
    return per_row ? per_row[blockIdx.x] : for_all;
}

template <typename X, int vector>
__global__ void __launch_bounds__(threads) sample(
    const X *logits,            // [rows, vocab]
    const float *temperatures,  // [rows] or null, as the next five
    const int *top_ks,          // [rows]
    const float *top_ps,        // [rows]
    const float *min_ps,        // [rows]
    const uint64 *seeds,        // [rows]
    const uint64 *steps,        // [rows]
    int *out,                   // [rows]
    int vocab, float temperature_for_all, int top_k_for_all, float top_p_for_all, float min_p_for_all,
    uint64 seed_for_all, uint64 step_for_all) {
    __shared__ Histogram<1024> by_distance;
    __shared__ Histogram<2048> by_digit;
    __shared__ uint64 partial[segments];
    __shared__ Crossing crossing;
    __shared__ int located;

    const X *row = logits + (int64)blockIdx.x * vocab;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int segment = ((vocab + segments - 1) / segments + 127) / 128 * 128;  // whole, aligned vectors for every lane

    // body(id, logit) for every token of the row. Several loads are in flight at a time.
    auto for_each = [&](auto body) {
        constexpr int batch = 4, stride = 32 * vector;
        int end = min((warp + 1) * segment, vocab);
        for (int at = warp * segment + lane * vector; at < end; at += batch * stride) {
            Vector<X, vector> values[batch];
#pragma unroll
            for (int b = 0; b < batch; b++)
                if (at + b * stride < end) values[b] = *(const Vector<X, vector> *)(row + at + b * stride);
#pragma unroll
            for (int b = 0; b < batch; b++)
                if (at + b * stride < end)
#pragma unroll
                    for (int i = 0; i < vector; i++) body(at + b * stride + i, to_float(values[b][i]));
        }
    };

    // The first id at which the cumulative sum of quantity(id, logit), in id order, exceeds pick(total).
    auto locate = [&](auto quantity, auto pick) -> int {
        uint64 sum = 0;
        for_each([&](int id, float x) { sum += quantity(id, x); });
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane == 0) partial[warp] = sum;
        __syncthreads();
        uint64 total = 0;
#pragma unroll 4
        for (int w = 0; w < segments; w++) total += partial[w];
        uint64 target = pick(total);
        int chosen = 0;
        for (; chosen < segments - 1 && target >= partial[chosen]; chosen++) target -= partial[chosen];
        __syncthreads();

        int run = (segment + threads - 1) / threads;
        int first = chosen * segment + threadIdx.x * run;
        int last = min(min(first + run, (chosen + 1) * segment), vocab);
        sum = 0;
        for (int id = first; id < last; id++) sum += quantity(id, to_float(row[id]));
        uint64 before = block_prefix(sum, partial, total);
        if (before <= target && target < before + sum)  // true for one thread
            for (int id = first; id < last; id++) {
                before += quantity(id, to_float(row[id]));
                if (target < before) {
                    located = id;
                    break;
                }
            }
        __syncthreads();
        int id = located;
        __syncthreads();
        return id;
    };

    // --- the maximum: lowest rank, then lowest id
    uint64 best = (uint64)rank_of_nan << 32;
    for_each([&](int id, float x) { best = min(best, (uint64)rank_of(x) << 32 | (uint32)id); });
    for (int step = 16; step > 0; step /= 2) best = min(best, __shfl_xor_sync(0xffffffffu, best, step));
    if (lane == 0) partial[warp] = best;
    __syncthreads();
#pragma unroll 4
    for (int w = 0; w < segments; w++) best = min(best, partial[w]);
    __syncthreads();
    uint32 best_rank = (uint32)(best >> 32);
    int best_id = (int)(uint32)best;

    float temperature = setting(temperatures, temperature_for_all);
    int top_k = setting(top_ks, top_k_for_all);
    bool is_greedy = !(temperature > 0.0f && temperature < infinity_float()) || top_k == 1;
    if (is_greedy || best_rank == rank_of_infinity || best_rank >= rank_of_minus_infinity) {
        if (threadIdx.x == 0) out[blockIdx.x] = best_rank >= rank_of_minus_infinity ? -1 : best_id;
        return;
    }
    float maximum = to_float(row[best_id]);
    float scale = fminf(__fdiv_rn(1.44269502f, temperature), 3.40282347e38f);  // finite, so that 0 * scale is 0
    auto bin_of = [&](float y) { return (int)__fmul_rn(y, bins_per_halving); };

    // --- where the order is cut: first by count (top-k), then by mass (top-p) among what is left
    auto select = [&](bool is_by_mass, uint64 want) -> Cut {
        Crossing found = find_crossing(by_distance, is_by_mass, want, partial, &crossing);
        want -= is_by_mass ? found.mass : found.count;
        int bin = found.index;
        uint64 mass = found.mass;
        uint32 prefix = 0;
        for (int shift = 22; shift >= 0; shift -= 11) {
            by_digit.clear();
            for_each([&](int, float x) {
                float y = halvings(maximum, x, scale);
                uint32 rank = rank_of(x);
                if (y < most_halvings && bin_of(y) == bin && (uint64)rank >> (shift + 11) == prefix)
                    by_digit.add(rank >> shift & 2047, weight_of(y));
            });
            __syncthreads();
            found = find_crossing(by_digit, is_by_mass, want, partial, &crossing);
            want -= is_by_mass ? found.mass : found.count;
            mass += found.mass;
            prefix = prefix << 11 | found.index;
        }
        uint64 tied = by_digit.count[found.index], weight = by_digit.mass(found.index) / tied;  // one rank, one weight
        uint64 ties = is_by_mass ? (want + weight - 1) / weight : want;
        __syncthreads();
        return {prefix, ties, mass + ties * weight, ties < tied};
    };

    Cut cut = {rank_of_nan, 0, 0, false};
    float top_p = setting(top_ps, top_p_for_all);
    if (top_k > 0 || top_p < 1.0f) {
        by_distance.clear();
        for_each([&](int, float x) {
            float y = halvings(maximum, x, scale);
            if (y < most_halvings) by_distance.add(bin_of(y), weight_of(y));
        });
        __syncthreads();
        uint64 count;
        block_prefix(by_distance.count[threadIdx.x], partial, count);
        block_prefix(by_distance.mass(threadIdx.x), partial, cut.mass);
        if (top_k > 0 && top_k < count) cut = select(false, top_k);
        if (top_p < 1.0f) {
            uint64 want = __double2ull_ru(__dmul_rn((double)top_p, __ull2double_rn(cut.mass)));
            cut = select(true, min(max(want, (uint64)1), cut.mass));
        }
    }
    int last_tie = vocab;
    if (cut.splits_a_tie)
        last_tie = locate(
            [&](int, float x) -> uint64 { return rank_of(x) == cut.rank; }, [&](uint64) { return cut.ties - 1; });

    // --- the draw
    uint64 least = min(__float2ull_ru(__fmul_rn(setting(min_ps, min_p_for_all), 1099511627776.0f)), (uint64)1 << 40);
    uint64 random = philox_bits(setting(seeds, seed_for_all), setting(steps, step_for_all));
    int id = locate(
        [&](int id, float x) -> uint64 {
            uint32 rank = rank_of(x);
            bool is_kept = rank < cut.rank || (rank == cut.rank && id <= last_tie);
            uint64 weight = is_kept ? weight_of(halvings(maximum, x, scale)) : 0;
            return weight >= least ? weight : 0;
        },
        [&](uint64 total) { return __umul64hi(random, total); });
    if (threadIdx.x == 0) out[blockIdx.x] = id;
}
