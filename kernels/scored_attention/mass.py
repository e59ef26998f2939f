"""Pass 2: the softmax mass that each key received, summed over the frame's queries and the query heads of its KV group.

Scores are computed again from Q and K, which costs less than to write them in pass 1 and read them here. Keys stand on the
outer grid axis, so each program owns its keys and sums without atomics.

A tile of rows is as many whole queries as it has room for (with 7 heads a query, 63 rows of 64): which query and head a row is
does not change from tile to tile, and the next tile's addresses are one addition away.
"""
import triton
import triton.language as tl

from .table import find_keys, find_mass, find_queries
from .tiles import load_tile


@triton.jit
def _receive(mass, k, key, Q, LSE, first, q_offsets, queries, past, q_row, scale_log2,
             GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, ROWS: tl.constexpr,
             MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Add what the tile of rows from query `first` on pays to the keys of the tile `k` [keys, head_dim]."""
    row, dim = tl.arange(0, ROWS), tl.arange(0, HEAD_BLOCK)
    exists = row < ROWS // GROUP * GROUP
    if MASKED:
        exists = exists & (row < (queries - first) * GROUP)
    q = load_tile(Q + first * q_row + q_offsets, exists[None, :], dim[:, None] < HEAD_DIM, MASKED, HEAD_DIM < HEAD_BLOCK, UPCAST)
    # A row that does not exist pays nothing: exp2(0 - inf) = 0.
    if MASKED or ROWS % GROUP > 0:
        lse = tl.load(LSE + first * GROUP + row, mask=exists, other=float('inf'))
    else:
        lse = tl.load(LSE + first * GROUP + row)
    # Turned around at the end, which costs nothing there; a loaded number would be negated by an instruction of its own.
    paid = tl.exp2((lse[None, :] - tl.dot(k, q, input_precision=PRECISION) * scale_log2) * -1.0)
    if MASKED:
        # Query first + row // GROUP sees the keys up to past + itself: said without a division for each row.
        paid = tl.where(((key - past - first) * GROUP)[:, None] <= row[None, :], paid, 0.0)
    return mass + tl.sum(paid, 1)


@triton.jit(do_not_specialize=['queries', 'keys'])
def mass_kernel(Q, K, LSE, MASS, TABLE, scale_log2, queries, keys, kv_heads, q_batch, q_head, q_row, k_batch, k_head, k_row,
                m_batch, m_head, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr,
                ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """MASS [batch, kv_heads, keys] from Q, K and the log-sum-exp of pass 1; grid (key tiles, batch x KV heads); ROWS >= GROUP.
    With a TABLE keys and masses lie where that says; see `forward_kernel`."""
    first_key = tl.program_id(0) * KEYS
    head = tl.program_id(1)
    batch, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    LSE += head.to(tl.int64) * queries * GROUP
    if TABLE is None:
        K += batch * k_batch + kv_head * k_head
        MASS += batch * m_batch + kv_head * m_head
    else:
        K, _, keys = find_keys(TABLE, batch, kv_head, K, K)
        MASS = find_mass(TABLE, batch, kv_head, MASS)
        skipped, queries = find_queries(TABLE, batch)
        Q += skipped * q_row
        LSE += skipped * GROUP
    past = keys - queries
    key = first_key + tl.arange(0, KEYS)
    dim = tl.arange(0, HEAD_BLOCK)
    k = load_tile(K + key[:, None] * k_row + dim[None, :], key[:, None] < keys, dim[None, :] < HEAD_DIM,
                  True, HEAD_DIM < HEAD_BLOCK, UPCAST)

    QUERIES: tl.constexpr = ROWS // GROUP
    # Rows past the tile's whole queries repeat its last one, so that none lies outside of Q.
    row = tl.minimum(tl.arange(0, ROWS), QUERIES * GROUP - 1)
    q_offsets = (row // GROUP * q_row + row % GROUP * q_head)[None, :] + dim[:, None]
    Q += batch * q_batch + kv_head * GROUP * q_head
    # Queries before `any_from` see none of these keys. From there on tiles are masked until a query sees all of them, and so
    # is a last tile that has not all its queries.
    any_from = tl.maximum(first_key - past, 0)
    masked = tl.cdiv(tl.maximum(tl.minimum(first_key + KEYS - 1 - past, queries) - any_from, 0), QUERIES)
    all_from = any_from + masked * QUERIES
    all_to = all_from + tl.maximum(queries - all_from, 0) // QUERIES * QUERIES
    mass = tl.zeros((KEYS,), tl.float32)
    for tile in range(masked + (all_to < queries).to(tl.int32)):
        mass = _receive(mass, k, key, Q, LSE, tl.where(tile < masked, any_from + tile * QUERIES, all_to), q_offsets, queries,
                        past, q_row, scale_log2, GROUP, HEAD_DIM, HEAD_BLOCK, ROWS, True, PRECISION, UPCAST)
    for first in range(all_from, all_to, QUERIES):
        mass = _receive(mass, k, key, Q, LSE, first, q_offsets, queries, past, q_row, scale_log2,
                        GROUP, HEAD_DIM, HEAD_BLOCK, ROWS, False, PRECISION, UPCAST)
    tl.store(MASS + key, mass, mask=key < keys)
