"""Activations in the stored row order of a quantized matrix."""

import numpy as np

from cupyq._arrays import bfloat16, float16
from cupyq._kernels import instance, launch
from cupyq.formats.tiles import TILE


def launch_gather_columns(x, order, out, m, blocks):
    """out [m, 32 * blocks] = the columns of x [m, k] in `order` (None: as they are)."""
    count = blocks * TILE
    arguments = (x, order, out, *map(np.int32, (m, x.size // m, count)))
    launch(_gather_instance(x.dtype), (-(-count // 256), min(m, 65535)), (128,), arguments)
    return out


def _gather_instance(dtype):
    return instance("gather_columns", dtype)


INSTANCES = [_gather_instance(dtype) for dtype in (float16, bfloat16)]
