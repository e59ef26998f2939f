"""Loads that the kernels of scored attention share."""
import triton
import triton.language as tl


@triton.jit
def load_tile(pointers, token_exists, dim_exists, BOUNDED: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr):
    """Load [tokens, dims] or its transpose, with zeros where a token (BOUNDED) or a head dim (PADDED) does not exist.

    UPCAST is for Triton's interpreter alone, whose dot of bf16 multiplies the raw bits.
    """
    if BOUNDED and PADDED:
        tile = tl.load(pointers, mask=token_exists & dim_exists, other=0.0)
    elif BOUNDED:
        tile = tl.load(pointers, mask=token_exists, other=0.0)
    elif PADDED:
        tile = tl.load(pointers, mask=dim_exists, other=0.0)
    else:
        tile = tl.load(pointers)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile
