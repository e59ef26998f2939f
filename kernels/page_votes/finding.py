"""Where chosen pages lie, for all pools in one launch."""
import triton
import triton.language as tl


@triton.jit(do_not_specialize=['chosen', 'exact', 'tokens', 'first', 'offset', 'base', 'near', 'stop', 'n_head', 'c_row',
                               'width'])
def places_kernel(BEST, VOTES, NUMBERS, COLUMNS, MOVES, UNWANTED, BOUNDARY, FOUND, PLACED, chosen, exact, tokens, first, offset,
                  base, near, stop, n_head, c_row, width, SPLIT: tl.constexpr, CHOSEN: tl.constexpr):
    """All pages of a KV head, some at a time; grid (KV heads). See `naive_page_places`.

    COLUMNS is [3 or more, capacity], `c_row` apart. FOUND [kv_heads, width] int64 gets the numbers, PLACED [5, kv_heads,
    width] int32 starts, lengths, slots, moves and lengths of what is below the device: `chosen` pages, then, where SPLIT, the
    last `exact` ones, of which those before BOUNDARY are in few bits like the others.
    """
    head, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    FOUND += head * width
    PLACED += head * width
    field = heads.to(tl.int64) * width
    LENGTHS = PLACED + field + chosen
    first_exact = stop - exact
    if SPLIT:
        for begin in range(0, exact, CHOSEN):
            at = begin + tl.arange(0, CHOSEN)
            exists = at < exact
            page = at.to(tl.int64) + first_exact
            tl.store(FOUND + chosen + at, page, mask=exists)
            tl.store(PLACED + chosen + at, tl.load(COLUMNS + page + offset, mask=exists, other=0), mask=exists)
            tl.store(LENGTHS + at, tl.zeros((CHOSEN,), tl.int32), mask=exists)
            if MOVES is not None:
                move = tl.load(MOVES + (page - base), mask=exists, other=0)
                tl.store(PLACED + 3 * field + chosen + at, move, mask=exists)
        tl.debug_barrier()      # before lengths of those that are chosen are written over the zeros
    total = tl.full((), 0, tl.int32)
    for begin in range(0, chosen, CHOSEN):
        at = begin + tl.arange(0, CHOSEN)
        exists = at < chosen
        best = tl.load(BEST + head * chosen + at, mask=exists, other=0)
        elsewhere = tl.load(VOTES + head * chosen + at, mask=exists, other=0.0) < 0
        if NUMBERS is None:
            page = best + first
        else:
            page = tl.load(NUMBERS + head * n_head + best, mask=exists, other=0).to(tl.int64)
        page = tl.where(elsewhere, first, page)
        length = tl.load(COLUMNS + c_row + page + offset, mask=exists, other=0)
        length = tl.where(elsewhere, 0, length)
        up_to = total + tl.cumsum(length, 0)
        total += tl.sum(length, 0)
        length = tl.where(up_to > tokens, 0, length)
        if UNWANTED is not None:
            length = tl.where(tl.load(UNWANTED + (page - base), mask=exists, other=1) != 0, 0, length)
        below = tl.where(page < near, length, 0)
        length -= below
        if SPLIT:
            in_few_bits = page < tl.load(BOUNDARY)
            own = exists & (length > 0) & ~in_few_bits & (page >= first_exact)
            tl.store(LENGTHS + (page - first_exact), length, mask=own)
            length = tl.where(in_few_bits, length, 0)
        tl.store(FOUND + at, page, mask=exists)
        tl.store(PLACED + at, tl.load(COLUMNS + page + offset, mask=exists, other=0), mask=exists)
        tl.store(PLACED + field + at, length, mask=exists)
        slot = tl.load(COLUMNS + 2 * c_row.to(tl.int64) + page + offset, mask=exists, other=0)
        tl.store(PLACED + 2 * field + at, slot, mask=exists)
        if MOVES is not None:
            tl.store(PLACED + 3 * field + at, tl.load(MOVES + (page - base), mask=exists, other=0), mask=exists)
        tl.store(PLACED + 4 * field + at, below, mask=exists)
