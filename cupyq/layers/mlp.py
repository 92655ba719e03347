"""The gated MLP."""

from cupyq.ops.activation import gelu_mul, silu_mul


def gated(activation, gate, up):
    """activation(gate) * up, written into `gate`; activation is silu, gelu or gelu_tanh."""
    if activation == "silu":
        return silu_mul(gate, up, out=gate)
    return gelu_mul(gate, up, approximate="tanh" if activation == "gelu_tanh" else "none", out=gate)


class MLP:
    """down(activation(gate(x)) * up(x)), of three Linear layers."""

    def __init__(self, gate, up, down, activation):
        self.gate, self.up, self.down, self.activation = gate, up, down, activation

    def __call__(self, x):
        return self.down(gated(self.activation, self.gate(x), self.up(x)))

    def linears(self):
        return [self.gate, self.up, self.down]
