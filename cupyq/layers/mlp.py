"""The MLP of a decoder, gated or not."""

from cupyq.ops.activation import gelu, gelu_mul, relu, relu_mul, silu, silu_mul

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def activate(activation, x, up=None):
    """activation(x), times `up` if there is one, written into x; activation is one of ACTIVATIONS."""
    if activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        if up is None:
            return gelu(x, approximate=approximate, out=x)
        return gelu_mul(x, up, approximate=approximate, out=x)
    plain, gated = {"silu": (silu, silu_mul), "relu": (relu, relu_mul)}[activation]
    return plain(x, out=x) if up is None else gated(x, up, out=x)


class MLP:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) where gate is None; all Linear layers."""

    def __init__(self, gate, up, down, activation):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.gate, self.up, self.down, self.activation = gate, up, down, activation

    def __call__(self, x, adapters=None):
        """x [..., hidden] -> the same shape."""
        up = self.up(x, adapters=adapters)
        if self.gate is None:
            inner = activate(self.activation, up)
        else:
            inner = activate(self.activation, self.gate(x, adapters=adapters), up)
        return self.down(inner, adapters=adapters)

    def linears(self):
        return [linear for linear in (self.gate, self.up, self.down) if linear is not None]
