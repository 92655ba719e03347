"""What the tests of both weight formats share: values by Python alone, and tensors that are changed or far away."""

import struct


def half(value):
    """One rounding to fp16, by the C library of Python rather than by NumPy."""
    return struct.unpack("<e", struct.pack("<e", value))[0]


def stream_value(words, i, bits):
    """Value i of a stream of bits in 32-bit words."""
    return sum((int(words[(i * bits + t) // 32]) >> ((i * bits + t) % 32) & 1) << t for t in range(bits))


class OnDevice:
    """What a GPU array shows without a copy."""

    def __init__(self, array):
        self.shape, self.dtype = array.shape, array.dtype


def changed(short, change):
    """A function of a layer's tensors: they, with one changed."""

    def apply(tensors):
        return {**tensors, short: change(tensors[short])}

    return apply
