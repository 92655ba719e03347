"""Linear layers that read the same input, side by side: one product instead of two or three."""

from cupyq.ops.qmatrix_join import JoinedQMatrix


class JoinedLinear:
    """The matrices of Linear layers that read the same x, side by side: one product, [y_1 | y_2 | ...]."""

    def __init__(self, *linears):
        self.matrix = _joined(linears)
        """JoinedQMatrix, or None where a layer is not quantized or the matrices do not fit together."""

    def matrix_for(self, linears, adapters):
        """The matrix if it may stand for these layers in a step with that Selection; else each computes its own product.

        It may not where an adapter changes one of them, as that part is added to each y by itself.
        """
        if self.matrix is None or any(linear.is_changed_by(adapters) for linear in linears):
            return None
        is_current = all(linear.weight is own for linear, own in zip(linears, self.matrix.matrices, strict=True))
        return self.matrix if is_current else None


def _joined(linears):
    if not all(linear is not None and linear.is_quantized for linear in linears):
        return None
    try:
        return JoinedQMatrix.from_matrices(linear.weight for linear in linears)
    except ValueError:  # of different sizes or formats
        return None


def matrices_of(linears, *joined):
    """The quantized matrices among Linear layers, and those that JoinedLinears made of them."""
    alone = [linear.weight for linear in linears if linear.is_quantized]
    return alone + [group.matrix for group in joined if group.matrix is not None]
