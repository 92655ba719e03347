"""The ops on PyTorch tensors: in and out by DLPack, without a copy. On the GPU where there is one, on the CPU otherwise."""

from pathlib import Path

try:
    import torch
except ImportError:
    raise SystemExit(print("PyTorch is not installed, nothing to show: pip install torch")) from None

import cupyq
from cupyq import _device
from cupyq.formats.safetensors import Checkpoint

LAYER = "model.layers.0.mlp.down_proj."
device = "cuda" if torch.cuda.is_available() and _device.count() else "cpu"

with Checkpoint(Path(__file__).parent / "models/shakespeare-exl2-4.0") as checkpoint:
    names = [name for name in checkpoint.names if name.startswith(LAYER)]
    tensors = {name.removeprefix(LAYER): torch.tensor(checkpoint.array(name), device=device) for name in names}
q = cupyq.QMatrix.from_tensors(tensors)
x = torch.randn(3, q.k, dtype=torch.float16, generator=torch.Generator().manual_seed(0)).to(device)

y = cupyq.ops.qmatmul(x, q)  # a torch tensor on x's device, queued on torch's current stream
weight = torch.from_dlpack(cupyq.ops.reconstruct(q))
exact = x.double() @ weight.double()

print(f"{type(y).__module__} {tuple(y.shape)} {y.dtype} on {y.device}")
print(f"largest error against float64 {(y.double() - exact).abs().max().item():.1e}")
if not torch.allclose(y.double(), exact, rtol=1e-3, atol=1e-3):
    raise SystemExit("qmatmul and float64 disagree")
