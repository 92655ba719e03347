// What the kernels all_reduce_*.cu share: how GPUs of one host exchange values through each other's memory.
//
// Every rank has a mailbox in its GPU's memory, which the others can write (and nobody but its owner reads):
//
//   failed                                      a bit pattern once an exchange was given up, else 0
//   epochs[kernel][block]                       how often that thread block has exchanged
//   letters[kernel][epoch % 2][block][from][i]  of the one-shot kernels: unit i of what rank `from` sent
//   pieces[shot][block][from][i], flags[shot][block][from]   of the two-shot kernel
//
// Thread block b of a rank exchanges with the thread blocks b of the same launch on the others, and with nothing else. All ranks
// make the same launches in the same order, so those agree in b's epoch. It lies in memory: a graph may be replayed.
//
// Letters. 8 bytes of values travel as two 64-bit words, each 4 bytes of values and the epoch's stamp. A word is stored and
// loaded as a whole (PTX ISA, memory consistency model: 64-bit accesses are single-copy atomic), so a word that bears the stamp
// bears its values too: no fence, no flag and no second way. Every word is polled until it bears the stamp.
//
// Why two sets of letters are enough. Let A and B be ranks, e an epoch of block b. A writes letters of e + 2 over those of e in
// B's mailbox. Before that, A's launch of e + 1 has ended (wait_for_previous_kernel), so it had B's letters of e + 1: each launch
// waits for one from every rank at least. B sent them after its launch of e had ended, for the same reason, so B had read all
// letters of e: what A writes comes too late to be read as e's. That B has not yet read e + 1 does not matter: those are the
// other set. With one set, A could write e + 1 while B reads e: A waits for B's letters of e, not for B to have read A's.
// Blocks differ in their epochs as launches differ in size, hence everything belongs to one block.
//
// Stamps. Bit 31 is set, so that memory of zeros bears none. They repeat after 2^31 epochs: a letter that a large message left
// must not wait so long for a message that fits. Twice in 2^29 epochs, once for each set, all letters behind those of the
// message are cleared. Nobody sends to them in this epoch, and those of e + 2 come after the launch has ended, as shown above.
//
// Pieces. A shot of the two-shot kernel stores plain values to the others, and then a flag (st.release.sys behind a barrier of the
// block); the others wait for it (ld.acquire.sys before one). One set is enough: A writes the first shot of e + 1 after it had
// B's flag of the second shot of e, which B sent behind the barrier that follows its reading of the first; and the second shot
// of e + 1 after it had B's flag of the first, which B sent behind the barrier that follows its reading of the second of e.
//
// Giving up. Whoever waits looks now and then at `failed`, at a word of the host's (abort) and at the clock. Once it gives up, it
// sets `failed` and a word of the host's, and nothing waits any more, in later launches neither: results are then meaningless,
// and the host must look at its word before it uses them.
#pragma once
#include "ptx.cuh"

constexpr int most_ranks = 8;
constexpr int kernels = 3;        // that have epochs: one_shot, norm, two_shot
constexpr int most_blocks = 128;  // of one of them
constexpr uint32 stamped = 1u << 31;

// As cupyq/ops/all_reduce.py lays it out: Mailbox. Offsets count bytes from the mailbox' start.
struct alignas(16) PeerTable {
    uint64 mailboxes[most_ranks];  // where this GPU finds that of each rank
    uint64 host;             // two words of the host's memory: whether to give up, and why an exchange was given up
    uint64 limit_ns;         // how long an exchange is waited for
    uint64 letters, pieces;  // offsets of the kernel's part
    int rank;
    int capacity;  // units of 8 bytes (letters) or 16 (pieces) that a rank may send to a block
    int blocks;    // that the part is laid out for
    int reserved;
};

constexpr int failed_at = 0, epochs_at = 128, flags_at = epochs_at + 4 * kernels * most_blocks;

