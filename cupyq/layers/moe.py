"""A mixture of experts, of which a router chooses a few per row."""

import numpy as np

from cupyq._arrays import namespace
from cupyq.layers.mlp import activate
from cupyq.ops.elementwise import add, add_weighted
from cupyq.ops.qmatmul_grouped import qmatmul_grouped, qmatmul_grouped_workspace_size
from cupyq.ops.qmatrix_group import QMatrixGroup
from cupyq.ops.routing import combine_rows, group_rows, route


class MoE:
    """sum over the top_k experts e of weight_e * expert_e(x), weights being the softmax over their router logits.

    The experts are MLPs. With `renormalize`, the weights of a row are divided by their sum. The result is float32, summed in
    the order of the experts; an expert with weight 0 does not count, whatever it makes of a row.
    Which rows an expert needs is known on the GPU alone, and asking would stall it. Quantized experts of one format and size
    are therefore products of row groups. Where there are others, or LoRA on an expert is in use, every expert runs on every
    row, except on NumPy, where nothing stalls.
    """

    def __init__(self, router, experts, top_k, *, renormalize=True):
        self.router, self.experts, self.top_k, self.renormalize = router, experts, top_k, renormalize
        self._groups = _grouped(experts)

    def __call__(self, x, adapters=None, *, norm=None, residual=None, workspace=None):
        """x [..., hidden] -> float32 of the same shape; or, with a residual, into it what is added to it.

        norm: an InputNorm to be applied to x first. workspace: that of `qmatmul`; products for which it is too small
        allocate their own.
        """
        if norm is not None:
            x = norm.applied(x)
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows, dtype=np.float32, adapters=adapters)
        weights, chosen = route(logits, self.top_k, renormalize=self.renormalize)
        if adapters is not None and not self._has_adapters(adapters):
            adapters = None
        if self._groups is None or adapters is not None:
            total = self._one_by_one(rows, weights, chosen, adapters)
        else:
            total = self._all_at_once(rows, weights, chosen, workspace)
        total = total.reshape(x.shape)
        return total if residual is None else add(residual, total, out=residual)

    def _all_at_once(self, rows, weights, chosen, workspace):
        gate, up, down = self._groups
        groups = group_rows(chosen, len(self.experts))

        def product(x, matrices, **options):
            is_room = workspace is not None and workspace.size >= qmatmul_grouped_workspace_size(matrices, groups)
            return qmatmul_grouped(x, matrices, groups, workspace=workspace if is_room else None, **options)

        inner = product(rows, up)
        if gate is None:
            activate(self.experts[0].activation, inner)
        else:
            inner = activate(self.experts[0].activation, product(rows, gate), inner)
        return combine_rows(product(inner, down, dtype=np.float32), weights)

    def _one_by_one(self, rows, weights, chosen, adapters):
        xp = namespace(rows=rows)
        by_expert = xp.zeros((len(self.experts), len(rows)), np.float32)
        by_expert[chosen.T, xp.arange(len(rows))] = weights.T
        total = xp.zeros(rows.shape, np.float32)
        for weight, expert in zip(by_expert, self.experts, strict=True):
            if xp is np and adapters is None:  # an adapter must see all rows: which request a row is of depends on them
                own = np.flatnonzero(weight)
                if own.size:
                    total[own] = add_weighted(total[own], expert(rows[own]), weight[own])
            else:
                add_weighted(total, expert(rows, adapters=adapters), weight, out=total)
        return total

    def _has_adapters(self, selection):
        """Whether any expert has an adapter that is selected."""
        return any(linear.is_changed_by(selection) for linear in self.linears())

    def linears(self):
        """Those of the experts; the router stays unquantized and is not counted."""
        return [linear for expert in self.experts for linear in expert.linears()]

    def matrices(self):
        """Quantized matrices of its products one by one, joined ones included."""
        return [matrix for expert in self.experts for matrix in expert.matrices()]


def _grouped(experts):
    """The QMatrixGroups of the experts' gate (None where no expert has one), up and down; None where they cannot be grouped."""
    if len({expert.activation for expert in experts}) > 1:
        return None
    groups = []
    for part in ("gate", "up", "down"):
        linears = [getattr(expert, part) for expert in experts]
        if part == "gate" and all(linear is None for linear in linears):
            groups.append(None)
        elif all(linear is not None and linear.is_quantized for linear in linears):
            if len({(linear.kind, linear.k, linear.n) for linear in linears}) > 1:
                return None
            groups.append(QMatrixGroup.from_matrices(linear.weight for linear in linears))
        else:
            return None
    return groups
