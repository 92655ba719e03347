"""Print the extra that fits the NVIDIA driver: cuda12, cuda13, or nothing where there is no usable driver."""

import ctypes


def cuda_extra(library="libcuda.so.1"):
    """The newest CUDA major the driver supports decides: a driver runs programs of its own CUDA version and older."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return ""
    version = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return ""
    if version.value >= 13000:
        return "cuda13"
    return "cuda12" if version.value >= 12000 else ""


if __name__ == "__main__":
    print(cuda_extra())
