// One row's way from logits to a token, by one block: the stages of sample.cu, which sample_split.cu shares.
#pragma once
#include "ptx.cuh"
#include "sampling_passes.cuh"

// --- stages -----------------------------------------------------------------------------------------------------------

enum Stage {
    cut_by_count,  // top-k
    cut_by_mass,   // top-p
    threshold,     // top-a, min-p
    relist,        // list what is left of the row, if that is little enough
    tail_free,
    typical,
    mirostat,
    retemper,  // post temperature, dynamic temperature
    exclude_top,
    write_top,
    draw
};

__device__ __forceinline__ bool is_share(float x) { return x > 0.0f && x < 1.0f; }

__device__ __forceinline__ double unit_double(uint64 bits) {
    return __dmul_rn(__ull2double_rn(bits >> 11), 1.0 / 9007199254740992.0);
}

template <bool filtered> __device__ __forceinline__ bool is_on(int stage) {
    const Filters &filters = shared.filters;
    switch (stage) {
        case cut_by_count: return shared.basics.top_k > 0;
        case cut_by_mass: return shared.basics.top_p < 1.0f;
        case threshold:
        case draw: return true;
    }
    if constexpr (filtered) switch (stage) {
            case relist:
                return is_share(filters.tfs) || is_share(filters.typical) || filters.mirostat_tau > 0.0f ||
                       filters.post_temperature != 1.0f || filters.max_temp > filters.min_temp ||
                       filters.xtc_probability > 0.0f || filters.skew != 0.0f || shared.outputs.top_count > 0;
            case tail_free: return is_share(filters.tfs);
            case typical: return is_share(filters.typical);
            case mirostat: return filters.mirostat_tau > 0.0f && shared.outputs.mu;
            case retemper: return filters.post_temperature != 1.0f || filters.max_temp > filters.min_temp;
            case exclude_top:
                return unit_double(philox_bits(shared.basics.seed, shared.basics.step, 2)) <
                       (double)filters.xtc_probability;
            case write_top: return shared.outputs.top_count > 0;
        }
    return false;
}

template <bool filtered> __device__ __forceinline__ bool is_measured(int stage) {
    return filtered && (stage == typical || stage == mirostat || stage == retemper || stage == exclude_top ||
                           stage == write_top || (stage == draw && shared.filters.skew != 0.0f));
}

// The mean of halvings * 2^24 over what was measured.
__device__ __forceinline__ double mean_halvings() {
    double sum =
        __dadd_rn(__dmul_rn(__ull2double_rn(shared.measured.high), 4294967296.0), __ull2double_rn(shared.measured.low));
    return __ddiv_rn(sum, __ull2double_rn(shared.measured.mass));
}

// The temperature between min_temp and max_temp, by the entropy of what was measured.
__device__ __forceinline__ float dynamic_temperature() {
    const Filters &filters = shared.filters;
    if (shared.measured.count < 2) return 1.0f;
    double entropy = __dadd_rn(log2_recipe(__ull2double_rn(shared.measured.mass)), -40.0);
    entropy = __dadd_rn(entropy, __dmul_rn(mean_halvings(), 1.0 / 16777216.0));
    double relative = __ddiv_rn(entropy, log2_recipe(__ull2double_rn(shared.measured.count)));
    relative = fmin(fmax(relative, 0.0), 1.0);
    double power = filters.temp_exponent == 0.0f ? 1.0 : 0.0;
    if (relative > 0.0) power = exp2_recipe(__dmul_rn((double)filters.temp_exponent, log2_recipe(relative)));
    double range = __dadd_rn((double)filters.max_temp, -(double)filters.min_temp);
    return __double2float_rn(__dadd_rn((double)filters.min_temp, __dmul_rn(range, power)));
}

