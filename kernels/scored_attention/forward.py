"""Pass 1: prefix-causal flash attention of a frame step, with the log-sum-exp of each row.

A row is one query of one query head. The query heads of a KV group are packed into the rows of one tile (row = query x
group + member), so each tile of keys and values is loaded once per KV head rather than once per query head.

A row's weights are powers of 2 relative to its reference, which is its largest score among the first keys: nothing that is
summed has to be rescaled, because later scores may be larger by as much as a sum has room. Where one is larger still (44 in
natural units; 10 in fp16), the program goes over its keys again for the largest score of all, and once more to sum.
"""
import triton
import triton.language as tl

from .table import find_keys, find_queries
from .tiles import load_tile


@triton.jit
def _attend(q, accumulator, reference, total, K, V, last_key, begin, end, lead, keys, k_row, v_row, scale_log2,
            HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
            PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Go on with the sums of a tile of rows over keys [begin, end); only the frame's keys need MASKED.

    Tiles that begin before key `lead` raise the references to their largest scores.
    """
    dim = tl.arange(0, HEAD_BLOCK)
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        k = load_tile(K + key[None, :] * k_row + dim[:, None], key[None, :] < keys, dim[:, None] < HEAD_DIM,
                      MASKED, HEAD_DIM < HEAD_BLOCK, UPCAST)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if MASKED:
            scores = tl.where(key[None, :] <= last_key[:, None], scores, float('-inf'))
        if first < lead:
            reference = tl.maximum(reference, tl.max(scores, 1) * scale_log2)
        weight = tl.exp2(scores * scale_log2 - reference[:, None])
        total += tl.sum(weight, 1)
        v = load_tile(V + key[:, None] * v_row + dim[None, :], key[:, None] < keys, dim[None, :] < HEAD_DIM,
                      MASKED, HEAD_DIM < HEAD_BLOCK, False)
        weight = weight.to(v.dtype)
        if UPCAST:
            weight, v = weight.to(tl.float32), v.to(tl.float32)
        accumulator = tl.dot(weight, v, accumulator, input_precision=PRECISION)
    return accumulator, reference, total


# Numbers that change from step to step are not specialised: a stream would compile anew whenever one is a multiple of 16.
@triton.jit(do_not_specialize=['queries', 'keys', 'keys_per_split'])
def forward_kernel(Q, K, V, O, LSE, TABLE, scale_log2, queries, keys, keys_per_split, kv_heads,
                   q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_split, o_batch, o_head, o_row,
                   GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, ROWS: tl.constexpr,
                   KEYS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Output and base-2 log-sum-exp of one tile of rows over one split of the keys.

    The grid is (row tiles, splits, batch x KV heads). O is [splits, batch, q_heads, queries, head_dim] by its strides, LSE
    [splits, batch, kv_heads, rows]. A row that sees no key of its split gets output 0 and log-sum-exp -inf.

    With a TABLE, each entry of the batch is a stream whose keys and values lie where that says; `keys` are then those of the
    longest. Rows that are not its own are left alone.
    """
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    head = tl.program_id(2)
    # Offsets across batch, heads and splits can pass 2**31; those of the tokens of one head are checked by the launcher.
    batch, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    all_rows = queries * GROUP
    if TABLE is None:
        K += batch * k_batch + kv_head * k_head
        V += batch * v_batch + kv_head * v_head
    else:
        K, V, keys = find_keys(TABLE, batch, kv_head, K, V)
        skipped, queries = find_queries(TABLE, batch)
        Q += skipped * q_row
        O += skipped * o_row
        LSE += skipped * GROUP
    rows = queries * GROUP
    row = first_row + tl.arange(0, ROWS)
    query, member = row // GROUP, row % GROUP
    dim = tl.arange(0, HEAD_BLOCK)
    row_exists = (row < rows)[:, None]
    q_offsets = batch * q_batch + kv_head * GROUP * q_head + (query * q_row + member * q_head)[:, None] + dim[None, :]
    q = load_tile(Q + q_offsets, row_exists, dim[None, :] < HEAD_DIM, True, HEAD_DIM < HEAD_BLOCK, UPCAST)

    # Every row sees the whole state; the tile's first row sees the fewest keys of the frame, its last row the most.
    past = keys - queries
    seen_by_all = past + first_row // GROUP + 1
    seen_by_any = past + tl.minimum(first_row + ROWS - 1, rows - 1) // GROUP + 1
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, seen_by_any)
    unmasked = tl.maximum(tl.minimum(end, seen_by_all) - begin, 0) // KEYS * KEYS

    last_key = past + query
    accumulator, total = tl.zeros((ROWS, HEAD_BLOCK), tl.float32), tl.zeros((ROWS,), tl.float32)
    # Finite, so that a row without a key gives weights of 0 rather than NaN.
    reference = tl.full((ROWS,), -1e30, tl.float32)
    # Of a row's weights, so that each fits into its dtype, and their sums with values into fp32.
    LARGEST_TOTAL: tl.constexpr = 2.0**15 if V.dtype.element_ty == tl.float16 else 2.0**64
    attempt = 0
    while attempt < 3:
        # First the first tile leads; in a second attempt all do, which finds each row's largest score; in a third none does.
        lead = tl.where(attempt == 0, begin + 1, tl.where(attempt == 1, end, begin))
        # Always 0, but not to the compiler: it would keep the addresses of both loops in registers throughout.
        here = tl.minimum(lead - begin, 0) * 16
        accumulator, total = tl.zeros((ROWS, HEAD_BLOCK), tl.float32), tl.zeros((ROWS,), tl.float32)
        accumulator, reference, total = _attend(
            q, accumulator, reference, total, K, V, last_key, begin, begin + unmasked, lead, keys, k_row + here, v_row + here,
            scale_log2, HEAD_DIM, HEAD_BLOCK, KEYS, False, PRECISION, UPCAST)
        accumulator, reference, total = _attend(
            q, accumulator, reference, total, K, V, last_key, begin + unmasked, end, lead, keys, k_row + here, v_row + here,
            scale_log2, HEAD_DIM, HEAD_BLOCK, KEYS, True, PRECISION, UPCAST)
        attempt = tl.where((attempt > 0) | (tl.max(total) > LARGEST_TOTAL), attempt + 1, 3)

    sees_a_key = total > 0
    total = tl.where(sees_a_key, total, 1.0)
    output = accumulator / total[:, None]
    lse = tl.where(sees_a_key, reference + tl.log2(total), float('-inf'))
    o_offsets = (split.to(tl.int64) * o_split + batch * o_batch + kv_head * GROUP * o_head
                 + (query * o_row + member * o_head)[:, None] + dim[None, :])
    tl.store(O + o_offsets, output.to(O.dtype.element_ty), mask=row_exists & (dim[None, :] < HEAD_DIM))
    tl.store(LSE + (split * tl.num_programs(2) + head).to(tl.int64) * all_rows + row, lse, mask=row < rows)


@triton.jit(do_not_specialize=['queries', 'splits'])
def combine_kernel(PARTIAL, PARTIAL_LSE, O, LSE, TABLE, queries, splits, kv_heads,
                   p_split, p_batch, p_head, p_row, o_batch, o_head, o_row,
                   GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Put the splits together, each weighted by its share of the softmax; grid (row tiles, batch x KV heads)."""
    head = tl.program_id(1)
    batch, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    all_rows = queries * GROUP
    if TABLE is not None:
        skipped, queries = find_queries(TABLE, batch)
        PARTIAL += skipped * p_row
        PARTIAL_LSE += skipped * GROUP
        O += skipped * o_row
        LSE += skipped * GROUP
    rows = queries * GROUP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query, member = row // GROUP, row % GROUP
    dim = tl.arange(0, HEAD_BLOCK)
    exists = (row < rows)[:, None] & (dim[None, :] < HEAD_DIM)

    partial_lse = PARTIAL_LSE + head.to(tl.int64) * all_rows + row
    partial = (PARTIAL + batch * p_batch + kv_head * GROUP * p_head
               + (query * p_row + member * p_head)[:, None] + dim[None, :])
    # The first split holds key 0, which every row sees: the running maximum is finite from the start.
    largest = tl.load(partial_lse, mask=row < rows, other=0.0)
    total = tl.full((ROWS,), 1.0, tl.float32)
    output = tl.load(partial, mask=exists, other=0.0)
    for _ in range(1, splits):
        partial_lse += tl.num_programs(1).to(tl.int64) * all_rows
        partial += p_split
        lse = tl.load(partial_lse, mask=row < rows, other=0.0)
        larger = tl.maximum(largest, lse)
        fade, weight = tl.exp2(largest - larger), tl.exp2(lse - larger)
        output = output * fade[:, None] + weight[:, None] * tl.load(partial, mask=exists, other=0.0)
        total = total * fade + weight
        largest = larger
    o_offsets = batch * o_batch + kv_head * GROUP * o_head + (query * o_row + member * o_head)[:, None] + dim[None, :]
    tl.store(O + o_offsets, (output / total[:, None]).to(O.dtype.element_ty), mask=exists)
    tl.store(LSE + head.to(tl.int64) * all_rows + row, largest + tl.log2(total), mask=row < rows)
