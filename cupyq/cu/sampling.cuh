// One block draws one token of one row: weights of tokens, sums, selections and sorts that the stages of sample.cu share.
#pragma once
#include "philox.cuh"

constexpr int threads = 1024, warps = threads / 32;
constexpr int list_size = 2048, top_size = 1024;
constexpr uint32 rank_of_infinity = 0x007fffffu, rank_of_minus_infinity = 0xff800000u, rank_of_nan = 0xffffffffu;
constexpr int any_id = 0x7fffffff;
constexpr float most_halvings = 40.0f;  // tokens less likely than 2^-40 of the likeliest have weight 0
constexpr float bins_per_halving = 25.0f;
constexpr float largest_float = 3.40282347e38f;

// --- float64 recipes, single roundings that ops/sampling_filters.py repeats ---

// log2 of a positive normal number.
__device__ __noinline__ double log2_recipe(double x) {
    int64 bits = __double_as_longlong(x);
    int exponent = (int)(bits >> 52) - 1022;
    double m = __longlong_as_double((bits & 0x000fffffffffffffll) | 0x3fe0000000000000ll);  // in [1/2, 1)
    if (m < 0.7071067811865476) m = __dmul_rn(m, 2.0), exponent -= 1;
    double t = __ddiv_rn(__dadd_rn(m, -1.0), __dadd_rn(m, 1.0)), square = __dmul_rn(t, t);
    constexpr double series[11] = {0.1373995277037108, 0.15186263588304877, 0.16972882833987804, 0.19235933878519512,
        0.2219530832136867, 0.2623081892525388, 0.3205988979753252, 0.41219858311113244, 0.5770780163555853,
        0.9617966939259757, 2.8853900817779268};
    double sum = series[0];
#pragma unroll
    for (int i = 1; i < 11; i++) sum = __dadd_rn(__dmul_rn(sum, square), series[i]);
    return __dadd_rn((double)exponent, __dmul_rn(t, sum));
}

// 2^x up to x = 1000; 0 below -1000 and for NaN.
__device__ __noinline__ double exp2_recipe(double x) {
    if (!(x >= -1000.0)) return 0.0;
    x = fmin(x, 1000.0);
    double whole = rint(x), part = __dadd_rn(x, -whole);
    constexpr double series[15] = {6.778726354822543e-14, 1.3691488853904124e-12, 2.5678435993488196e-11,
        4.44553827187081e-10, 7.054911620801121e-09, 1.0178086009239696e-07, 1.3215486790144305e-06,
        1.5252733804059838e-05, 0.00015403530393381606, 0.0013333558146428441, 0.009618129107628477,
        0.055504108664821576, 0.2402265069591007, 0.6931471805599453, 1.0};
    double sum = series[0];
#pragma unroll
    for (int i = 1; i < 15; i++) sum = __dadd_rn(__dmul_rn(sum, part), series[i]);
    return __dmul_rn(sum, __longlong_as_double((int64)((int)whole + 1023) << 52));
}

// The least weight that is at least this share of the total, 1 to total.
__device__ __forceinline__ uint64 share_of(uint64 total, float share) {
    uint64 weight = __double2ull_ru(__dmul_rn((double)share, __ull2double_rn(total)));
    return min(max(weight, (uint64)1), total);
}

// --- what a block knows of its row ---

// Counts and weights by bin. Shared memory has no native 64-bit addition: the carry of the low word travels by hand,
// which keeps the sum exact in any order.
struct Histogram {
    static constexpr int size = 2048, run = size / threads;
    uint32 count[size], low[size], high[size];

