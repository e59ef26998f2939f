"""Pass 2: the softmax mass that each key received, summed over the frame's queries and the query heads of its KV group.

Scores are computed again from Q and K, which costs less than to write them in pass 1 and read them here. Keys stand on the
outer grid axis, so each program owns its keys and sums without atomics.
"""
import triton
import triton.language as tl

from .table import find_keys, find_mass, find_queries
from .tiles import load_tile


@triton.jit
def _receive(mass, k, key, Q, LSE, begin, end, rows, past, q_head, q_row, scale_log2,
             GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, ROWS: tl.constexpr,
             MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Add what rows [begin, end) pay to the keys of the tile `k` [keys, head_dim]."""
    dim = tl.arange(0, HEAD_BLOCK)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        query, member = row // GROUP, row % GROUP
        q = load_tile(Q + (query * q_row + member * q_head)[None, :] + dim[:, None], row[None, :] < rows,
                      dim[:, None] < HEAD_DIM, True, HEAD_DIM < HEAD_BLOCK, UPCAST)
        # A row that does not exist pays nothing: exp2(0 - inf) = 0.
        lse = tl.load(LSE + row, mask=row < rows, other=float('inf'))
        paid = tl.exp2(tl.dot(k, q, input_precision=PRECISION) * scale_log2 - lse[None, :])
        if MASKED:
            paid = tl.where(key[:, None] <= past + query[None, :], paid, 0.0)
        mass += tl.sum(paid, 1)
    return mass


@triton.jit(do_not_specialize=['queries', 'keys'])
def mass_kernel(Q, K, LSE, MASS, TABLE, scale_log2, queries, keys, kv_heads, q_batch, q_head, q_row, k_batch, k_head, k_row,
                m_batch, m_head, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr,
                ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """MASS [batch, kv_heads, keys] from Q, K and the log-sum-exp of pass 1; grid (key tiles, batch x KV heads). With a TABLE
    keys and masses lie where that says; see `forward_kernel`."""
    first_key = tl.program_id(0) * KEYS
    head = tl.program_id(1)
    batch, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    all_rows = queries * GROUP
    if TABLE is None:
        K += batch * k_batch + kv_head * k_head
        MASS += batch * m_batch + kv_head * m_head
    else:
        K, _, keys = find_keys(TABLE, batch, kv_head, K, K)
        MASS = find_mass(TABLE, batch, kv_head, MASS)
        skipped, queries = find_queries(TABLE, batch)
        Q += skipped * q_row
        LSE += skipped * GROUP
    rows = queries * GROUP
    past = keys - queries
    key = first_key + tl.arange(0, KEYS)
    dim = tl.arange(0, HEAD_BLOCK)
    k = load_tile(K + key[:, None] * k_row + dim[None, :], key[:, None] < keys, dim[None, :] < HEAD_DIM,
                  True, HEAD_DIM < HEAD_BLOCK, UPCAST)

    # Rows before `any_from` see none of these keys, rows from `all_from` on see all of them.
    any_from = tl.maximum(first_key - past, 0) * GROUP // ROWS * ROWS
    all_from = tl.minimum(tl.cdiv(tl.maximum(first_key + KEYS - 1 - past, 0) * GROUP, ROWS) * ROWS, rows)
    Q += batch * q_batch + kv_head * GROUP * q_head
    LSE += head.to(tl.int64) * all_rows
    mass = tl.zeros((KEYS,), tl.float32)
    mass = _receive(mass, k, key, Q, LSE, any_from, all_from, rows, past, q_head, q_row, scale_log2,
                    GROUP, HEAD_DIM, HEAD_BLOCK, ROWS, True, PRECISION, UPCAST)
    mass = _receive(mass, k, key, Q, LSE, all_from, rows, rows, past, q_head, q_row, scale_log2,
                    GROUP, HEAD_DIM, HEAD_BLOCK, ROWS, False, PRECISION, UPCAST)
    tl.store(MASS + key, mass, mask=key < keys)
