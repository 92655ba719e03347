// sample_maxima, sample_shares, sample_listed: what sample.cu's `sample` does, the same ids, for few rows: many blocks to a row
//
// Work split  blocks (part, row), each for a contiguous part of the row; three launches, as every pass needs the one before:
//               sample_maxima  the first token of the order in each part
//               sample_shares  greedy rows are done. Without top-k and top-p: the parts' sums of weights, and the last part to
//                              arrive draws. Else: the histogram by distance of all parts together, and the last part says
//                              how many tokens can be left
//               sample_listed  the parts list those, where they are at most 2048; the last part to arrive runs the stages of
//                              sample.cu on the list, or on the row
// Numerics    those of sample.cu: sums of integers, which are the same in any order.
// Limits      as sample.cu; up to most_parts parts.
// Traffic     rows * (vocab * sizeof(X) + 4) bytes from DRAM, twice as many from L2.
// Reference   cupyq/ops/sampling.py: sample_reference
#include "sampling_row.cuh"

constexpr int most_parts = 128;

// What the parts of a row tell each other. The first launch puts all of it in order; nothing need be kept between calls.
struct Row {
    uint64 best[most_parts], weight[most_parts];  // of each part: first token, sum of weights
    uint64 count, mass, within;                   // Outlook
    int last_bin;                                 // -1: the row is done
    uint32 arrived[2], listed;
    uint64 bin_mass[Histogram::size];
    uint32 bin_count[Histogram::size];
    uint64 list[list_size];
};
static_assert(sizeof(Row) == 43048, "_ROW_BYTES in ops/sampling.py");

// The part of this block in an array of `count` tokens, in whole, aligned vectors.
__device__ __forceinline__ int part_size(int count) {
    return ((count + (int)gridDim.x - 1) / (int)gridDim.x + 127) / 128 * 128;
}

// Reads this block's part of the row.
template <typename X> __device__ __forceinline__ void read_part(const X *row, int vocab, int part) {
    if (threadIdx.x == 0) {
        int first = part * part_size(vocab);
        shared.source = {row + first, max(0, min(part_size(vocab), vocab - first)), false};
    }
    __syncthreads();
}

// Whether this block is the last of its row, for every thread; what the others wrote is then visible.
__device__ __forceinline__ bool arrives_last(uint32 *arrived) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.appended = atomicAdd(arrived, 1u);
    __syncthreads();
    bool is_last = shared.appended == gridDim.x - 1;
    __threadfence();
    __syncthreads();
    return is_last;
}

// The histogram of all parts together, into shared memory.
__device__ __forceinline__ void load_histogram(const Row &parts) {
    for (int i = threadIdx.x; i < Histogram::size; i += threads) {
        uint64 mass = __ldcg(&parts.bin_mass[i]);
        histogram().count[i] = __ldcg(&parts.bin_count[i]);
        histogram().low[i] = (uint32)mass, histogram().high[i] = (uint32)(mass >> 32);
    }
    __syncthreads();
}

template <typename X, int vector>
__global__ void __launch_bounds__(threads) sample_maxima(
    const X *logits,  // [rows, vocab]
    Row *exchange,    // [rows]
    int vocab) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int64 row = blockIdx.y;
    Row &parts = exchange[row];
    read_part(logits + row * vocab, vocab, blockIdx.x);
    for (int i = blockIdx.x * threads + threadIdx.x; i < Histogram::size; i += gridDim.x * threads)
        parts.bin_mass[i] = 0, parts.bin_count[i] = 0;
    uint64 best = first_in_order<Passes<X, vector, false>>();
    if (threadIdx.x == 0) {
        if ((uint32)(best >> 32) < rank_of_nan) best += blockIdx.x * part_size(vocab);
        parts.best[blockIdx.x] = best;
        if (blockIdx.x == 0) parts.last_bin = -1, parts.arrived[0] = parts.arrived[1] = parts.listed = 0;
    }
}

// Every block finds the row's first token among those of the parts. Whether it is the result already.
template <typename P> __device__ __forceinline__ bool is_settled(const Row &parts, uint64 &best) {
    best = (uint64)rank_of_nan << 32;
    for (int p = threadIdx.x % 32; p < gridDim.x; p += 32) best = min(best, parts.best[p]);
    for (int step = 16; step > 0; step /= 2) best = min(best, __shfl_xor_sync(0xffffffffu, best, step));
    return is_settled<P>(best);
}

