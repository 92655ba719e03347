"""Hadamard matrices (entries +-1, rows orthogonal) and the fast transform by those whose size is a power of two."""

import numpy as np

from cupyq._arrays import FLOATS, bfloat16, check, float16, float32, namespace, output, refuse_partial_overlap
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.errors import UnsupportedError
from cupyq.ops._common import float32_factor, float64, store, vector_width, whole_number

LARGEST_SIZE = 32768


@accepts_dlpack(replays=True)
def hadamard(x, size, *, scale=1.0, out=None):
    """y = scale * x @ H for each run of `size` values along the last axis, H the Sylvester matrix of that size

    H[i, j] = (-1) ** (number of ones in i & j): natural order, symmetric, H @ H = size * I, so that scale = size**-0.5
    makes it orthogonal. x [..., dim], float16, bfloat16 or float32, dim a multiple of size, a power of two from 2 to
    32768; y has x's shape and dtype. fp32 additions in a fixed order (float64 in the reference), scale taken as
    float32, rounded once. `out` may be x. Raises TypeError / ValueError for wrong dtypes, shapes, strides, sizes or a
    partial overlap of out and x.
    Source: Fino and Algazi, Unified Matrix Treatment of the Fast Walsh-Hadamard Transform, IEEE ToC 25(11), 1976.

    >>> hadamard(np.array([[1.0, 2.0, 3.0, 4.0]], np.float32), 4)
    array([[10., -2., -4.,  0.]], dtype=float32)
    """
    xp = namespace(x=x)
    size, scale = whole_number(size, "size"), float32_factor(scale, "scale")
    if not 2 <= size <= LARGEST_SIZE or size & (size - 1):
        raise ValueError(f"size must be a power of two from 2 to {LARGEST_SIZE}, got {size}")
    check(x, "x", dtype=FLOATS)
    if x.ndim == 0 or x.shape[-1] % size:
        raise ValueError(f"x must have a multiple of size = {size} as its last dimension, got shape {x.shape}")
    out = output(xp, out, x.shape, x.dtype)
    refuse_partial_overlap(out, x=x)
    if x.size == 0:
        return out
    if xp is np:
        store(out, hadamard_reference(x, size, scale))
    else:
        _launch_hadamard(x, size, scale, out)
    return out


@np.errstate(invalid="ignore")
def hadamard_reference(x, size, scale):
    y, distance = float64(x), 1
    while distance < size:
        pairs = y.reshape(-1, 2, distance)
        low, high = pairs[:, 0], pairs[:, 1]
        y = np.stack([low + high, low - high], axis=1)
        distance *= 2
    return y.reshape(x.shape) * float(np.float32(scale))


