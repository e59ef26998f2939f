"""Flash attention over the pages of one split: output, log-sum-exp, and each page's noted part of it.

The query heads of a KV head are rows of one tile, so each page is loaded once per KV head and tile of rows. Packed keys become
numbers, get their bias and are rotated in registers: nothing of a page is ever written in more bits than it has. Keys that turn
are loaded in halves, for dimension i turns with dimension i + head_dim / 2; put together these lie side by side, as they
then do in the query. (It also keeps the compiler from computing a rotation in the layout of the product's operand, where a
thread has four times as many dimensions to keep scales and frequencies of: more than it has registers.)
"""
import triton
import triton.language as tl

from .turning import turned

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load(pointers, exists, BYTES: tl.constexpr, BITS: tl.constexpr):
    """[keys, dims] of the pool's rows: its own numbers, or codes; of 4 bits, BYTES is half of the dims."""
    loaded = tl.load(pointers, mask=exists, other=0)
    if BITS == 4:
        loaded = tl.reshape(tl.join(loaded & 15, loaded >> 4), (loaded.shape[0], 2 * BYTES))
    return loaded


@triton.jit
def _load_turned(K, KEY_SCALE, KEY_ZERO, BIAS, POSITIONS, FREQUENCIES, STREAM, AXES, row, exists, move, here,
                 k_row, s_entry, p_axis, HALF_DIM: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, MOVED: tl.constexpr):
    """Keys [keys, 2 * HALF] of a tile, turned, fp32: dimension 2i is the model's i, 2i + 1 the one that it turns with.

    `s_entry` is where the page's scale and zero begin.
    """
    dim = tl.arange(0, HALF)
    dim_exists = dim < HALF_DIM
    at = dim + here
    BYTES: tl.constexpr = HALF // 2 if BITS == 4 else HALF
    HALF_BYTES: tl.constexpr = HALF_DIM // 2 if BITS == 4 else HALF_DIM
    byte = tl.max_contiguous(tl.arange(0, BYTES), 4) if BITS < 16 else tl.arange(0, BYTES)
    there = exists[:, None] & (byte < HALF_BYTES)[None, :]
    pointers = K + row[:, None] * k_row + byte[None, :]
    first, second = _load(pointers, there, BYTES, BITS), _load(pointers + HALF_BYTES, there, BYTES, BITS)
    if BITS < 16:
        # Angles first: the other way round, 4 bits take more registers than sm_100 has.
        axis = tl.load(AXES + at, mask=dim_exists, other=0)
        position = tl.load(POSITIONS + axis[None, :] * p_axis + row[:, None], mask=exists[:, None], other=0)
        frequency = tl.load(FREQUENCIES + at, mask=dim_exists, other=0.0)
        if MOVED:
            # Whole numbers are added, so that a page hours away that is read from close by loses nothing to fp32.
            advances = tl.load(STREAM + at, mask=dim_exists, other=0.0) != 0.0
            position += tl.where(advances, move, 0)[None, :]
        scale, zero, bias = KEY_SCALE + s_entry + dim, KEY_ZERO + s_entry + dim, BIAS
        first_zero = tl.load(zero, mask=dim_exists, other=0.0).to(tl.float32)
        second_zero = tl.load(zero + HALF_DIM, mask=dim_exists, other=0.0).to(tl.float32)
        if BIAS is not None:
            first_zero += tl.load(BIAS + at, mask=dim_exists, other=0.0)
            second_zero += tl.load(BIAS + HALF_DIM + at, mask=dim_exists, other=0.0)
        first_scale = tl.load(scale, mask=dim_exists, other=0.0).to(tl.float32)
        second_scale = tl.load(scale + HALF_DIM, mask=dim_exists, other=0.0).to(tl.float32)
        first = first.to(tl.float32) * first_scale[None, :] + first_zero[None, :]
        second = second.to(tl.float32) * second_scale[None, :] + second_zero[None, :]
        first, second = turned(first, second, position.to(tl.float32) * frequency[None, :])
    else:
        angle = move.to(tl.float32) * tl.load(STREAM + at, mask=dim_exists, other=0.0)
        first, second = turned(first.to(tl.float32), second.to(tl.float32), angle[None, :])
    return tl.reshape(tl.join(first, second), (first.shape[0], 2 * HALF))