template <typename X, int vector>
__global__ void __launch_bounds__(threads) sample_shares(
    const X *logits,            // [rows, vocab]
    const float *temperatures,  // [rows] or null, as the five below; the number is then for all rows
    float temperature,          //
    const int *top_ks,          // [rows]
    int top_k,                  //
    const float *top_ps,        // [rows]
    float top_p,                //
    const float *min_ps,        // [rows]
    float min_p,                //
    const uint64 *seeds,        // [rows]
    uint64 seed,                //
    const uint64 *steps,        // [rows]
    uint64 step,                //
    int *out,                   // [rows]
    Row *exchange,              // [rows]
    int vocab) {
    using P = Passes<X, vector, false>;
    let_next_kernel_start();
    wait_for_previous_kernel();
    int64 row = blockIdx.y;
    Row &parts = exchange[row];
    if (threadIdx.x == 0) {
        shared.basics = basics_of_row(
            row, {temperatures, temperature}, {top_ks, top_k}, {top_ps, top_p}, {min_ps, min_p}, {seeds, seed},
            {steps, step});
        shared.outputs.out = out + row;
    }
    read_part(logits + row * vocab, vocab, blockIdx.x);
    uint64 best;
    if (is_settled<P>(parts, best)) {
        if (blockIdx.x == 0) finish_settled<false>(best);
        return;
    }

    if (is_on<false>(cut_by_count) || is_on<false>(cut_by_mass)) {
        count_by_distance<P>();
        for (int i = threadIdx.x; i < Histogram::size; i += threads)
            if (histogram().count[i]) {
                atomicAdd(&parts.bin_count[i], histogram().count[i]);
                atomicAdd(&parts.bin_mass[i], histogram().mass(i));
            }
        if (!arrives_last(&parts.arrived[0])) return;
        load_histogram(parts);
        Outlook outlook = look_ahead<false>();
        if (threadIdx.x == 0) {
            parts.count = outlook.count, parts.mass = outlook.mass, parts.within = outlook.within;
            parts.last_bin = outlook.last_bin;
        }
        return;
    }

    if (threadIdx.x == 0) make_plan<false>(threshold);
    __syncthreads();
    const Keep keep = shared.keep;
    uint64 sum[1] = {0};
    for_each<P, true, 2>([&](int id, float x) { sum[0] += kept_weight<false>(keep, id, x); });
    block_reduce<1, 1>(sum);
    if (threadIdx.x == 0) parts.weight[blockIdx.x] = sum[0];
    if (!arrives_last(&parts.arrived[0])) return;
    uint64 total = 0;
    for (int p = 0; p < gridDim.x; p++) total += __ldcg(&parts.weight[p]);
    uint64 target = __umul64hi(philox_bits(shared.basics.seed, shared.basics.step), total);
    int chosen = 0;
    for (; chosen < (int)gridDim.x - 1; chosen++) {
        uint64 weight = __ldcg(&parts.weight[chosen]);
        if (target < weight) break;
        target -= weight;
    }
    if (threadIdx.x == 0) {
        shared.plan.locates = true, shared.plan.quantity = weight_up_to, shared.plan.number = target;
    }
    read_part(logits + row * vocab, vocab, chosen);
    locate<P>();
    if (threadIdx.x == 0) finish<false>(chosen * part_size(vocab) + shared.located, 1, 1);
}

template <typename X, int vector>
__global__ void __launch_bounds__(threads) sample_listed(
    const X *logits,            // [rows, vocab]
    const float *temperatures,  // [rows] or null, as the five below; the number is then for all rows
    float temperature,          //
    const int *top_ks,          // [rows]
    int top_k,                  //
    const float *top_ps,        // [rows]
    float top_p,                //
    const float *min_ps,        // [rows]
    float min_p,                //
    const uint64 *seeds,        // [rows]
    uint64 seed,                //
    const uint64 *steps,        // [rows]
    uint64 step,                //
    int *out,                   // [rows]
    Row *exchange,              // [rows]
    int vocab) {
    using P = Passes<X, vector, false>;
    let_next_kernel_start();
    wait_for_previous_kernel();
    int64 row = blockIdx.y;
    Row &parts = exchange[row];
    int last_bin = parts.last_bin;
    if (last_bin < 0) return;
    if (threadIdx.x == 0) {
        shared.basics = basics_of_row(
            row, {temperatures, temperature}, {top_ks, top_k}, {top_ps, top_p}, {min_ps, min_p}, {seeds, seed},
            {steps, step});
        shared.outputs.out = out + row;
    }
    read_part(logits + row * vocab, vocab, blockIdx.x);
    uint64 best;
    is_settled<P>(parts, best);

    bool is_listed = parts.within <= list_size;
    if (is_listed) {
        const Keep keep = shared.keep;
        int first = blockIdx.x * part_size(vocab);
        start_list();
        for_each<P, true>([&](int id, float x) {
            float y = halvings<false>(keep, x);
            if (y < most_halvings && bin_of(y) <= last_bin)
                list()[append_place()] = (uint64)(uint32)(first + id) << 32 | __float_as_uint(x);
        });
        __syncthreads();
        int found = (int)shared.appended;
        if (threadIdx.x == 0 && found) shared.located = (int)atomicAdd(&parts.listed, (uint32)found);
        __syncthreads();
        for (int i = threadIdx.x; i < found; i += threads) parts.list[shared.located + i] = list()[i];
    } else if (blockIdx.x > 0) {
        return;
    }
    if (is_listed && !arrives_last(&parts.arrived[1])) return;
    if (is_listed) {
        int count = (int)parts.within;
        for (int i = threadIdx.x; i < count; i += threads) list()[i] = __ldcg(&parts.list[i]);
        __syncthreads();
        sort_shared(list(), count);
    } else {
        load_histogram(parts);
    }
    if (threadIdx.x == 0) {
        shared.source = {logits + row * vocab, is_listed ? (int)parts.within : vocab, is_listed};
        shared.count = parts.count, shared.mass = parts.mass, shared.has_histogram = !is_listed;
        shared.located = (int)(uint32)best;
    }
    __syncthreads();
    run_stages<P>();
}
