"""Rotation of keys inside a kernel. The library's sine and cosine spill to the stack for large angles; these do not."""
import triton
import triton.language as tl

# pi in three parts, of which the first two have few enough bits that a multiple of them is exact (the three of pi / 2 in Cephes,
# sinf.c, twice); and polynomials fitted to [-pi / 2, pi / 2]: off by 1e-7, up to angles of about 1e5, where fp32 itself is off
# by 4e-3.
_PER_HALF = tl.constexpr(0.3183098861837907)
_HALF_1 = tl.constexpr(3.140625)
_HALF_2 = tl.constexpr(9.675025939941406e-4)
_HALF_3 = tl.constexpr(1.5099579909783764e-7)
# 1.5 * 2**23: added to a number, it leaves no place for a fraction, and the whole number in the last bits.
_WHOLE = tl.constexpr(12582912.0)


@triton.jit
def _cos_sin(angle):
    """Of what the angle is more than whole half turns; an odd number of those turns both signs around."""
    whole = angle * _PER_HALF + _WHOLE
    halves = whole - _WHOLE
    rest = angle - halves * _HALF_1
    rest = rest - halves * _HALF_2
    rest = rest - halves * _HALF_3
    square = rest * rest
    sin = rest + rest * square * (-0.16666659712791443 + square * (8.333087898790836e-3 + square * (
        -1.9811101083178073e-4 + square * 2.60890374192968e-6)))
    cos = 1.0 - 0.5 * square + square * square * (4.1666656732559204e-2 + square * (-1.3888569083064795e-3 + square * (
        2.4769291485426947e-5 - square * 2.619354688704334e-7)))
    sign = whole.to(tl.int32, bitcast=True) << 31
    return ((cos.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True),
            (sin.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True))


@triton.jit
def turned(first, second, angle):
    """Both halves of keys [keys, dims], turned by `angle` in radians, of a shape that broadcasts with theirs."""
    cos, sin = _cos_sin(angle)
    return first * cos - second * sin, second * cos + first * sin
