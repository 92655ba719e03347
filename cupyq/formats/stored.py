"""Which tensors of a checkpoint make a linear layer: EXL2's, GPTQ's or one that is not quantized, told apart by their names."""

from collections.abc import Container

_TENSORS = {
    "exl2": ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "plain": ("weight",),
}


def stored_kind(checkpoint: Container[str], key: str) -> str | None:
    """How the linear layer `key` is stored: "exl2", "gptq", "plain", or None for not at all.

    Its first tensor tells. Of a layer that is stored in several ways the first of these counts.
    """
    return next((kind for kind, (first, *_) in _TENSORS.items() if f"{key}.{first}" in checkpoint), None)


def stored_tensors(checkpoint: Container[str], key: str) -> tuple[str, ...]:
    """Short names of the layer's tensors but its bias, first that which tells its kind; none of a layer that is not stored.

    All are needed, whether they are there or not. g_idx, which GPTQ may do without, is left out where it is not.
    """
    names = _TENSORS.get(stored_kind(checkpoint, key) or "", ())
    return tuple(short for short in names if short != "g_idx" or f"{key}.g_idx" in checkpoint)
