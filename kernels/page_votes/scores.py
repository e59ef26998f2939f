"""Scores of candidates: products of queries and entries, and, of each split, every row's greatest score and sum."""
import triton
import triton.language as tl


@triton.jit
def _products(Q, ENTRIES, CODES, STEPS, SCALES, LEAVES, STRAYS, place, exists, row, rows, offset, base, stop, first_leaf,
              first_stray, q_row, VOLUME: tl.constexpr, OF_LEAF: tl.constexpr, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
              ROWS: tl.constexpr, KEYS: tl.constexpr):
    """[ROWS, KEYS] fp32 of queries at Q and entries at places [KEYS] of one KV head. See `Entries`; CODES None: all are exact."""
    product = tl.zeros((ROWS, KEYS), tl.float32)
    entries, coded = ENTRIES + (place + offset).to(tl.int64) * WIDTH, exists
    if CODES is not None:
        # An entry as it lies: an exact one, a stray's, or a leaf's, which codes are added to.
        coded = exists & (place >= 0) & (place < stop)
        leaves = LEAVES + ((place - first_leaf) // OF_LEAF).to(tl.int64) * WIDTH
        strays = STRAYS + (-1 - place - first_stray).to(tl.int64) * WIDTH
        entries = tl.where(coded, leaves, tl.where(place < 0, strays, entries))
        at_code = (place - base).to(tl.int64)
        codes, steps = CODES + at_code * ((WIDTH + 1) // 2), STEPS + at_code // VOLUME * WIDTH
        scale = tl.load(SCALES + at_code // OF_LEAF, mask=coded, other=0.0)
    for begin in range(0, WIDTH, WIDTH_BLOCK):
        at = begin + tl.arange(0, WIDTH_BLOCK)
        inside = (at < WIDTH)[None, :]
        query = tl.load(Q + row[:, None] * q_row + at[None, :], mask=(row < rows)[:, None] & inside, other=0.0)
        entry = tl.load(entries[:, None] + at[None, :], mask=exists[:, None] & inside, other=0.0).to(tl.float32)
        if CODES is not None:
            there = coded[:, None] & inside
            step = tl.load(steps[:, None] + at[None, :], mask=there, other=0.0) * scale[:, None]
            pair = tl.load(codes[:, None] + (at // 2)[None, :], mask=there, other=0).to(tl.int32)
            entry += step * ((pair >> (at % 2 * 4)[None, :] & 15).to(tl.float32) - 7.5)
        product = tl.dot(query, tl.trans(entry), product, input_precision='ieee')
    return product


@triton.jit
def _put(scores, SCORES, TOPS, SUMS, split, head, heads, row, rows, column, columns, exists):
    """Write scores [ROWS, KEYS] of some columns, and what a softmax needs to know of them."""
    scores = tl.where(exists[None, :], scores, float('-inf'))
    tl.store(SCORES + (head * rows + row)[:, None] * columns + column[None, :], scores,
             mask=(row < rows)[:, None] & exists[None, :])
    # Finite, so that a row of nothing has a sum of 0 rather than NaN.
    top = tl.maximum(tl.max(scores, 1), -1e30)
    at = (split * heads + head) * rows + row
    tl.store(TOPS + at, top, mask=row < rows)
    tl.store(SUMS + at, tl.sum(tl.exp(scores - top[:, None]), 1), mask=row < rows)


# Numbers that change from token to token are not specialised, nor are pointers into the middle of a tensor: an answer would
# compile anew whenever one is a multiple of 16, or 1, as the stride of scales is until there are any.
@triton.jit(do_not_specialize=['SUMS', 'rows', 'count', 'first', 'offset', 'base', 'stop', 'column', 'columns', 'split', 'group',
                               'first_leaf', 'first_stray', 'f_head', 'p_head', 's_head', 's_page'])
def score_kernel(Q, ENTRIES, CODES, STEPS, SCALES, LEAVES, STRAYS, PLACES, GROUPS, SIZES, SCORES, TOPS, SUMS, rows, count, first,
                 offset, base, stop, first_leaf, first_stray, column, columns, split, group, q_group, q_head, q_row, e_head, c_head,
                 v_head, f_head, b_head, t_head, p_head, s_head, s_page, VOLUME: tl.constexpr, OF_LEAF: tl.constexpr,
                 WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """A tile of candidates; grid (candidate tiles, KV heads, row tiles).

    SCORES is [kv_heads, rows, columns], TOPS and SUMS [splits, kv_heads, rows], of which these are from `column` and `split` on.
    PLACES and GROUPS None: candidates lie side by side from place `first` on, in one group. `offset`, `base`, `stop`,
    `first_leaf` and `first_stray` as of `Entries`, OF_LEAF its `leaf`.
    """
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    exists = at < count
    if PLACES is None:
        place = at + first
    else:
        place = tl.load(PLACES + head * p_head + at, mask=exists, other=0)
    ENTRIES += head * e_head
    if CODES is not None:
        CODES += head * c_head
        STEPS += head * v_head
        SCALES += head * f_head
        LEAVES += head * b_head
        STRAYS += head * t_head
    if GROUPS is None:
        scores = _products(Q + group * q_group + head * q_head, ENTRIES, CODES, STEPS, SCALES, LEAVES, STRAYS, place, exists, row,
                           rows, offset, base, stop, first_leaf, first_stray, q_row, VOLUME, OF_LEAF, WIDTH, WIDTH_BLOCK, ROWS,
                           KEYS)
    else:
        own = tl.load(GROUPS + at, mask=exists, other=-1)
        scores = tl.zeros((ROWS, KEYS), tl.float32)
        oldest = tl.load(GROUPS + tl.program_id(0) * KEYS)
        for each in range(oldest, tl.max(own) + 1):     # one, as a rule
            product = _products(Q + each * q_group + head * q_head, ENTRIES, CODES, STEPS, SCALES, LEAVES, STRAYS, place, exists,
                                row, rows, offset, base, stop, first_leaf, first_stray, q_row, VOLUME, OF_LEAF, WIDTH,
                                WIDTH_BLOCK, ROWS, KEYS)
            scores = tl.where((own == each)[None, :], product, scores)
    size = tl.load(SIZES + head * s_head + at * s_page, mask=exists, other=0.0)
    _put(scores + size[None, :], SCORES, TOPS, SUMS, split + tl.program_id(0), head, heads, row, rows, column + at, columns,
         exists)


@triton.jit(do_not_specialize=['SIZES', 'SUMS', 'rows', 'opened', 'tiles', 'begin', 'first_place', 'first', 'leaves', 'offset', 'base',
                               'stop', 'first_leaf', 'first_stray', 'column', 'leaf_column', 'columns', 'split', 'leaf_split',
                               'f_head', 'n_head'])
def open_kernel(Q, ENTRIES, CODES, STEPS, SCALES, LEAVES, STRAYS, BEST, PAGES, SIZES, NUMBERS, SCORES, TOPS, SUMS, rows, opened,
                tiles, begin, first_place, first, leaves, offset, base, stop, first_leaf, first_stray, column, leaf_column, columns,
                split, leaf_split, q_head, q_row, e_head, c_head, v_head, f_head, b_head, t_head, l_head, n_head,
                VOLUME: tl.constexpr, OF_LEAF: tl.constexpr, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, LEAF: tl.constexpr,
                BEST_BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Pages of the best leaves are scored in their place; grid (`tiles` tiles of pages and some of leaves, KV heads, row tiles).

    BEST is [kv_heads, opened] int64, counted from leaf `begin`; PAGES [kv_heads, leaves, LEAF] int32, ~number of a stray; SIZES
    of pages from number `first` on. Leaves that are opened get no score any more, and their splits new sums.
    """
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    BEST += head * opened
    if tl.program_id(0) < tiles:
        at = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
        exists = at < opened * LEAF
        leaf = tl.load(BEST + at // LEAF, mask=exists, other=0) + begin
        number = tl.load(PAGES + head * l_head + leaf * LEAF + at % LEAF, mask=exists, other=0)
        stray = number < 0
        number = tl.where(stray, -1 - number, number)
        tl.store(NUMBERS + head * n_head + column + at, number, mask=exists & (tl.program_id(2) == 0))
        size = tl.load(SIZES + (number - first), mask=exists, other=0.0)
        size = tl.where(stray, float('-inf'), size)
        place = (leaf * LEAF + at % LEAF + first_place).to(tl.int32)
        scores = _products(Q + head * q_head, ENTRIES + head * e_head, CODES + head * c_head, STEPS + head * v_head,
                           SCALES + head * f_head, LEAVES + head * b_head, STRAYS + head * t_head, place, exists, row, rows, offset,
                           base, stop, first_leaf, first_stray, q_row, VOLUME, OF_LEAF, WIDTH, WIDTH_BLOCK, ROWS, KEYS)
        _put(scores + size[None, :], SCORES, TOPS, SUMS, split + tl.program_id(0), head, heads, row, rows, column + at, columns,
             exists)
    else:
        tile = tl.program_id(0) - tiles
        at = tile * KEYS + tl.arange(0, KEYS)
        exists = at < leaves
        found = tl.zeros((KEYS,), tl.int32)
        for some in range(0, opened, BEST_BLOCK):
            each = some + tl.arange(0, BEST_BLOCK)
            best = tl.load(BEST + each, mask=each < opened, other=-1)
            found += tl.sum((at[:, None] == best[None, :]).to(tl.int32), 1)
        is_open = found > 0
        scores = tl.load(SCORES + (head * rows + row)[:, None] * columns + (leaf_column + at)[None, :],
                         mask=(row < rows)[:, None] & exists[None, :], other=float('-inf'))
        _put(tl.where(is_open[None, :], float('-inf'), scores), SCORES, TOPS, SUMS, leaf_split + tile, head, heads, row, rows,
             leaf_column + at, columns, exists)
