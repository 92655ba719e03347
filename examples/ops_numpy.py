"""A quantized layer as a value: read it, multiply by it, check it. NumPy only, no GPU."""

from pathlib import Path

import numpy as np

import cupyq
from cupyq.formats.safetensors import Checkpoint

LAYER = "model.layers.0.mlp.down_proj."

with Checkpoint(Path(__file__).parent / "models/shakespeare-exl2-4.0") as checkpoint:
    tensors = {name.removeprefix(LAYER): checkpoint.array(name) for name in checkpoint.names if name.startswith(LAYER)}
q = cupyq.QMatrix.from_tensors(tensors)
x = np.random.default_rng(0).normal(size=(3, q.k)).astype(np.float16)

y = cupyq.ops.qmatmul(x, q)
exact = x.astype(np.float64) @ cupyq.ops.reconstruct(q).astype(np.float64)

print(f"{q.kind} [{q.k}, {q.n}] at {q.bits_per_weight:.2f} bits per weight, code widths {q.bits}")
print(f"y {y.dtype} {y.shape}, largest error against float64 {np.abs(y - exact).max():.1e}")
if not np.allclose(y, exact, rtol=1e-3, atol=1e-3):
    raise SystemExit("qmatmul and float64 disagree")