    __device__ __forceinline__ void clear() {
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

// Which tokens are kept and what they weigh. Every stage narrows it; nothing is ever taken back.
struct Keep {
    float maximum, scale;  // a token's halvings are (maximum - x) * scale,
    bool is_squared;       // or (maximum - x)^2 * scale
    bool is_reshaped;      // then the weight is that of (halvings - shift) * slope
    float shift, slope;
    uint32 rank;  // the order's beginning: every smaller rank, and of this one the ids up to last_id
    int last_id;
    uint64 least;  // weights, before they are reshaped, from this on
    int center;    // distance of the halvings from the center up to `farthest`, there the ids up to farthest_id
    uint32 farthest;
    int farthest_id;
    uint32 spared_rank;  // tokens before this one that weigh xtc_least or more are excluded
    int spared_id;
    uint64 xtc_least;
};

// Sums and extremes over the kept tokens.
struct Measured {
    uint64 mass, count, high, low;   // high * 2^32 + low: the sum of weight * halvings * 2^24
    uint64 largest, least_halvings;  // the largest weight; the fewest halvings, as float bits
};

// The bin in which a cumulative count or mass reaches `want`, and the sums of the bins before it.
struct Crossing {
    int index;
    uint64 count, mass;
};

// What a pass adds up to find a token.
enum Quantity { weight_of_token, weight_up_to, is_of_rank, weight_of_deviation };

// What a stage asks for. First a selection: where a cumulative count or mass of kept tokens, along the order or by
// deviation, reaches `want`; then a token: the first, by id, at which the sum of a quantity exceeds `number` (for
// weight_of_token that part of 2^64 of the sum).
struct Plan {
    bool selects, is_by_mass, is_by_deviation, locates;
    uint64 want;
    Quantity quantity;
    uint32 key;
    uint64 number;
};

// Where a selection stopped: at one of the `tied` tokens of `key`, after `before` of mass; `want` counts from there.
struct Selected {
    uint32 key;
    uint64 want, before, tied, tied_mass;
};

// What every row has.
struct Basics {
    float temperature;
    int top_k;
    float top_p, min_p;
    uint64 seed, step;
};

// What `sample_filtered` knows besides; members in the order of the settings' table.
struct Filters {
    float top_a, tfs, typical, mirostat_tau, mirostat_eta, post_temperature, min_temp, max_temp, temp_exponent,
        xtc_probability, xtc_threshold, smoothing, skew;
    float padding[3];
};
struct Outputs {
    int *out;
    float *mu, *probability;
    int *top_ids;
    float *top_probabilities;
    int top_count;
};

// The tokens that passes read: a row of logits, or the list.
template <typename X> struct Source {
    const X *row;
    int count;
    bool is_list;
};

struct Shared {
    uint64 memory[5120];
    uint64 partial[warps], partials[6][warps];
    Basics basics;
    Filters filters;
    Outputs outputs;
    Source<void> source;
    const uint8 *xtc_mask;  // [vocab] or null: the tokens that may be excluded
    uint32 *workspace;      // [2, vocab] of this row
    Keep keep;
    Measured measured;
    Plan plan;
    Selected selected;
    Crossing crossing;
    uint64 mass, count;  // of the tokens that the cuts of the order left
    uint64 total;        // what a located token's quantity was drawn from
    uint32 saved_rank;
    int saved_last_id;
    int located;
    uint32 appended;
    bool has_histogram;  // by distance, of the tokens now kept
};
__shared__ Shared shared;

// `memory` holds the list of candidates (16 KiB) and a histogram, ranks to sort, or the first tokens of the order
// (24 KiB); or all counters of a radix sort.
__device__ __forceinline__ uint64 *list() { return shared.memory; }  // id << 32 | bits of the logit, ascending
__device__ __forceinline__ Histogram &histogram() { return *(Histogram *)(shared.memory + list_size); }
__device__ __forceinline__ uint32 *ranks() { return (uint32 *)(shared.memory + list_size); }
__device__ __forceinline__ uint64 *first_tokens() { return shared.memory + list_size; }
__device__ __forceinline__ uint32 *counters() { return (uint32 *)shared.memory; }
static_assert(sizeof(Histogram) <= 8 * (5120 - list_size) && 4 * 256 * warps <= 8 * 5120);
static_assert(top_size <= 5120 - list_size && list_size / 2 <= 5120 - list_size);

// --- ranks and weights ---

// The logit as a uint32 that ascends in the order of tokens.
__device__ __forceinline__ uint32 rank_of(float x) {
    if (x != x) return rank_of_nan;
    uint32 bits = __float_as_uint(__fadd_rn(x, 0.0f));  // -0 becomes +0: the two are a tie
    return bits & 0x80000000u ? bits : bits ^ 0x7fffffffu;
}
__device__ __forceinline__ float logit_of(uint32 rank) {
    return __uint_as_float(rank & 0x80000000u ? rank : rank ^ 0x7fffffffu);
}

// How many times the maximum's probability must be halved to give x's; NaN for NaN. Non-decreasing in rank_of(x).
template <bool filtered> __device__ __forceinline__ float halvings(const Keep &keep, float x) {
    float distance = __fsub_rn(keep.maximum, x);
    if (filtered && keep.is_squared) distance = __fmul_rn(distance, distance);
    return __fmul_rn(distance, keep.scale);
}

__device__ __forceinline__ int bin_of(float y) { return (int)__fmul_rn(y, bins_per_halving); }

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

// Halvings with 24 fractional bits, for y < 40.
__device__ __forceinline__ uint32 fixed_halvings(float y) { return (uint32)__fmul_rn(y, 16777216.0f); }

// How far a token is from typical; at equal distance the likelier comes first.
__device__ __forceinline__ uint32 deviation_of(const Keep &keep, float y) {
    int distance = (int)fixed_halvings(y) - keep.center;
    return (uint32)abs(distance) << 1 | (distance > 0);
}

// The weight of a token, 0 if it is not kept. Only `filtered` kernels know of more than the order and `least`.
template <bool filtered> __device__ __forceinline__ uint64 kept_weight(const Keep &keep, int id, float x) {
    uint32 rank = rank_of(x);
    if (rank > keep.rank || (rank == keep.rank && id > keep.last_id)) return 0;
    float y = halvings<filtered>(keep, x);
    uint64 weight = weight_of(y);
    if (weight < keep.least) return 0;
    if constexpr (filtered) {
        if (weight == 0) return 0;
        if (keep.farthest != 0xffffffffu) {
            uint32 deviation = deviation_of(keep, y);
            if (deviation > keep.farthest || (deviation == keep.farthest && id > keep.farthest_id)) return 0;
        }
        if (keep.is_reshaped) weight = weight_of(fmaxf(__fmul_rn(__fsub_rn(y, keep.shift), keep.slope), 0.0f));
        if (weight >= keep.xtc_least &&
            (rank < keep.spared_rank || (rank == keep.spared_rank && id < keep.spared_id)) &&
            (!shared.xtc_mask || shared.xtc_mask[id]))
            return 0;
    }
    return weight;
}

// --- sums over the block ---

// Exclusive prefix sum over the block's threads; `total` gets the whole sum.
__device__ __forceinline__ uint64 block_prefix(uint64 x, uint64 &total) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64 sum = x;
    for (int step = 1; step < 32; step *= 2) {
        uint64 below = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += below;
    }
    if (lane == 31) shared.partial[warp] = sum;
    __syncthreads();
    uint64 before = 0;
    total = 0;
#pragma unroll 4
    for (int w = 0; w < warps; w++) {
        if (w == warp) before = total;
        total += shared.partial[w];
    }
    __syncthreads();
    return before + sum - x;
}

// Sums of the first `sums` values and maxima of the others over the block, for every thread.
template <int count, int sums> __device__ __forceinline__ void block_reduce(uint64 (&values)[count]) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto merge = [](int i, uint64 a, uint64 b) { return i < sums ? a + b : max(a, b); };
#pragma unroll
    for (int i = 0; i < count; i++) {
        for (int step = 16; step > 0; step /= 2)
            values[i] = merge(i, values[i], __shfl_xor_sync(0xffffffffu, values[i], step));
        if (lane == 0) shared.partials[i][warp] = values[i];
    }
    __syncthreads();
    if (warp < count) {
        uint64 value = shared.partials[warp][lane];
        for (int step = 16; step > 0; step /= 2) value = merge(warp, value, __shfl_xor_sync(0xffffffffu, value, step));
        __syncwarp();
        if (lane == 0) shared.partials[warp][0] = value;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < count; i++) values[i] = shared.partials[i][0];
    __syncthreads();
}

