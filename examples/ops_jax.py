"""The ops on JAX arrays: in and out by DLPack. JAX arrays are immutable, so results are always new arrays."""

from pathlib import Path

import numpy as np

try:
    import jax
except ImportError:
    raise SystemExit(print("JAX is not installed, nothing to show: pip install jax")) from None

import cupyq
from cupyq import _device
from cupyq.formats.safetensors import Checkpoint

LAYER = "model.layers.0.mlp.down_proj."
device = jax.devices()[0]
if device.platform != "cpu" and not _device.count():
    device = jax.devices("cpu")[0]

with Checkpoint(Path(__file__).parent / "models/shakespeare-exl2-4.0") as checkpoint:
    names = [name for name in checkpoint.names if name.startswith(LAYER)]
    tensors = {name.removeprefix(LAYER): jax.device_put(np.array(checkpoint.array(name)), device) for name in names}
q = cupyq.QMatrix.from_tensors(tensors)
x = jax.device_put(np.random.default_rng(0).normal(size=(3, q.k)).astype(np.float16), device)

y = cupyq.ops.qmatmul(x, q)  # a JAX array
on_host = cupyq.ops.reconstruct(q)
exact = np.asarray(x).astype(np.float64) @ getattr(on_host, "get", lambda: on_host)().astype(np.float64)

print(f"{type(y).__module__} {y.shape} {y.dtype} on {device.platform}")
print(f"largest error against float64 {np.abs(np.asarray(y) - exact).max():.1e}")
if not np.allclose(np.asarray(y), exact, rtol=1e-3, atol=1e-3):
    raise SystemExit("qmatmul and float64 disagree")
