"""Rotation of keys inside a kernel. The library's sine and cosine spill to the stack for large angles; these do not."""
import triton
import triton.language as tl

# pi / 2 in three parts, of which the first two have few enough bits that a multiple of them is exact; and polynomials on
# [-pi / 4, pi / 4] (Cephes, sinf.c): off by 1e-7, up to angles of about 1e5, where fp32 itself is off by 4e-3.
_PER_QUARTER = tl.constexpr(0.6366197723675814)
_QUARTER_1 = tl.constexpr(1.5703125)
_QUARTER_2 = tl.constexpr(4.837512969970703e-4)
_QUARTER_3 = tl.constexpr(7.549789954891882e-8)


@triton.jit
def _cos_sin(angle):
    quarters = tl.floor(angle * _PER_QUARTER + 0.5)
    rest = angle - quarters * _QUARTER_1
    rest = rest - quarters * _QUARTER_2
    rest = rest - quarters * _QUARTER_3
    square = rest * rest
    sin = rest + rest * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cos = 1.0 - 0.5 * square + square * square * (
        4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5))
    quarter = quarters.to(tl.int32) & 3
    swapped = (quarter & 1) != 0
    turned_cos, turned_sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return (tl.where(((quarter + 1) & 2) != 0, -turned_cos, turned_cos),
            tl.where((quarter & 2) != 0, -turned_sin, turned_sin))


@triton.jit
def turned(first, second, angle):
    """Both halves of keys [keys, dims], turned by `angle` in radians, of a shape that broadcasts with theirs."""
    cos, sin = _cos_sin(angle)
    return first * cos - second * sin, second * cos + first * sin
