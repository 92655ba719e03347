"""The MLP of a decoder, gated or not."""

from cupyq.layers.joined import JoinedLinear, matrices_of
from cupyq.ops.activation import gelu, gelu_mul, relu, relu_mul, silu, silu_mul
from cupyq.ops.qmatmul import InputGate, qmatmul, qmatmul_gated, suits_input_gate

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
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) where gate is None; all Linear layers.

    Quantized gate and up are one product, which a few rows pass in one launch, the activation included.
    """

    def __init__(self, gate, up, down, activation):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.gate, self.up, self.down, self.activation = gate, up, down, activation
        self._joined = JoinedLinear(gate, up)

    def __call__(self, x, adapters=None, *, norm=None, residual=None, workspace=None):
        """x [..., hidden] -> the same shape; or, with a residual, into it what is added to it.

        norm: an InputNorm to be applied to x first. workspace: that of `qmatmul`.
        """
        joined = self._joined.matrix_for((self.gate, self.up), adapters)
        gate = None
        if joined is not None and self._gates_in_down(x.size // x.shape[-1], adapters):
            inner, gate = qmatmul(x, joined, before=norm, workspace=workspace), InputGate(self.activation)
        elif joined is not None:
            inner = qmatmul_gated(x, joined, activation=self.activation, before=norm, workspace=workspace)
        elif self.gate is None:
            inner = activate(self.activation, self.up(x, adapters=adapters, before=norm, workspace=workspace))
        else:
            if norm is not None:
                x = norm.applied(x)
            both = (linear(x, adapters=adapters, workspace=workspace) for linear in (self.gate, self.up))
            inner = activate(self.activation, *both)
        return self.down(inner, adapters=adapters, before=gate, residual=residual, out=residual, workspace=workspace)

    def _gates_in_down(self, rows, adapters):
        """Whether the last product had best do the activation of so many rows itself."""
        down = self.down
        return down.is_quantized and not down.is_changed_by(adapters) and suits_input_gate(rows, down.weight)

    def linears(self):
        return [linear for linear in (self.gate, self.up, self.down) if linear is not None]

    def matrices(self):
        """Quantized matrices of its products, joined ones included."""
        return matrices_of(self.linears(), self._joined)
