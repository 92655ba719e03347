"""Sums over GPUs of one host by kernels that write each other's memory: which kernel, where what lies, the launches.

`tp.peer` owns the memory and decides who takes part; `tp.Comm.all_reduce` is what callers use. The protocol, and why it is
sound, stands in cu/all_reduce.cuh.
"""

from dataclasses import dataclass

import numpy as np

from cupyq._arrays import FLOATS, bfloat16, byte_bounds, float16, float32
from cupyq._kernels import instance, launch
from cupyq.ops.norm import rms_norm_reference

MOST_RANKS = 8

PEER_TABLE = np.dtype(
    [
        ("mailboxes", np.uint64, MOST_RANKS),
        ("host", np.uint64),
        ("limit_ns", np.uint64),
        ("letters", np.uint64),
        ("pieces", np.uint64),
        ("rank", np.int32),
        ("capacity", np.int32),
        ("blocks", np.int32),
        ("reserved", np.int32),
    ]
)
"""PeerTable of cu/all_reduce.cuh."""

GAVE_UP_STOPPED, GAVE_UP_WAITING = 1 << 30, 1 << 29
"""Bits of the word in which a kernel says why it gave up; the lowest MOST_RANKS are the ranks that it missed."""

_FIRST_PART = 10240  # behind the header: failed, epochs[3][128], flags[2][128][8]
_LETTER_BYTES = _PIECE_BYTES = 16
_ONE_SHOT_BLOCKS, _ONE_SHOT_THREADS = 128, 256
_NORM_SHARERS, _NORM_THREADS, _NORM_UNITS = 8, 512, 1024
_TWO_SHOT_BLOCKS, _TWO_SHOT_THREADS = 64, 512

QUICK_NORM_ROWS = 2
"""Rows that all_reduce_norm sums and norms sooner than all_reduce_one_shot and rms_norm do, by docs/measured.md. A mailbox has
letters for no more."""

TWO_SHOT_ROUND_BYTES = 4 << 20
"""The most that all_reduce_two_shot sums before it goes round again."""