// What a stage asks for, after the measure. One thread.
template <bool filtered> __device__ __forceinline__ void make_plan(int stage) {
    const Basics &basics = shared.basics;
    const Filters &filters = shared.filters;
    const Measured &measured = shared.measured;
    Keep &keep = shared.keep;
    Plan &plan = shared.plan;
    plan.selects = plan.is_by_mass = plan.is_by_deviation = plan.locates = false;
    if (stage == cut_by_count) {
        plan.selects = basics.top_k < shared.count;
        plan.want = basics.top_k;
    } else if (stage == cut_by_mass) {
        plan.selects = plan.is_by_mass = true;
        plan.want = share_of(shared.mass, basics.top_p);
    } else if (stage == threshold) {
        shared.has_histogram = false;  // from here on others are kept than were counted
        keep.least = min(__float2ull_ru(__fmul_rn(basics.min_p, 1099511627776.0f)), (uint64)1 << 40);
        if (filtered && filters.top_a > 0.0f) {
            double share = __ddiv_rn(1099511627776.0, __ull2double_rn(shared.mass));
            double weight = __dmul_rn(__dmul_rn((double)filters.top_a, 1099511627776.0), share);
            keep.least = max(keep.least, min(__double2ull_ru(weight), (uint64)1 << 40));
        }
    } else if (stage == draw) {
        uint64 random = philox_bits(basics.seed, basics.step);
        plan.locates = true;
        plan.quantity = weight_of_token;
        plan.number = random;
        if (filtered && filters.skew != 0.0f) {
            double u = unit_double(random);
            if (u > 0.0) {
                double power = exp2_recipe(__dmul_rn(-(double)filters.skew, 1.4426950408889634));
                u = exp2_recipe(__dmul_rn(power, log2_recipe(u)));
            }
            plan.selects = plan.is_by_mass = true;
            plan.want = min(__double2ull_rd(__dmul_rn(u, __ull2double_rn(measured.mass))), measured.mass - 1) + 1;
        }
    } else if constexpr (filtered) {
        if (stage == typical) {
            keep.center = (int)__double2ll_rn(mean_halvings());
            plan.selects = plan.is_by_mass = plan.is_by_deviation = true;
            plan.want = share_of(measured.mass, filters.typical);
        } else if (stage == mirostat) {  // surprise up to mu
            double share = exp2_recipe((double)fminf(fmaxf(-*shared.outputs.mu, -64.0f), 64.0f));
            uint64 least = __double2ull_ru(__dmul_rn(__ull2double_rn(measured.mass), share));
            keep.least = max(keep.least, min(least, measured.largest));
        } else if (stage == retemper) {
            bool is_dynamic = filters.max_temp > filters.min_temp;
            float temperature = is_dynamic ? dynamic_temperature() : filters.post_temperature;
            if (temperature != 1.0f) {
                keep.is_reshaped = true;
                keep.shift = __uint_as_float((uint32)measured.least_halvings);
                keep.slope = fminf(__fdiv_rn(1.0f, temperature), largest_float);
            }
        } else if (stage == write_top) {
            plan.selects = measured.count > shared.outputs.top_count;
            plan.want = shared.outputs.top_count;
            shared.saved_rank = keep.rank, shared.saved_last_id = keep.last_id;
        }
    }
}

// After the selection: does the cut fall between tied tokens? One thread. Tokens of one rank have one weight.
template <bool filtered> __device__ __forceinline__ void settle_ties(int stage) {
    const Selected &selected = shared.selected;
    Plan &plan = shared.plan;
    if (!plan.selects) return;
    plan.key = selected.key;
    if (filtered && plan.is_by_deviation) {
        plan.locates = selected.tied > 1;
        plan.quantity = weight_of_deviation;
        plan.number = selected.want - 1;
        return;
    }
    uint64 weight = selected.tied_mass / selected.tied;
    uint64 ties = plan.is_by_mass ? (selected.want + weight - 1) / weight : selected.want;
    shared.mass = selected.before + ties * weight;
    plan.locates = stage == draw || ties < selected.tied;
    plan.quantity = is_of_rank;
    plan.number = ties - 1;
}

// The cut, once the last of the tied tokens is known. One thread.
__device__ __forceinline__ void narrow(int stage) {
    Keep &keep = shared.keep;
    uint32 key = shared.selected.key;
    if (!shared.plan.selects || stage == draw) return;
    int last_id = shared.plan.locates ? shared.located : any_id;
    if (shared.plan.is_by_deviation) {
        keep.farthest = key, keep.farthest_id = last_id;
    } else {
        if (!shared.plan.locates && key == keep.rank) last_id = keep.last_id;
        keep.rank = key, keep.last_id = last_id;
    }
}

// --- passes of one stage ----------------------------------------------------------------------------------------------