__device__ __noinline__ Crossing find_crossing(bool is_by_mass, uint64 want) {
    constexpr int run = Histogram::run;
    int first = threadIdx.x * run;
    uint64 count = 0, mass = 0, total;
    for (int i = first; i < first + run; i++) count += histogram().count[i], mass += histogram().mass(i);
    count = block_prefix(count, total);
    mass = block_prefix(mass, total);
    for (int i = first; i < first + run; i++) {
        uint64 before = is_by_mass ? mass : count;
        uint64 here = is_by_mass ? histogram().mass(i) : histogram().count[i];
        if (before < want && want <= before + here) shared.crossing = {i, count, mass};  // for one bin of one thread
        count += histogram().count[i], mass += histogram().mass(i);
    }
    __syncthreads();
    Crossing found = shared.crossing;
    __syncthreads();
    return found;
}

// The next free place of a list, for every thread that calls: one addition for those that do so together.
__device__ __forceinline__ uint32 append_place() {
    uint32 together = __activemask(), before = together & ((1u << threadIdx.x % 32) - 1), base = 0;
    if (before == 0) base = atomicAdd(&shared.appended, __popc(together));
    return __shfl_sync(together, base, __ffs(together) - 1) + __popc(before);
}

// Empty the list that append_place fills.
__device__ __forceinline__ void start_list() {
    if (threadIdx.x == 0) shared.appended = 0;
    __syncthreads();
}

