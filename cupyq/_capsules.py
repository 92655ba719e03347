"""What is read from DLPack's capsules and written into them: marks of read-only arrays, and the type code of bfloat16."""

import ctypes

# Neither NumPy nor CuPy imports or exports bfloat16 by DLPack, as neither has such a dtype of its own. The bits travel
# as int16, with the type code in the capsule exchanged on the way: no copy, and every framework's stream rules hold.

DLPACK_INT, DLPACK_BFLOAT = 0, 4  # DLDataTypeCode of dlpack.h

# Offset of DLTensor.dtype.code by capsule name: data pointer (8 bytes), device (8) and ndim (4) stand before it in a
# DLTensor; a DLManagedTensorVersioned has version (8), context (8), deleter (8) and flags (8) before the DLTensor.
_TYPE_CODE_OFFSETS = {b"dltensor": 20, b"dltensor_versioned": 52}

_FLAGS_OFFSET, _READ_ONLY = 24, 1  # of a DLManagedTensorVersioned

_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def is_read_only(array):
    """Whether an array on a GPU is marked as read-only, as DLPack can from version 1 on; CuPy's import passes over the mark."""
    try:
        capsule = array.__dlpack__(stream=-1, max_version=(1, 0))  # -1: nothing waits for anything
    except (BufferError, TypeError):  # knows version 0 alone, which has no mark
        return False
    name = _capsule_name(capsule)
    if name not in _TYPE_CODE_OFFSETS or name == b"dltensor":
        return False
    return bool(ctypes.c_uint64.from_address(_capsule_pointer(capsule, name) + _FLAGS_OFFSET).value & _READ_ONLY)


class Retyped:
    """A DLPack producer that announces the elements of another one as a different type of the same size."""

    def __init__(self, array, type_code):
        self._array, self._type_code = array, type_code

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()

    def __dlpack__(self, **options):
        capsule = self._array.__dlpack__(**options)
        name = _capsule_name(capsule)
        ctypes.c_uint8.from_address(_capsule_pointer(capsule, name) + _TYPE_CODE_OFFSETS[name]).value = self._type_code
        return capsule