// One more token than the beginning that holds at most the share of the second differences, as shared.selected.
template <typename P>
__device__ __forceinline__ void select_tail_free() {
    typename P::Kept keep = shared.keep;
    int most = shared.source.count;
    uint32 *sorted = most <= list_size ? ranks() : shared.workspace;
    start_list();
    for_each<P>([&](int id, float x) {
        if (kept_weight<true>(keep, id, x)) sorted[append_place()] = rank_of(x);
    });
    __syncthreads();
    int count = (int)shared.appended;
    if (count < 3) return;
    if (most <= list_size)
        sort_shared(sorted, count);
    else
        sort_global(sorted, sorted + most, count);

    auto weight = [&](int i) { return (int64)weight_of(halvings<true>(keep, logit_of(sorted[i]))); };
    int run = (count - 2 + threads - 1) / threads;
    int first = min((int)threadIdx.x * run, count - 2), last = min(first + run, count - 2);
    uint64 before = 0, total = 0, limit = 0;
    bool is_here = true;
    // First the sums of all threads' runs, then once more along the run in which the limit is passed.
#pragma unroll 1
    for (int round = 0; round < 2; round++) {
        uint64 sum = before;
        int64 here = weight(first), next = weight(first + 1);
#pragma unroll 1
        for (int i = first; i < last && is_here; i++) {
            int64 after = weight(i + 2);
            sum += (uint64)llabs(here - 2 * next + after);
            here = next, next = after;
            if (round == 1 && limit < sum) {
                shared.located = i;
                break;
            }
        }
        if (round == 0) {
            before = block_prefix(sum, total);
            limit = __double2ull_rd(__dmul_rn((double)shared.filters.tfs, __ull2double_rn(total)));
            is_here = before <= limit && limit < before + sum;  // true for one thread
        }
    }
    __syncthreads();
    if (threadIdx.x == 0 && total > 0) {
        int last_kept = shared.located;
        uint32 rank = sorted[last_kept];
        // How far the equal ranks go to either side, by bisection: sorted[begin] is the first, sorted[end] comes after.
        int begin = 0, end = count;
        for (int high = last_kept; begin < high;) {
            int middle = (begin + high) / 2;
            if (sorted[middle] < rank)
                begin = middle + 1;
            else
                high = middle;
        }
        for (int low = last_kept + 1; low < end;) {
            int middle = (low + end) / 2;
            if (sorted[middle] > rank)
                end = middle;
            else
                low = middle + 1;
        }
        uint64 tied = end - begin;
        shared.plan.selects = true;
        shared.selected = {rank, (uint64)(last_kept - begin + 1), 0, tied, tied * (uint64)weight(last_kept)};
    }
    __syncthreads();  // the compiler lets every thread look at the plan that settle_ties reads
}

// Tokens of at least the threshold go, but for the last of them.
template <typename P>
__device__ __forceinline__ void spare_the_last() {
    typename P::Kept keep = shared.keep;
    uint64 least = share_of(shared.measured.mass, shared.filters.xtc_threshold);
    uint64 values[2] = {0, 0};  // how many, and the last
    for_each<P>([&](int id, float x) {
        if (kept_weight<true>(keep, id, x) >= least && (!shared.xtc_mask || shared.xtc_mask[id]))
            values[0]++, values[1] = max(values[1], (uint64)rank_of(x) << 32 | (uint32)id);
    });
    block_reduce<2, 1>(values);
    if (threadIdx.x == 0 && values[0] > 1) {
        shared.keep.xtc_least = least;
        shared.keep.spared_rank = (uint32)(values[1] >> 32);
        shared.keep.spared_id = (int)(uint32)values[1];
    }
}

__device__ __forceinline__ float probability_of(uint64 weight, uint64 total) {
    return __double2float_rn(__ddiv_rn(__ull2double_rn(weight), __ull2double_rn(total)));
}

// The first tokens of the order, all that are kept at this moment, then id -1 of probability 0.
template <typename P> __device__ __forceinline__ void write_first_tokens() {
    typename P::Kept keep = shared.keep;
    const Outputs outputs = shared.outputs;
    start_list();
    for_each<P>([&](int id, float x) {
        if (kept_weight<true>(keep, id, x)) first_tokens()[append_place()] = (uint64)rank_of(x) << 32 | (uint32)id;
    });
    __syncthreads();
    int found = (int)shared.appended;
    sort_shared(first_tokens(), found);
    for (int i = threadIdx.x; i < outputs.top_count; i += threads) {
        int id = i < found ? (int)(uint32)first_tokens()[i] : -1;
        uint64 weight = i < found ? kept_weight<true>(keep, id, logit_of((uint32)(first_tokens()[i] >> 32))) : 0;
        if (outputs.top_ids) outputs.top_ids[i] = id;
        if (outputs.top_probabilities) outputs.top_probabilities[i] = probability_of(weight, shared.measured.mass);
    }
    __syncthreads();
    if (threadIdx.x == 0) shared.keep.rank = shared.saved_rank, shared.keep.last_id = shared.saved_last_id;
    __syncthreads();
}

// --- the row ----------------------------------------------------------------------------------------------------------

