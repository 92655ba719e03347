// The passes over a row, or over the list of what is left of it, that the stages of sample.cu share.
#pragma once
#include "sampling.cuh"

// What the passes are compiled for. `filtered` ones do more per token, fewer of them at a time, and look up what they
// compare with in shared memory; the others have it in registers.
template <bool filtered> struct View {
    using type = const Keep;
};
template <> struct View<true> {
    using type = const Keep &;
};
template <typename X_, int vector_, bool filtered_> struct Passes {
    using X = X_;
    using Kept = typename View<filtered_>::type;
    static constexpr int vector = vector_;
    static constexpr bool filtered = filtered_;
};

template <typename X> __device__ __forceinline__ Source<X> source_of_block() {
    return {(const X *)shared.source.row, shared.source.count, shared.source.is_list};
}

// Indices per warp: whole, aligned vectors for every lane.
__device__ __forceinline__ int segment_of(int count) { return ((count + warps - 1) / warps + 127) / 128 * 128; }

template <typename X> __device__ __forceinline__ void get_token(const Source<X> &source, int i, int &id, float &x) {
    uint64 token = source.is_list ? list()[i] : (uint64)i << 32;
    id = (int)(token >> 32);
    x = source.is_list ? __uint_as_float((uint32)token) : to_float(source.row[i]);
}

// body(id, logit) for every token. `is_light`: so little is done that `batch` loads must be in flight at a time (for the
// longer bodies 2, as the registers do not suffice for 4).
template <typename P, bool is_light = !P::filtered, int batch = 4, typename Body>
__device__ __forceinline__ void for_each(Body body) {
    const auto source = source_of_block<typename P::X>();
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, segment = segment_of(source.count);
    int end = min((warp + 1) * segment, source.count);
    if (!is_light || source.is_list) {
#pragma unroll 1
        for (int i = warp * segment + lane; i < end; i += 32) {
            int id;
            float x;
            get_token(source, i, id, x);
            body(id, x);
        }
        return;
    }
    constexpr int vector = P::vector, stride = 32 * vector;
#pragma unroll 1
    for (int at = warp * segment + lane * vector; at < end; at += batch * stride) {
        Vector<typename P::X, vector> values[batch];
#pragma unroll
        for (int b = 0; b < batch; b++)
            if (at + b * stride < end)
                values[b] = *(const Vector<typename P::X, vector> *)(source.row + at + b * stride);
#pragma unroll
        for (int b = 0; b < batch; b++)
            if (at + b * stride < end)
#pragma unroll
                for (int i = 0; i < vector; i++) body(at + b * stride + i, to_float(values[b][i]));
    }
}

// List the tokens that is_wanted(id, logit), at most list_size, in shared memory, and read them from there on.
template <typename P, bool is_light, typename Wanted> __device__ __forceinline__ void make_list(Wanted is_wanted) {
    start_list();
    for_each<P, is_light>([&](int id, float x) {
        if (is_wanted(id, x)) list()[append_place()] = (uint64)(uint32)id << 32 | __float_as_uint(x);
    });
    __syncthreads();
    if (threadIdx.x == 0) shared.source.count = (int)shared.appended, shared.source.is_list = true;
    sort_shared(list(), (int)shared.appended);
}

// --- compiled once each, and told by shared.plan what to do ---

// Sums and extremes of the kept tokens into shared.measured.
template <typename P> __device__ __forceinline__ void measure() {
    typename P::Kept keep = shared.keep;
    uint64 values[6] = {0, 0, 0, 0, 0, 0};
    for_each<P>([&](int id, float x) {
        uint64 weight = kept_weight<true>(keep, id, x);
        if (weight == 0) return;
        float y = halvings<true>(keep, x);
        uint64 term = weight * fixed_halvings(y);
        values[0] += weight, values[1] += 1, values[2] += term >> 32, values[3] += (uint32)term;
        values[4] = max(values[4], weight), values[5] = max(values[5], (uint64)(uint32)~__float_as_uint(y));
    });
    block_reduce<6, 4>(values);
    if (threadIdx.x == 0)
        shared.measured = {values[0], values[1], values[2], values[3], values[4], (uint32) ~(uint32)values[5]};
    __syncthreads();
}