// --- sorts, ascending ---

// Bitonic, in shared memory with room for the next power of two.
template <typename T> __device__ __noinline__ void sort_shared(T *values, int count) {
    int size = 1;
    while (size < count) size *= 2;
    for (int i = count + threadIdx.x; i < size; i += threads) values[i] = ~(T)0;
    __syncthreads();
    for (int run = 2; run <= size; run *= 2)
        for (int gap = run / 2; gap > 0; gap /= 2) {
            for (int pair = threadIdx.x; pair < size / 2; pair += threads) {
                int low = 2 * pair - (pair & (gap - 1)), high = low + gap;
                T a = values[low], b = values[high];
                if ((a > b) == !(low & run)) values[low] = b, values[high] = a;
            }
            __syncthreads();
        }
}

// Radix, least digit first, between two buffers of global memory; the result is in `values` again.
__device__ __noinline__ void sort_global(uint32 *values, uint32 *spare, int count) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int segment = ((count + warps - 1) / warps + 31) / 32 * 32;
    int begin = min(warp * segment, count), end = min(begin + segment, count);
    for (int shift = 0; shift < 32; shift += 8) {
        for (int i = threadIdx.x; i < 256 * warps; i += threads) counters()[i] = 0;
        __syncthreads();
        for (int i = begin + lane; i < end; i += 32)
            atomicAdd(&counters()[(values[i] >> shift & 255) * warps + warp], 1u);
        __syncthreads();
        constexpr int run = 256 * warps / threads;
        uint64 sum = 0, total;
        for (int i = 0; i < run; i++) sum += counters()[threadIdx.x * run + i];
        sum = block_prefix(sum, total);
        for (int i = 0; i < run; i++) {
            uint32 here = counters()[threadIdx.x * run + i];
            counters()[threadIdx.x * run + i] = (uint32)sum;
            sum += here;
        }
        __syncthreads();
        // A warp's counters are its own, and it takes its values in order: equal digits keep their order.
        for (int i = begin; i < end; i += 32) {
            bool is_valid = i + lane < end;
            uint32 value = is_valid ? values[i + lane] : 0;
            uint32 digit = is_valid ? value >> shift & 255 : 256 + lane;
            uint32 equal = __match_any_sync(0xffffffffu, digit);
            if (is_valid) spare[counters()[digit * warps + warp] + __popc(equal & ((1u << lane) - 1))] = value;
            __syncwarp();
            if (is_valid && lane == __ffs(equal) - 1) counters()[digit * warps + warp] += __popc(equal);
            __syncwarp();
        }
        __syncthreads();
        uint32 *sorted = spare;
        spare = values, values = sorted;
    }
}