// The histogram by distance of the tokens that are read.
template <typename P> __device__ __forceinline__ void count_by_distance() {
    const Keep keep = shared.keep;
    histogram().clear();
    for_each<P, true>([&](int, float x) {
        float y = halvings<P::filtered>(keep, x);
        if (y < most_halvings) histogram().add(bin_of(y), weight_of(y));
    });
    __syncthreads();
}

// What the histogram of the whole row tells: sums over it, and how many tokens stand up to the last bin that the cuts and
// thresholds can leave.
struct Outlook {
    uint64 count, mass, within;
    int last_bin;
};
template <bool filtered> __device__ __forceinline__ Outlook look_ahead() {
    constexpr int run = Histogram::run;
    uint64 sums[2] = {0, 0};
    for (int i = threadIdx.x * run; i < threadIdx.x * run + run; i++)
        sums[0] += histogram().count[i], sums[1] += histogram().mass(i);
    block_reduce<2, 2>(sums);
    int top_k = shared.basics.top_k;
    float top_p = shared.basics.top_p;
    int last_bin = Histogram::size - 1;
    if (top_k > 0 && top_k < sums[0]) {
        last_bin = find_crossing(false, top_k).index;
    } else if (top_p < 1.0f) {
        last_bin = find_crossing(true, share_of(sums[1], top_p)).index;
    } else {  // no more than the thresholds will be, and a bin to spare
        float least = shared.basics.min_p;
        if (filtered) least = fmaxf(least, shared.filters.top_a * (1099511627776.0f / (float)sums[1]));
        if (least > 1e-12f) last_bin = (int)fmaxf(-__log2f(fminf(least, 1.0f)) * bins_per_halving, 0.0f) + 2;
    }
    uint64 within[1] = {0};
    for (int i = threadIdx.x * run; i < threadIdx.x * run + run; i++)
        if (i <= last_bin) within[0] += histogram().count[i];
    block_reduce<1, 1>(within);
    return {sums[0], sums[1], within[0], last_bin};
}

// List the tokens up to a bin, at most list_size.
template <typename P> __device__ __forceinline__ void list_up_to(int last_bin) {
    const Keep keep = shared.keep;
    make_list<P, true>([&](int, float x) {
        float y = halvings<P::filtered>(keep, x);
        return y < most_halvings && bin_of(y) <= last_bin;
    });
}

// The histogram by distance; if at most list_size tokens can be left by the cuts and thresholds, a list of those.
template <typename P> __device__ __forceinline__ void prepare() {
    count_by_distance<P>();
    Outlook outlook = look_ahead<P::filtered>();
    if (outlook.within <= list_size) list_up_to<P>(outlook.last_bin);
    if (threadIdx.x == 0) {
        shared.count = outlook.count, shared.mass = outlook.mass;
        shared.has_histogram = !shared.source.is_list;
    }
    __syncthreads();
}

// What is told of the drawn token, or of the one that a greedy row can give (none: -1). One thread.
template <bool filtered> __device__ __forceinline__ void finish(int id, uint64 weight, uint64 total) {
    *shared.outputs.out = id;
    if constexpr (filtered) {
        const Filters &filters = shared.filters;
        const Outputs &outputs = shared.outputs;
        if (outputs.probability) *outputs.probability = id < 0 ? 0.0f : probability_of(weight, total);
        if (id >= 0 && filters.mirostat_tau > 0.0f && outputs.mu) {
            double log_p = __dadd_rn(log2_recipe(__ull2double_rn(weight)), -log2_recipe(__ull2double_rn(total)));
            double error = __dmul_rn((double)filters.mirostat_eta, __dadd_rn((double)filters.mirostat_tau, log_p));
            *outputs.mu = __double2float_rn(__dadd_rn((double)*outputs.mu, error));
        }
    }
}

// The token of lowest rank, then of lowest id, among those that are read: rank << 32 | id, for every thread.
template <typename P> __device__ __forceinline__ uint64 first_in_order() {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64 best = (uint64)rank_of_nan << 32;
    for_each<P, true>([&](int id, float x) { best = min(best, (uint64)rank_of(x) << 32 | (uint32)id); });
    for (int step = 16; step > 0; step /= 2) best = min(best, __shfl_xor_sync(0xffffffffu, best, step));
    if (lane == 0) shared.partial[warp] = best;
    __syncthreads();
#pragma unroll 4
    for (int w = 0; w < warps; w++) best = min(best, shared.partial[w]);
    return best;
}