def _launch_hadamard(x, size, scale, out):
    kernel, threads = _hadamard_kernel(x.dtype, size, vector_width(size, x, out, widest=min(16 // x.itemsize, size)))
    count = x.size // size
    transforms = max(1, threads * _values(size) // size)  # of one block
    launch(kernel, (-(-count // transforms),), (threads,), (x, out, np.int64(count), np.float32(scale)))


def _hadamard_kernel(dtype, size, vector):
    """(instance, threads of a block)"""
    return instance("hadamard", dtype, size, _values(size), vector), max(256, size // _values(size))


def _values(size):
    """Values each thread holds in registers: more in long transforms, so that few stages cross warps."""
    return min(size, 8) if size <= 2048 else 16 if size == 4096 else 32


def hadamard_matrix(n):
    """A Hadamard matrix of n rows: float16 [n, n] of +-1 with H @ H.T = n * I.

    n = 1; else Sylvester's doubling [[H, H], [H, -H]] of a matrix of n / 2 rows; else `paley_1`; else `paley_2`. Powers
    of two give the matrix of `hadamard`. ValueError unless n is 1, 2 or a multiple of 4: no other sizes exist.
    UnsupportedError where none of these constructions applies, though matrices of some such sizes are known from
    searches or over fields of prime-power order: 52, 92, 100, 116, 156, 172, 188, 236, 244, 428 and others.

    >>> hadamard_matrix(2)
    array([[ 1.,  1.],
           [ 1., -1.]], dtype=float16)
    """
    n = whole_number(n, "n")
    if n < 1 or (n > 2 and n % 4):
        raise ValueError(f"n must be 1, 2 or a multiple of 4: there is no Hadamard matrix of {n} rows")
    matrix = _construct(n)
    if matrix is None:
        raise UnsupportedError(f"n: no construction for a Hadamard matrix of {n} rows; take another size")
    return matrix


def _construct(n):
    if n == 1:
        return np.ones((1, 1), np.float16)
    if n > 2 and n % 4:
        return None
    half = _construct(n // 2)
    if half is not None:
        return np.block([[half, half], [half, -half]])
    if _is_prime(n - 1):
        return paley_1(n)
    if n // 2 % 4 == 2 and _is_prime(n // 2 - 1):
        return paley_2(n)
    return None


def paley_1(n):
    """Paley's first Hadamard matrix: float16 [n, n] of +-1, for n - 1 a prime p of the form 4 i + 3.

    Row 0 is +1, column 0 below it -1; else H[i + 1, j + 1] = +1 where i = j or i - j is a square modulo p, -1 elsewhere.
    ValueError for other n. Source: Paley, On Orthogonal Matrices, J. Math. Phys. 12, 1933; exllamav2 (ext_hadamard.cpp).

    >>> paley_1(4)
    array([[ 1.,  1.,  1.,  1.],
           [-1.,  1., -1.,  1.],
           [-1.,  1.,  1., -1.],
           [-1., -1.,  1.,  1.]], dtype=float16)
    """
    n = whole_number(n, "n")
    if n % 4 or not _is_prime(n - 1):
        raise ValueError(f"n must be one more than a prime of the form 4 i + 3, got {n}")
    matrix = np.ones((n, n), np.float16)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = np.where(_is_square_difference(n - 1), 1, -1)
    return matrix


def paley_2(n):
    """Paley's second Hadamard matrix: float16 [n, n] of +-1, for n / 2 - 1 a prime p of the form 4 i + 1.

    Blocks of 2 x 2, for i and j in 0 ... n / 2 - 1: [[+, -], [-, -]] where i = j; else [[+, +], [+, -]] where i = 0,
    j = 0 or i - j is a square modulo p; else its negative. ValueError for other n. Source: as `paley_1`.

    >>> paley_2(12)[:2, :6]
    array([[ 1., -1.,  1.,  1.,  1.,  1.],
           [-1., -1.,  1., -1.,  1., -1.]], dtype=float16)
    """
    n = whole_number(n, "n")
    if n % 8 != 4 or not _is_prime(n // 2 - 1):
        raise ValueError(f"n must be twice one more than a prime of the form 4 i + 1, got {n}")
    signs = np.ones((n // 2, n // 2), np.float16)
    signs[1:, 1:] = np.where(_is_square_difference(n // 2 - 1), 1, -1)
    np.fill_diagonal(signs, 0)
    on_diagonal = np.kron(np.eye(n // 2, dtype=np.float16), np.array([[1, -1], [-1, -1]], np.float16))
    return np.kron(signs, np.array([[1, 1], [1, -1]], np.float16)) + on_diagonal


def _is_square_difference(p):
    """bool [p, p]: whether i - j is a square modulo p; 0 counts as one."""
    numbers = np.arange(p, dtype=np.int64)
    is_square = np.zeros(p, bool)
    is_square[numbers * numbers % p] = True
    return is_square[(numbers[:, None] - numbers) % p]


def _is_prime(n):
    return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))


INSTANCES = [
    *(_hadamard_kernel(float16, size, 8)[0] for size in (8, 128, 1024, 4096, 8192, 32768)),
    _hadamard_kernel(bfloat16, 128, 8)[0],
    *(_hadamard_kernel(float32, size, 4)[0] for size in (128, 32768)),
    _hadamard_kernel(float16, 128, 1)[0],
    _hadamard_kernel(float16, 2, 2)[0],
]
"""What `cupyq compile` builds ahead; other combinations are compiled when first used."""