__device__ __forceinline__ uint32 load_relaxed(const uint32 *p) {
    uint32 v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
    return v;
}
__device__ __forceinline__ void store_relaxed(uint32 *p, uint32 v) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(v) : "memory");
}
__device__ __forceinline__ uint32 load_acquire(const uint32 *p) {
    uint32 v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
    return v;
}
__device__ __forceinline__ void store_release(uint32 *p, uint32 v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(v) : "memory");
}
// Two words, each whole; not both at once.
__device__ __forceinline__ ulonglong2 load_words(const ulonglong2 *p) {
    ulonglong2 v;
    asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];"
        : "=l"(v.x), "=l"(v.y)
        : "l"(__cvta_generic_to_global(p))
        : "memory");
    return v;
}
__device__ __forceinline__ void store_words(ulonglong2 *p, ulonglong2 v) {
    asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "l"(v.x), "l"(v.y)
        : "memory");
}
__device__ __forceinline__ uint64 nanoseconds() {
    uint64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// Values first to first + count - 1 of x[n], zeros beyond its end; and the way back. is_whole: they all lie within x.
template <bool is_aligned, int count, bool is_whole = false, typename T>
__device__ __forceinline__ Vector<T, count> take(const T *x, int64 first, int64 n) {
    if (is_aligned && (is_whole || first + count <= n)) return *(const Vector<T, count> *)(x + first);
    Vector<T, count> values;
#pragma unroll
    for (int i = 0; i < count; i++) values[i] = is_whole || first + i < n ? x[first + i] : from_float<T>(0);
    return values;
}
template <bool is_aligned, int count, bool is_whole = false, typename T>
__device__ __forceinline__ void put(T *y, int64 first, int64 n, Vector<T, count> values) {
    if (is_aligned && (is_whole || first + count <= n)) {
        *(Vector<T, count> *)(y + first) = values;
        return;
    }
#pragma unroll
    for (int i = 0; i < count; i++)
        if (is_whole || first + i < n) y[first + i] = values[i];
}
// A number or a condition that is known when a lambda is compiled.
template <int number> struct Known {
    static constexpr int value = number;
};

// A thread's part in one launch's exchange. `kernel`: whose epochs.
template <int ranks> struct Exchange {
    const PeerTable &peers;
    char *own;
    uint32 *counter;
    uint32 epoch;
    uint64 began = 0;
    bool has_given_up;

    // Call behind wait_for_previous_kernel().
    __device__ __forceinline__ Exchange(const PeerTable &table, int kernel) : peers(table) {
        own = (char *)peers.mailboxes[peers.rank];
        counter = (uint32 *)(own + epochs_at) + kernel * most_blocks + blockIdx.x;
        epoch = load_relaxed(counter);
        has_given_up = load_relaxed((uint32 *)(own + failed_at)) != 0;
    }
    // The last call; by all threads.
    __device__ __forceinline__ void finish() {
        __syncthreads();  // all have read the counter
        if (threadIdx.x == 0) store_relaxed(counter, epoch & ~stamped);
    }
    __device__ __forceinline__ uint32 stamp() const { return epoch | stamped; }

    // Whether to wait no longer, after so many tries, for the ranks whose bits are set.
    __device__ __forceinline__ bool gives_up(uint32 tries, uint32 missing) {
        if (has_given_up || tries % 1024) return has_given_up;
        uint32 *host = (uint32 *)peers.host, *failed = (uint32 *)(own + failed_at);
        uint64 now = nanoseconds();
        if (began == 0) began = now;
        uint32 why = load_relaxed(host) ? 1u << 30 : now - began > peers.limit_ns ? 1u << 29 : 0;
        if (why) {
            store_relaxed(failed, why | missing);
            store_relaxed(host + 1, why | missing);
        }
        has_given_up = why || load_relaxed(failed);
        return has_given_up;
    }

    // Letters of this epoch.

    __device__ __forceinline__ ulonglong2 *letters(int to, int from) const {
        int64 block = (int64)(epoch % 2) * peers.blocks + blockIdx.x;
        return (ulonglong2 *)(peers.mailboxes[to] + peers.letters) + (block * ranks + from) * peers.capacity;
    }
    __device__ __forceinline__ void send(int unit, uint2 values) {
        uint64 high = (uint64)stamp() << 32;
        ulonglong2 words = make_ulonglong2(high | values.x, high | values.y);
#pragma unroll
        for (int r = 1; r < ranks; r++) {  // beginning with the next rank: not all at once to the same
            int to = peers.rank + r < ranks ? peers.rank + r : peers.rank + r - ranks;
            store_words(letters(to, peers.rank) + unit, words);
        }
    }
    // The sum over the ranks in their order, in fp32, rounded to T once; `mine`: what this rank has sent.
    template <typename T> __device__ __forceinline__ Vector<T, 8 / sizeof(T)> sum(int unit, uint2 mine) {
        constexpr int count = 8 / sizeof(T);
        const ulonglong2 *inbox = letters(peers.rank, 0) + unit;
        ulonglong2 words[ranks];
        uint32 missing, tries = 0;
        do {
            missing = 0;
#pragma unroll
            for (int r = 0; r < ranks; r++)
                if (r != peers.rank) words[r] = load_words(inbox + (int64)r * peers.capacity);
#pragma unroll
            for (int r = 0; r < ranks; r++)
                if (r != peers.rank && ((uint32)(words[r].x >> 32) != stamp() || (uint32)(words[r].y >> 32) != stamp()))
                    missing |= 1u << r;
        } while (missing && !gives_up(++tries, missing));

        float total[count];
#pragma unroll
        for (int r = 0; r < ranks; r++) {
            alignas(8) uint2 bits = r == peers.rank ? mine : make_uint2((uint32)words[r].x, (uint32)words[r].y);
            auto values = *(Vector<T, count> *)&bits;
#pragma unroll
            for (int i = 0; i < count; i++) total[i] = r == 0 ? to_float(values[i]) : total[i] + to_float(values[i]);
        }
        Vector<T, count> rounded;
#pragma unroll
        for (int i = 0; i < count; i++) rounded[i] = from_float<T>(total[i]);
        return rounded;
    }
    // Letters from unit `used` on, in the epochs that ask for it.
    __device__ __forceinline__ void clear_old_letters(int used) {
        if ((epoch & ((1u << 29) - 1)) > 1) return;
        for (int from = 0; from < ranks; from++)
            for (int unit = used + threadIdx.x; unit < peers.capacity; unit += blockDim.x)
                store_words(letters(peers.rank, from) + unit, make_ulonglong2(0, 0));
    }

    // Pieces and flags of this epoch, shot 0 or 1.

    __device__ __forceinline__ uint4 *piece(int to, int shot, int from) const {
        int64 block = (int64)shot * peers.blocks + blockIdx.x;
        return (uint4 *)(peers.mailboxes[to] + peers.pieces) + (block * ranks + from) * peers.capacity;
    }
    __device__ __forceinline__ uint32 *flag(int to, int shot, int from) const {
        return (uint32 *)(peers.mailboxes[to] + flags_at) + (shot * most_blocks + blockIdx.x) * most_ranks + from;
    }
    // Tells the others that this block's pieces of a shot are there, and waits for theirs. By all threads.
    __device__ __forceinline__ void meet(int shot) {
        __syncthreads();
        int other = threadIdx.x;
        if (other < ranks && other != peers.rank) {
            store_release(flag(other, shot, peers.rank), stamp());
            uint32 tries = 0;
            while (load_acquire(flag(peers.rank, shot, other)) != stamp() && !gives_up(++tries, 1u << other)) {}
        }
        __syncthreads();
    }
};