@triton.jit
def _load_values(V, VALUE_SCALE, VALUE_ZERO, row, exists, v_row, s_entry, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr,
                 BITS: tl.constexpr):
    """Values [keys, HEAD_BLOCK] of a tile; fp32 where they were packed."""
    BYTES: tl.constexpr = HEAD_BLOCK // 2 if BITS == 4 else HEAD_BLOCK
    ALL_BYTES: tl.constexpr = HEAD_DIM // 2 if BITS == 4 else HEAD_DIM
    byte = tl.max_contiguous(tl.arange(0, BYTES), 4) if BITS < 16 else tl.arange(0, BYTES)
    values = _load(V + row[:, None] * v_row + byte[None, :], exists[:, None] & (byte < ALL_BYTES)[None, :], BYTES, BITS)
    if BITS < 16:
        dim = tl.arange(0, HEAD_BLOCK)
        scale = tl.load(VALUE_SCALE + s_entry + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        zero = tl.load(VALUE_ZERO + s_entry + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        values = values.to(tl.float32) * scale[None, :] + zero[None, :]
    return values


# Numbers that change from token to token are not specialised, nor are pointers into the middle of a tensor: an answer would
# compile anew whenever one is a multiple of 16.
@triton.jit(do_not_specialize=['STARTS', 'LENGTHS', 'MOVES', 'ENTRIES', 'LSE', 'PAGE_LSE', 'rows', 'pages', 'pages_per_split',
                               't_head', 'l_row', 'tokens', 'new', 'p_axis', 'WHERE'])
def forward_kernel(Q, K, V, KEY_SCALE, KEY_ZERO, VALUE_SCALE, VALUE_ZERO, STARTS, LENGTHS, MOVES, ENTRIES, NOTED, WHERE,
                   FREQUENCIES, STREAM, AXES, POSITIONS, BIAS, O, LSE, PAGE_LSE, scale_log2, rows, pages, pages_per_split,
                   t_head, l_row, tokens, new, q_head, q_row, k_head, k_row, v_head, v_row, s_head, s_row, p_axis,
                   HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
                   BITS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """One tile of rows over one split of the pages; grid (row tiles, splits, KV heads).

    O is [splits, kv_heads, rows, head_dim], LSE [splits, kv_heads, rows]: fp32, contiguous; PAGE_LSE [kv_heads, rows, pages]
    fp32, rows `l_row` apart; logarithms are natural. Tables have a row for each KV head, `t_head` apart. Pointers of what a call
    has not are None; BITS is 16 for a raw pool of whatever dtype.

    Without STARTS the pool is `tokens` tokens side by side, in pages of KEYS; the rows are of `new` tokens, which lie at WHERE
    [new] int64, and each sees none that comes after it. PAGE_LSE is then of tokens.
    """
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    TURNED: tl.constexpr = BITS < 16 or MOVES is not None
    DOT: tl.constexpr = tl.float32 if UPCAST else Q.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split, heads = tl.program_id(1), tl.num_programs(2)
    # Offsets across heads and splits can pass 2**31; those of the rows of one head are checked by the launcher.
    head = tl.program_id(2).to(tl.int64)
    dim, token = tl.arange(0, HEAD_BLOCK), tl.arange(0, KEYS)
    dim_exists = dim < HEAD_DIM
    if TURNED:
        asked, asked_exists = dim % 2 * HALF_DIM + dim // 2, dim // 2 < HALF_DIM
    else:
        asked, asked_exists = dim, dim_exists
    query = tl.load(Q + head * q_head + row[:, None] * q_row + asked[None, :],
                    mask=(row < rows)[:, None] & asked_exists[None, :], other=0.0).to(DOT)
    K += head * k_head
    V += head * v_head
    if BIAS is not None:
        BIAS += head * HEAD_DIM
    last = tl.zeros((ROWS,), tl.int32)
    if WHERE is not None:
        last = tl.load(WHERE + row % new).to(tl.int32)
    there = tl.max(last, 0)

    accumulator = tl.zeros((ROWS, HEAD_BLOCK), tl.float32)
    # Finite, so that a row without a key yet gives weights of 0 rather than NaN.
    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for page in range(split * pages_per_split, tl.minimum((split + 1) * pages_per_split, pages)):
        at = head * t_head + page
        if STARTS is None:
            start = page * KEYS
            length = tl.minimum(tokens - start, KEYS)
        else:
            length = tl.load(LENGTHS + at)
            start = tl.load(STARTS + at)
        move, s_entry = 0, head
        # An entry that is not used may say anything.
        if MOVES is not None:
            move = tl.where(length > 0, tl.load(MOVES + at), 0)
        if BITS < 16:
            s_entry = head * s_head + tl.where(length > 0, tl.load(ENTRIES + at), 0).to(tl.int64) * s_row
        noted_total = tl.zeros((ROWS,), tl.float32)
        for begin in range(0, length, KEYS):
            exists = begin + token < length
            if WHERE is not None:       # what nobody sees need not have been written
                exists &= start + token <= there
            # Always 0, but not to the compiler: what depends on it is loaded where it is used, once a tile, rather than kept in
            # registers from the page's beginning, which are too few.
            here = tl.minimum(begin, 0)
            # A token of the page itself stands for those that it has not.
            pool_row = start + tl.minimum(begin + token, length - 1)
            if TURNED:
                keys = _load_turned(K, KEY_SCALE, KEY_ZERO, BIAS, POSITIONS, FREQUENCIES, STREAM, AXES, pool_row, exists,
                                    move, here, k_row, s_entry + here, p_axis, HALF_DIM, HEAD_BLOCK // 2, BITS,
                                    MOVES is not None)
            else:
                keys = tl.load(K + pool_row[:, None] * k_row + dim[None, :], mask=exists[:, None] & dim_exists[None, :],
                               other=0.0)
            scores = tl.dot(query, tl.trans(keys.to(DOT)), input_precision=PRECISION)
            scores = tl.where(exists[None, :], scores, float('-inf'))
            if STARTS is None:
                if WHERE is not None:
                    scores = tl.where(pool_row[None, :] <= last[:, None], scores, float('-inf'))
                if PAGE_LSE is not None:
                    tl.store(PAGE_LSE + (head * rows + row)[:, None] * l_row + (start + token)[None, :],
                             scores * (scale_log2 * LN2), mask=(row < rows)[:, None] & (token < length)[None, :])
            larger = tl.maximum(largest, tl.max(scores, 1))
            weight = tl.exp2(scores * scale_log2 - (larger * scale_log2)[:, None])
            fade = tl.exp2((largest - larger) * scale_log2)
            total = total * fade + tl.sum(weight, 1)
            if NOTED is not None:
                noted = tl.load(NOTED + pool_row) != 0
                noted_total = noted_total * fade + tl.sum(tl.where(noted[None, :], weight, 0.0), 1)
            values = _load_values(V, VALUE_SCALE, VALUE_ZERO, pool_row, exists, v_row, s_entry + here, HEAD_DIM, HEAD_BLOCK,
                                  BITS)
            accumulator = tl.dot(weight.to(DOT), values.to(DOT), accumulator * fade[:, None], input_precision=PRECISION)
            largest = larger
        if NOTED is not None:
            page_lse = tl.where(noted_total > 0, (largest * scale_log2 + tl.log2(noted_total)) * LN2, float('-inf'))
            tl.store(PAGE_LSE + (head * rows + row) * l_row + page, page_lse, mask=row < rows)

    read = total > 0
    total = tl.where(read, total, 1.0)
    lse = tl.where(read, (largest * scale_log2 + tl.log2(total)) * LN2, float('-inf'))
    part = (split * heads + head) * rows
    tl.store(O + part * HEAD_DIM + row[:, None] * HEAD_DIM + dim[None, :], accumulator / total[:, None],
             mask=(row < rows)[:, None] & dim_exists[None, :])
    tl.store(LSE + part + row, lse, mask=row < rows)


@triton.jit(do_not_specialize=['all_rows', 'splits'])
def combine_kernel(PARTIAL, PARTIAL_LSE, O, LSE, all_rows, splits, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr,
                   ROWS: tl.constexpr):
    """Put the splits together, each weighted by its share of the softmax; rows of all heads in one; grid (row tiles)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    dim = tl.arange(0, HEAD_BLOCK)
    exists = (row < all_rows)[:, None] & (dim < HEAD_DIM)[None, :]
    offsets = row[:, None] * HEAD_DIM + dim[None, :]
    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    output = tl.zeros((ROWS, HEAD_BLOCK), tl.float32)
    for _ in range(splits):
        lse = tl.load(PARTIAL_LSE + row, mask=row < all_rows, other=float('-inf'))
        larger = tl.maximum(largest, lse)
        fade, weight = tl.exp2((largest - larger) / LN2), tl.exp2((lse - larger) / LN2)
        output = output * fade[:, None] + weight[:, None] * tl.load(PARTIAL + offsets, mask=exists, other=0.0)
        total = total * fade + weight
        largest = larger
        PARTIAL_LSE += all_rows
        PARTIAL += all_rows.to(tl.int64) * HEAD_DIM
    read = total > 0
    total = tl.where(read, total, 1.0)
    tl.store(O + offsets, output / total[:, None], mask=exists)
    tl.store(LSE + row, tl.where(read, largest + tl.log2(total) * LN2, float('-inf')), mask=row < all_rows)


@triton.jit(do_not_specialize=['rows', 'columns'])
def mass_kernel(PAGE_LSE, LSE, MASS, rows, columns, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """What all rows together give to each column of PAGE_LSE [kv_heads, rows, columns], with the logarithms LSE [kv_heads, rows]
    of all that they read: MASS [kv_heads, columns]; grid (column tiles, KV heads)."""
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    mass = tl.zeros((KEYS,), tl.float32)
    for begin in range(0, rows, ROWS):
        row = begin + tl.arange(0, ROWS)
        lse = tl.load(LSE + head * rows + row, mask=row < rows, other=0.0)
        page_lse = tl.load(PAGE_LSE + (head * rows + row)[:, None] * columns + column[None, :],
                           mask=(row < rows)[:, None] & (column < columns)[None, :], other=float('-inf'))
        mass += tl.sum(tl.exp(page_lse - lse[:, None]), 0)
    tl.store(MASS + head * columns + column, mass, mask=column < columns)
