"""Small, odd-sized calls of every op on the GPU, for compute-sanitizer: `make sanitize`.

Values are checked by the tests; here the sanitizer watches for accesses out of bounds, races between threads, reads of
memory nobody wrote, and barriers not all threads reach. Each array gets an allocation of its own, as a pool would hide
a step past its end.
"""

import sys
from pathlib import Path

import cupy
import numpy as np

import cupyq
from cupyq import ops
from cupyq._arrays import FLOATS, bfloat16
from cupyq.formats.safetensors import Checkpoint

MODELS = Path(__file__).parent.parent / "examples/models"

rng = np.random.default_rng(0)


def array(*shape, dtype=np.float32):
    return cupy.asarray(rng.standard_normal(shape).astype(dtype))


def integers(high, *shape):
    return cupy.asarray(rng.integers(0, high, shape).astype(np.int32))


def norms(dtype):
    for rows, dim in ((1, 1), (3, 97), (2, 640), (5, 4096)):
        x, weight, bias = array(rows, dim, dtype=dtype), array(dim, dtype=dtype), array(dim, dtype=dtype)
        ops.rms_norm(x, weight)
        ops.layer_norm(x, weight, bias)
    for head_dim in (1, 72, 128):
        weight = array(head_dim, dtype=dtype)
        for kind in ("rms", "layer"):
            ops.head_norm(array(2, 3, 5, head_dim, dtype=dtype), weight, kind=kind)


def elementwise(dtype):
    for rows, columns in ((1, 1), (3, 33), (2, 1024)):
        x, y = array(rows, columns, dtype=dtype), array(rows, columns, dtype=dtype)
        ops.add(x, y)
        ops.add_weighted(x, y, cupy.abs(array(rows)))
        ops.silu_mul(x, y)
        ops.gelu_mul(x, y)
        ops.gelu(x)
        ops.softcap(x, 30.0)
        ops.embedding(integers(7, 2, 3), array(7, columns, dtype=dtype))
        ops.matmul(x, array(columns, 5, dtype=dtype), bias=array(5, dtype=dtype))


def positions(dtype):
    sin, cos, start = array(64, 20), array(64, 20), cupy.asarray(np.array([0, 9], np.int32))
    for style in ("neox", "gptj"):
        ops.rope(array(2, 3, 5, 48, dtype=dtype), sin, cos, start, style=style)
    k, v = array(2, 3, 2, 40, dtype=dtype), array(2, 3, 2, 40, dtype=dtype)
    ops.kv_append(k, v, array(2, 16, 2, 40, dtype=dtype), array(2, 16, 2, 40, dtype=dtype), start)


def attentions(dtype):
    for seq, capacity, head_dim in ((1, 33, 64), (1, 700, 128), (3, 70, 40), (37, 90, 128), (70, 70, 256)):
        k, v = array(2, capacity, 2, head_dim, dtype=dtype), array(2, capacity, 2, head_dim, dtype=dtype)
        lengths = cupy.asarray(np.array([capacity, max(seq, capacity // 2)], np.int32))
        ops.attention(array(2, seq, 6, head_dim, dtype=dtype), k, v, kv_lengths=lengths, window=50, softcap=20.0)


def routing_and_sampling(dtype):
    ops.route(array(5, 8, dtype=dtype), 2)
    ops.route(array(3, 100, dtype=dtype), 7)
    for vocabulary in (1, 1000, 5003):
        logits = array(3, vocabulary, dtype=dtype)
        ops.sample(logits, temperature=0.0)
        ops.sample(logits, temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, seed=np.arange(3))


def quantized():
    """One layer of each width and format, from tensors to products of several heights."""
    for model in ("shakespeare-exl2-2.5", "shakespeare-exl2-4.0", "shakespeare-gptq-g32"):
        with Checkpoint(MODELS / model) as checkpoint:
            word = ".q_weight" if "exl2" in model else ".qweight"
            keys = [name.removesuffix(word) for name in checkpoint.names if name.endswith(word)]
            for key in keys[:8]:
                tensors = {n.rpartition(".")[2]: checkpoint.array(n) for n in checkpoint.names if n.startswith(f"{key}.")}
                q = cupyq.QMatrix.from_tensors({name: cupy.asarray(value) for name, value in tensors.items()})
                ops.reconstruct(q)
                for rows in (1, 7, 17, 64, 65):
                    for dtype in (np.float16, bfloat16):
                        ops.qmatmul(array(rows, q.k, dtype=dtype), q)


CASES = (norms, elementwise, positions, attentions, routing_and_sampling)

if __name__ == "__main__":
    cupy.cuda.set_allocator(None)
    for case in CASES:
        for dtype in FLOATS:
            case(dtype)
            cupy.cuda.runtime.deviceSynchronize()
            print(f"{case.__name__} {np.dtype(dtype)}", flush=True)
    quantized()
    cupy.cuda.runtime.deviceSynchronize()
    print("quantized", flush=True)
    sys.exit(0)
