"""Kernels of an LLM inference engine for quantized weights, as one pure-Python package."""

from cupyq._version import VERSION as __version__
from cupyq.errors import BackendError, CupyqError, FormatError, UnsupportedError

__all__ = [
    "BackendError",
    "CupyqError",
    "FormatError",
    "QMatrix",
    "UnsupportedError",
    "__version__",
    "load_model",
    "ops",
]


def __getattr__(name):
    # Imported when first used: `import cupyq` alone stays fast and touches nothing but NumPy.
    if name == "ops":
        import cupyq.ops as value
    elif name == "QMatrix":
        from cupyq.ops.qmatrix import QMatrix as value
    elif name == "load_model":
        from cupyq.models.loader import load_model as value
    else:
        raise AttributeError(f"module 'cupyq' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