// Whether the first token of the order is the result; else the weights are laid down.
template <typename P> __device__ __forceinline__ bool is_settled(uint64 best) {
    uint32 best_rank = (uint32)(best >> 32);
    float temperature = shared.basics.temperature;
    bool is_greedy = !(temperature > 0.0f && temperature < infinity_float()) || shared.basics.top_k == 1;
    if (is_greedy || best_rank == rank_of_infinity || best_rank >= rank_of_minus_infinity) return true;
    if (threadIdx.x == 0) {
        bool is_squared = P::filtered && shared.filters.smoothing > 0.0f;
        float scale = is_squared ? __fmul_rn(1.44269502f, shared.filters.smoothing) : 1.44269502f;
        scale = fminf(__fdiv_rn(scale, temperature), largest_float);  // finite, so that 0 * scale is 0
        shared.keep = {};
        shared.keep.maximum = logit_of(best_rank), shared.keep.scale = scale, shared.keep.is_squared = is_squared;
        shared.keep.rank = rank_of_nan, shared.keep.last_id = any_id;
        shared.keep.farthest = 0xffffffffu, shared.keep.xtc_least = ~(uint64)0;
        shared.located = (int)(uint32)best;
    }
    __syncthreads();
    return false;
}

// The result where the first token of the order is it, or no token at all.
template <bool filtered> __device__ __forceinline__ void finish_settled(uint64 best) {
    int best_id = (uint32)(best >> 32) >= rank_of_minus_infinity ? -1 : (int)(uint32)best;
    if (threadIdx.x == 0) finish<filtered>(best_id, 1, 1);
    if constexpr (filtered)
        for (int i = threadIdx.x; i < shared.outputs.top_count; i += threads) {
            if (shared.outputs.top_ids) shared.outputs.top_ids[i] = i == 0 ? best_id : -1;
            if (shared.outputs.top_probabilities)
                shared.outputs.top_probabilities[i] = i == 0 && best_id >= 0 ? 1.0f : 0.0f;
        }
}

// All stages, and the drawn token.
template <typename P> __device__ __forceinline__ void run_stages() {
    constexpr bool filtered = P::filtered;
#pragma unroll 1
    for (int stage = cut_by_count; stage <= draw; stage++) {
        if (!is_on<filtered>(stage) || (stage == relist && shared.source.is_list)) continue;
        if constexpr (filtered) {
            if (is_measured<filtered>(stage) || stage == relist) measure<P>();
            if (stage == relist) {
                typename P::Kept keep = shared.keep;
                if (shared.measured.count <= list_size)
                    make_list<P, false>([&](int id, float x) { return kept_weight<true>(keep, id, x) != 0; });
                continue;
            }
        }
        if (threadIdx.x == 0) make_plan<filtered>(stage);
        __syncthreads();
        if (shared.plan.selects) select<P>();
        if constexpr (filtered) {
            if (stage == tail_free) select_tail_free<P>();
            if (stage == exclude_top) spare_the_last<P>();
        }
        if (threadIdx.x == 0) settle_ties<filtered>(stage);
        __syncthreads();
        if (shared.plan.locates) locate<P>();
        if (threadIdx.x == 0) narrow(stage);
        __syncthreads();
        if constexpr (filtered)
            if (stage == write_top) write_first_tokens<P>();
    }
    if (threadIdx.x == 0) {
        int id = shared.located;
        float x = to_float(((const typename P::X *)shared.source.row)[id]);
        bool is_skewed = filtered && shared.plan.selects;
        finish<filtered>(
            id, filtered ? kept_weight<filtered>(shared.keep, id, x) : 1,
            is_skewed ? shared.measured.mass : shared.total);
    }
}

template <typename P> __device__ __forceinline__ void sample_row() {
    constexpr bool filtered = P::filtered;
    uint64 best = first_in_order<P>();
    if (is_settled<P>(best)) return finish_settled<filtered>(best);
    bool narrows_order = is_on<filtered>(cut_by_count) || is_on<filtered>(cut_by_mass);
    if (narrows_order || (filtered && (shared.filters.top_a > 0.0f || is_on<filtered>(relist)))) prepare<P>();
    run_stages<P>();
}

// --- settings ---------------------------------------------------------------------------------------------------------

// A setting of a row is one number for all rows, or in an array when that is not null.
template <typename T> struct PerRow {
    const T *array;  // [rows] or null
    T for_all;
    __device__ __forceinline__ T of(int64 row) const { return array ? array[row] : for_all; }
};
__device__ __forceinline__ Basics basics_of_row(
    int64 row, PerRow<float> temperature, PerRow<int> top_k, PerRow<float> top_p, PerRow<float> min_p,
    PerRow<uint64> seed, PerRow<uint64> step) {
    return {temperature.of(row), top_k.of(row), top_p.of(row), min_p.of(row), seed.of(row), step.of(row)};
}
