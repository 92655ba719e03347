"""A mixture of experts, of which a router chooses a few per row."""

import numpy as np

from cupyq._arrays import namespace
from cupyq.ops.elementwise import add_weighted
from cupyq.ops.routing import route


class MoE:
    """sum over the top_k experts e of weight_e * expert_e(x), weights being the softmax over their router logits.

    Every expert runs on every row, and weight 0 leaves a row as it is: which rows an expert needs is known on the GPU
    alone, and asking would stall it. The sum is float32, in the order of the experts. The reference skips idle experts.
    """

    def __init__(self, router, experts, top_k):
        self.router, self.experts, self.top_k = router, experts, top_k

    def __call__(self, x):
        """x [..., hidden] -> float32 of the same shape."""
        rows = x.reshape(-1, x.shape[-1])
        weights = route(self.router(rows, dtype=np.float32), self.top_k)  # [experts, rows]
        total = namespace(x=x).zeros(rows.shape, np.float32)
        for index, expert in enumerate(self.experts):
            if isinstance(weights, np.ndarray) and not weights[index].any():
                continue
            add_weighted(total, expert(rows), weights[index], out=total)
        return total.reshape(x.shape)

    def linears(self):
        """Those of the experts; the router stays unquantized and is not counted."""
        return [linear for expert in self.experts for linear in expert.linears()]
