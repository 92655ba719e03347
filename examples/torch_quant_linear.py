"""LoRAX's QuantLinear as a PyTorch module: a thin shell that moves DLPack views, no data.

The layer of a real GPTQ checkpoint, on the GPU where there is one.
"""

from pathlib import Path

try:
    import torch
except ImportError:
    raise SystemExit(print("PyTorch is not installed, nothing to show: pip install torch")) from None

from cupyq import _device
from cupyq.formats.safetensors import Checkpoint
from cupyq.layers import QuantLinear


class TorchQuantLinear(torch.nn.Module):
    """Drop-in for LoRAX's layer: same constructor, same forward."""

    def __init__(self, qweight, qzeros, scales, g_idx, bias, bits, groupsize):
        super().__init__()
        self.layer = QuantLinear(qweight, qzeros, scales, g_idx, bias, bits, groupsize)

    @torch.no_grad()
    def forward(self, x):
        return self.layer(x.contiguous())


LAYER = "model.layers.0.mlp.down_proj."
device = "cuda" if torch.cuda.is_available() and _device.count() else "cpu"

with Checkpoint(Path(__file__).parent / "models/shakespeare-gptq-g32") as checkpoint:
    tensors = {name: torch.tensor(checkpoint.array(LAYER + name)) for name in ("qweight", "qzeros", "scales", "g_idx")}
g_idx = tensors.pop("g_idx")  # small tables may stay on the CPU
tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
model = torch.nn.Sequential(TorchQuantLinear(**tensors, g_idx=g_idx, bias=None, bits=4, groupsize=32), torch.nn.SiLU())

codes = (tensors["qweight"].cpu()[:, None, :] >> torch.arange(0, 32, 4)[None, :, None] & 15).flatten(0, 1)
zeros = (tensors["qzeros"].cpu()[:, :, None] >> torch.arange(0, 32, 4) & 15).flatten(1, 2) + 1
weight = (codes - zeros[g_idx.long()]).double() * tensors["scales"].cpu().double()[g_idx.long()]

x = torch.randn(2, 3, weight.shape[0], dtype=torch.float16, generator=torch.Generator().manual_seed(0)).to(device)
y = model(x)
exact = torch.nn.functional.silu(x.cpu().double() @ weight)
print(f"{type(y).__module__} {tuple(y.shape)} {y.dtype} on {y.device}")
print(f"largest error against float64 {(y.cpu().double() - exact).abs().max().item():.1e}")
if not torch.allclose(y.cpu().double(), exact, rtol=2e-3, atol=2e-3):
    raise SystemExit("QuantLinear and float64 disagree")
