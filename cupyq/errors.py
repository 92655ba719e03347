"""The exceptions cupyq raises on purpose. Each message names what was found, what was expected, and the mend."""


class CupyqError(Exception):
    """Base of every cupyq exception."""


class FormatError(CupyqError, ValueError):
    """A file, tensor or configuration does not have the form its format defines."""


class UnsupportedError(CupyqError, ValueError):
    """Well-formed input that cupyq (or this GPU) does not handle, such as an unknown architecture."""


class BackendError(CupyqError, RuntimeError):
    """The machine lacks something: a GPU, CuPy, NVRTC, a writable cache folder."""
