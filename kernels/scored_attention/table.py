"""A table of streams as the kernels read it: what `streams.entries` tells."""
import triton
import triton.language as tl

from .streams import FIELDS

_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def find_keys(TABLE, stream, kv_head, K, V):
    """Where a stream's keys and values of one KV head begin, and how many there are; K and V are where offsets count from.

    An address as a number would do, but the compiler knows nothing of its alignment and loads element by element.
    """
    entry = TABLE + stream * _FIELDS
    head = kv_head * tl.multiple_of(tl.load(entry + 3), 16)
    K += tl.multiple_of(tl.load(entry), 16) + head
    V += tl.multiple_of(tl.load(entry + 1), 16) + head
    return K, V, tl.load(entry + 5).to(tl.int32)


@triton.jit
def find_mass(TABLE, stream, kv_head, MASS):
    """Where the importances of a stream's KV head begin."""
    entry = TABLE + stream * _FIELDS
    return tl.load(entry + 2).to(MASS.dtype) + kv_head * tl.load(entry + 4)


@triton.jit
def find_queries(TABLE, stream):
    """How many queries stand before a stream's own in its row of the batch, and how many those are."""
    entry = TABLE + stream * _FIELDS
    return tl.load(entry + 6).to(tl.int32), tl.load(entry + 7).to(tl.int32)
