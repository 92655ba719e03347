"""The MLP of a decoder, gated or not."""

from cupyq.layers.joined import JoinedLinear, matrices_of, order_of
from cupyq.ops.activation import gelu, gelu_mul, relu, relu_mul, silu, silu_mul
from cupyq.ops.qmatmul import qmatmul_gated

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

    def __call__(self, x, adapters=None, *, residual=None, is_ordered=False, workspace=None):
        """x [..., hidden] -> the same shape; or, with a residual, into it what is added to it.

        is_ordered: the columns of x are in the order that `input_order` gave. workspace: that of `qmatmul`.
        """
        joined = self._gate_and_up(adapters)
        if joined is not None:
            inner = qmatmul_gated(x, joined, activation=self.activation, is_ordered=is_ordered, workspace=workspace)
        else:
            up = self.up(x, adapters=adapters, workspace=workspace)
            if self.gate is None:
                inner = activate(self.activation, up)
            else:
                inner = activate(self.activation, self.gate(x, adapters=adapters, workspace=workspace), up)
        return self.down(inner, adapters=adapters, residual=residual, out=residual, workspace=workspace)

    def _gate_and_up(self, adapters):
        """The two as one matrix, where they can be one in this step, else None."""
        return self._joined.matrix_for((self.gate, self.up), adapters)

    def input_order(self, rows, adapters=None):
        """The order in which a norm had best write so many rows of x; None: its own. See `QMatrix.order`."""
        return order_of(self._gate_and_up(adapters), rows)

    def linears(self):
        return [linear for linear in (self.gate, self.up, self.down) if linear is not None]

    def matrices(self):
        """Quantized matrices of its products, joined ones included."""
        return matrices_of(self.linears(), self._joined)
