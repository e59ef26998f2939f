"""The frames' keys and values to where their streams' states have room for them, one launch for all."""
import triton
import triton.language as tl

from .table import find_keys, find_queries
from .tiles import load_tile


@triton.jit(do_not_specialize=['tokens'])
def put_kernel(K, V, TABLE, HERE, tokens, kv_heads, k_batch, k_head, k_row, v_batch, v_head, v_row,
               HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """K and V [streams, kv_heads, tokens, head_dim]; HERE: where the table's offsets count from; grid (token tiles, streams x KV
    heads). Rows of a state are HEAD_DIM apart."""
    head = tl.program_id(1)
    stream, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    to_key, to_value, keys = find_keys(TABLE, stream, kv_head, HERE, HERE)
    skipped, own = find_queries(TABLE, stream)
    token, dim = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HEAD_BLOCK)
    exists, dim_exists = (token < own)[:, None], dim[None, :] < HEAD_DIM
    K += stream * k_batch + kv_head * k_head + skipped * k_row
    V += stream * v_batch + kv_head * v_head + skipped * v_row
    to = (keys - own + token)[:, None] * HEAD_DIM + dim[None, :]
    key = load_tile(K + token[:, None] * k_row + dim[None, :], exists, dim_exists, True, HEAD_DIM < HEAD_BLOCK, False)
    value = load_tile(V + token[:, None] * v_row + dim[None, :], exists, dim_exists, True, HEAD_DIM < HEAD_BLOCK, False)
    tl.store(to_key + to, key, mask=exists & dim_exists)
    tl.store(to_value + to, value, mask=exists & dim_exists)