// shared.plan to shared.selected. Tokens of a row are told apart by distance first, so that few meet in one bin.
template <typename P> __device__ __forceinline__ void select() {
    typename P::Kept keep = shared.keep;
    const bool is_by_mass = shared.plan.is_by_mass, is_by_deviation = P::filtered && shared.plan.is_by_deviation;
    uint64 want = shared.plan.want, before = 0;
    uint32 prefix = 0;
    int bin = -1, index = 0;
#pragma unroll 1
    for (int level = shared.source.is_list || is_by_deviation ? 1 : 0; level < 4; level++) {
        int shift = 33 - 11 * level;
        if (level > 0 || !shared.has_histogram) {
            histogram().clear();
            for_each<P, !P::filtered, 2>([&](int id, float x) {
                float y = halvings<P::filtered>(keep, x);
                if (!(y < most_halvings)) return;
                int place = bin_of(y);
                if (level > 0) {
                    if (bin >= 0 && place != bin) return;
                    uint32 key = is_by_deviation ? deviation_of(keep, y) : rank_of(x);
                    if ((uint64)key >> (shift + 11) != prefix) return;
                    place = key >> shift & 2047;
                }
                uint64 weight = kept_weight<P::filtered>(keep, id, x);
                if (weight) histogram().add(place, weight);
            });
            __syncthreads();
        }
        Crossing found = find_crossing(is_by_mass, want);
        want -= is_by_mass ? found.mass : found.count;
        before += found.mass;
        index = found.index;
        if (level == 0)
            bin = index;
        else
            prefix = prefix << 11 | index;
    }
    if (threadIdx.x == 0) {
        shared.selected = {prefix, want, before, histogram().count[index], histogram().mass(index)};
        shared.has_histogram = false;
    }
    __syncthreads();
}

// shared.plan to shared.located, and the sum of the quantity to shared.total.
template <typename P> __device__ __forceinline__ void locate() {
    typename P::Kept keep = shared.keep;
    const Quantity kind = shared.plan.quantity;
    const uint32 key = shared.plan.key;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto quantity = [&](int id, float x) -> uint64 {
        if (kind == is_of_rank && rank_of(x) != key) return 0;
        uint64 weight = kept_weight<P::filtered>(keep, id, x);
        if (P::filtered && kind == weight_of_deviation && weight && deviation_of(keep, halvings<true>(keep, x)) != key)
            return 0;
        return kind == is_of_rank ? weight != 0 : weight;
    };
    uint64 sum = 0;
    for_each<P, !P::filtered, 2>([&](int id, float x) { sum += quantity(id, x); });
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) shared.partial[warp] = sum;
    __syncthreads();
    uint64 total = 0, target = shared.plan.number;
#pragma unroll 4
    for (int w = 0; w < warps; w++) total += shared.partial[w];
    if (kind == weight_of_token) target = __umul64hi(target, total);
    if (threadIdx.x == 0) shared.total = total;
    int chosen = 0;
    for (; chosen < warps - 1 && target >= shared.partial[chosen]; chosen++) target -= shared.partial[chosen];
    __syncthreads();

    const auto source = source_of_block<typename P::X>();
    int segment = segment_of(source.count), run = (segment + threads - 1) / threads;
    int first = chosen * segment + threadIdx.x * run;
    int last = min(min(first + run, (chosen + 1) * segment), source.count);
    uint64 before = 0;
    bool is_here = false;
    // First the sums of all threads' runs, then once more along the run that holds the target.
#pragma unroll 1
    for (int round = 0; round < 2; round++) {
        sum = before;
#pragma unroll 1
        for (int i = first; i < last && (round == 0 || is_here); i++) {
            int id;
            float x;
            get_token(source, i, id, x);
            sum += quantity(id, x);
            if (round == 1 && target < sum) {
                shared.located = id;
                break;
            }
        }
        if (round == 0) {
            before = block_prefix(sum, total);
            is_here = before <= target && target < before + sum;  // true for one thread
        }
    }
    __syncthreads();
}
