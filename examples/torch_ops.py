"""The ops inside a PyTorch model: the MLP of a quantized checkpoint as an nn.Module, its weights still EXL2.

On the GPU where there is one, on PyTorch's current stream; tensors go in and out by DLPack, without a copy.
"""

from pathlib import Path

try:
    import torch
except ImportError:
    raise SystemExit(print("PyTorch is not installed, nothing to show: pip install torch")) from None

import cupyq
from cupyq import _device
from cupyq.formats.safetensors import Checkpoint

LAYER = "model.layers.0."
device = "cuda" if torch.cuda.is_available() and _device.count() else "cpu"


class QuantizedMLP(torch.nn.Module):
    """x + down(silu(gate(norm(x))) * up(norm(x)))"""

    def __init__(self, checkpoint, layer, eps):
        super().__init__()
        self.norm = torch.nn.RMSNorm(checkpoint.info(f"{layer}post_attention_layernorm.weight").shape, eps, device=device)
        self.norm.weight.data.copy_(torch.tensor(checkpoint.array(f"{layer}post_attention_layernorm.weight")))
        self.norm.half()  # any module of PyTorch may stand beside the ops
        self.gate, self.up, self.down = (
            self._matrix(checkpoint, f"{layer}mlp.{name}_proj.") for name in ("gate", "up", "down")
        )

    @staticmethod
    def _matrix(checkpoint, key):
        names = [name for name in checkpoint.names if name.startswith(key)]
        tensors = {name.removeprefix(key): torch.tensor(checkpoint.array(name), device=device) for name in names}
        return cupyq.QMatrix.from_tensors(tensors)

    @torch.no_grad()
    def forward(self, x):
        y = self.norm(x)
        inner = torch.nn.functional.silu(cupyq.ops.qmatmul(y, self.gate)) * cupyq.ops.qmatmul(y, self.up)
        return x + cupyq.ops.qmatmul(inner, self.down)


with Checkpoint(Path(__file__).parent / "models/shakespeare-exl2-4.0") as checkpoint:
    mlp = QuantizedMLP(checkpoint, LAYER, 1e-5)
x = torch.randn(2, 5, mlp.gate.k, dtype=torch.float16, generator=torch.Generator().manual_seed(0)).to(device)
result = mlp(x)

gate, up, down = (torch.from_dlpack(cupyq.ops.reconstruct(matrix)).double() for matrix in (mlp.gate, mlp.up, mlp.down))
y = torch.nn.functional.rms_norm(x.double(), mlp.norm.weight.shape, mlp.norm.weight.double(), 1e-5)
exact = x.double() + (torch.nn.functional.silu(y @ gate) * (y @ up)) @ down
print(f"{type(result).__module__} {tuple(result.shape)} {result.dtype} on {result.device}")
print(f"largest error against float64 {(result.double() - exact).abs().max().item():.1e}")
if not torch.allclose(result.double(), exact, rtol=5e-3, atol=5e-3):
    raise SystemExit("the module and float64 disagree")