@dataclass(frozen=True)
class Mailbox:
    """How the memory is laid out that each of `ranks` ranks keeps for the others: offsets and sizes in bytes."""

    ranks: int

    def __post_init__(self):
        if not 2 <= self.ranks <= MOST_RANKS:
            raise ValueError(f"ranks must lie in 2..{MOST_RANKS} to exchange by peer memory, got {self.ranks}")

    @property
    def one_shot_units(self):
        """Units of 8 bytes that one block takes: whole turns of its threads, of all blocks about 2 MiB a rank and set."""
        turns = (2 << 20) // (8 * self.ranks * _ONE_SHOT_BLOCKS * _ONE_SHOT_THREADS)
        return max(1, turns) * _ONE_SHOT_THREADS

    @property
    def one_shot_bytes(self):
        """The largest message of the one-shot kernel."""
        return _ONE_SHOT_BLOCKS * self.one_shot_units * 8

    @property
    def piece_units(self):
        """Units of 16 bytes in the largest piece."""
        return TWO_SHOT_ROUND_BYTES // (_PIECE_BYTES * _TWO_SHOT_BLOCKS * self.ranks)

    @property
    def norm_at(self):
        return _FIRST_PART + 2 * _ONE_SHOT_BLOCKS * self.ranks * self.one_shot_units * _LETTER_BYTES

    @property
    def pieces_at(self):
        return self.norm_at + 2 * QUICK_NORM_ROWS * _NORM_SHARERS * self.ranks * _NORM_UNITS * _LETTER_BYTES

    @property
    def size(self):
        """In whole pages of 2 MiB: what CUDA IPC shares should hold nothing of others (CUDA programming guide, "IPC")."""
        end = self.pieces_at + 2 * _TWO_SHOT_BLOCKS * self.ranks * self.piece_units * _PIECE_BYTES
        return -(-end // (2 << 20)) * (2 << 20)

    def tables(self, rank, mailboxes, host, limit_s):
        """{kernel: its PEER_TABLE} for one rank. mailboxes: addresses as its GPU sees them; host: of its two words."""
        parts = {
            "one_shot": (_FIRST_PART, 0, self.one_shot_units, _ONE_SHOT_BLOCKS),
            "norm": (self.norm_at, 0, _NORM_UNITS, QUICK_NORM_ROWS * _NORM_SHARERS),
            "two_shot": (0, self.pieces_at, self.piece_units, _TWO_SHOT_BLOCKS),
        }
        addresses = (*mailboxes, *[0] * (MOST_RANKS - self.ranks))
        return {
            name: np.array((addresses, host, int(limit_s * 1e9), letters, pieces, rank, units, blocks, 0), PEER_TABLE)[()]
            for name, (letters, pieces, units, blocks) in parts.items()
        }


ONE_SHOT_BYTES = {2: 512 << 10, 3: 256 << 10, 4: 256 << 10, 5: 128 << 10, 6: 128 << 10, 7: 64 << 10, 8: 64 << 10}
"""The largest message that goes in one shot, by ranks.

One shot sends 2 (ranks - 1) times its bytes (half of a letter is its stamps), two shots 2 (ranks - 1) / ranks times; at 400
GB/s the difference reaches the 3 us of a second way at 1.2 MB * ranks / (2 (ranks - 1)^2). Half of that, as a power of two."""

TWO_SHOT_BYTES = {2: 16 << 20} | dict.fromkeys(range(3, MOST_RANKS + 1), 8 << 20)
"""The largest message that goes in two shots: beyond, NCCL's copies in flight outweigh its start (docs/measured.md)."""


def choose_way(size_bytes, ranks):
    """ "one_shot", "two_shot", or None for NCCL: by what all ranks know, so that they agree."""
    if not 2 <= ranks <= MOST_RANKS or not 0 < size_bytes <= TWO_SHOT_BYTES[ranks]:
        return None
    return "one_shot" if size_bytes <= ONE_SHOT_BYTES[ranks] else "two_shot"


def one_shot_blocks(n, itemsize, ranks):
    """Grid of all_reduce_one_shot for n values."""
    most = Mailbox(ranks).one_shot_bytes
    if not 1 <= n * itemsize <= most:
        raise ValueError(f"array must have 1 to {most} bytes for one shot, got {n * itemsize}")
    return min(_ONE_SHOT_BLOCKS, -(-n * itemsize // (8 * _ONE_SHOT_THREADS)))


def two_shot_grid(n, itemsize, ranks):
    """(grid of all_reduce_two_shot for n values, units of 16 bytes that a block sends one rank in a round)"""
    if n < 1:
        raise ValueError(f"array must have values to be summed in two shots, got {n}")
    units = -(-n * itemsize // _PIECE_BYTES)
    piece = -(-units // (_TWO_SHOT_BLOCKS * ranks))
    piece = min(max(piece, 256), Mailbox(ranks).piece_units)
    return min(_TWO_SHOT_BLOCKS, -(-units // (ranks * piece))), piece


def norm_fits(rows, dim, dtype):
    """Whether all_reduce_norm takes so many rows of so many columns and makes them `dtype`: by what all ranks know."""
    step, most = 2 * _NORM_SHARERS, 2 * _NORM_SHARERS * _NORM_UNITS
    return np.dtype(dtype) in (float16, bfloat16) and 1 <= rows <= QUICK_NORM_ROWS and 0 < dim <= most and dim % step == 0


def all_reduce_reference(parts):
    """The sum of the ranks' arrays as the kernels define it: float32 in the order of the ranks, one rounding."""
    total = parts[0].astype(float32)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are results like others
        for part in parts[1:]:
            total = total + part.astype(float32)
        return total.astype(parts[0].dtype)


def all_reduce_norm_reference(parts, weight, eps, order=None):
    """(the sum; its rms_norm in float64, with columns in `order` if there is one)"""
    total = all_reduce_reference(parts)
    return total, rms_norm_reference(total, weight, eps, order=order)


# What a kernel is launched with; `is_empty`: on no values, so that it is loaded before any GPU waits for another. CUDA may stop
# everything while it loads.


def launch_all_reduce(x, y, table, ranks, way, *, is_empty=False):
    """y = the sum over ranks of x, by the kernel of `way`; table: that of `Mailbox.tables` for it."""
    count = {"one_shot": 8, "two_shot": 16}[way] // x.itemsize
    aligned = all(byte_bounds(array)[0] % (count * array.itemsize) == 0 for array in (x, y))
    kernel = instance(f"all_reduce_{way}", x.dtype, ranks, aligned)
    n = np.int64(0 if is_empty else x.size)
    if way == "one_shot":
        blocks = one_shot_blocks(x.size, x.itemsize, ranks)
        launch(kernel, (1 if is_empty else blocks,), (_ONE_SHOT_THREADS,), (x, y, table, n))
    else:
        blocks, piece = two_shot_grid(x.size, x.itemsize, ranks)
        launch(kernel, (1 if is_empty else blocks,), (_TWO_SHOT_THREADS,), (x, y, table, n, np.int32(piece)))


def launch_all_reduce_norm(x, weight, y, table, ranks, eps, *, order=None, is_empty=False):
    """x = the sum over ranks of x, float32, and y = rms_norm of it. ValueError for addresses that its accesses do not take."""
    dim = weight.size
    pairs = {"array": x, "weight": weight} | ({"out": y} if order is None else {})
    for name, array in pairs.items():
        if byte_bounds(array)[0] % (2 * array.itemsize):
            raise ValueError(f"{name} must start at a multiple of {2 * array.itemsize} bytes: pass an array of its own")
    kernel = instance("all_reduce_norm", weight.dtype, y.dtype, ranks, order is not None)
    sizes = (np.int32(0 if is_empty else dim), np.int32(y.shape[-1]), np.float32(eps))
    rows = 1 if is_empty else x.size // dim
    launch(kernel, (_NORM_SHARERS * rows,), (_NORM_THREADS,), (x, weight, order, y, table, *sizes))


INSTANCES = [
    *(instance(f"all_reduce_{way}", T, 2, True) for way in ("one_shot", "two_shot") for T in FLOATS),
    *(instance(f"all_reduce_{way}", float16, ranks, True) for way in ("one_shot", "two_shot") for ranks in (4, 8)),
    *(instance(f"all_reduce_{way}", float32, 8, False) for way in ("one_shot", "two_shot")),
    *(instance("all_reduce_norm", float32, T, ranks, True) for T in (float16, bfloat16) for ranks in (2, 4, 8)),
    *(instance("all_reduce_norm", T, T, 4, False) for T in (float16, bfloat16)),
]
