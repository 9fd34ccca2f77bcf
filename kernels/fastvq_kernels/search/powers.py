"""Powers of two by their bits: exact, unlike the library's functions."""

import triton
import triton.language as tl


@triton.jit
def power_of_two(largest, lowest, highest):
    """Exponent that brings `largest` (fp32, >= 0) into [2^14, 2^15), clamped; 2^e as fp32 is (e + 127) << 23."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    return tl.minimum(tl.maximum(141 - exponent, lowest), highest)


@triton.jit
def exp2_exact(e):
    """2^e for a normal result; the library's exp2 is an approximation."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def ratio(a, b):
    """a / b of two powers of two, exactly: a float division may be off by two units in the last place."""
    exponent = a.to(tl.int32, bitcast=True) - b.to(tl.int32, bitcast=True) + (127 << 23)
    return exponent.to(tl.float32, bitcast=True)
