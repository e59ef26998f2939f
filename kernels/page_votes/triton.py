"""Page votes in Triton: launches the scores (scores.py), the votes (counting.py) and the places (finding.py)."""
import contextlib

import torch
import triton

from .candidates import Entries, Leaves, Lines
from .configs import BEST, CHOSEN, INTERPRETER, OPEN, PLACES, SCORE, SPLITS, VOTES, Tile, width_block
from .counting import votes_kernel
from .finding import places_kernel
from .places import PageColumns, Places
from .scores import open_kernel, score_kernel

INTERPRETED = not isinstance(score_kernel, triton.JITFunction)


def triton_page_votes(queries: torch.Tensor, entries: Entries, lines: Lines, leaves: Leaves | None,
                      tile: Tile | None = None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Arguments and results as in `page_votes`.

    Args:
        tile: of all passes; those of configs.py when None.

    Raises:
        ValueError: the device cannot run Triton, or it cannot address such tensors.
    """
    pools = entries.exact, entries.codes, entries.steps, entries.scales, entries.leaves, entries.strays
    _check(queries, *pools, *([leaves.entries, leaves.pages] if leaves else []))
    if queries.numel() >= 2**31:    # the kernel counts these in 32 bits
        raise ValueError(f'queries must have less than 2**31 numbers, got shape {tuple(queries.shape)}')
    kv_heads, rows, width = queries.shape[1:]
    score, opening, counting = (tile or (INTERPRETER if INTERPRETED else each) for each in (SCORE, OPEN, VOTES))
    through = leaves.through if leaves else ()
    leaf = leaves.pages.shape[2] if leaves else 1
    opened = leaves.opened * leaf if leaves else 0          # pages of each stretch
    # Columns: pages that are opened, lines, leaves; splits are of one of these each.
    counts = [*([opened] * len(through)), lines.count, *(part.stop - part.start for _, part in through)]
    tiles = [triton.cdiv(count, score.keys) for count in counts]
    column, split = _begins(counts), _begins(tiles)
    scores = torch.empty(kv_heads, rows, column[-1], dtype=torch.float32, device=queries.device)
    tops, sums = torch.empty(2, split[-1], kv_heads, rows, dtype=torch.float32, device=queries.device)
    shape = {'WIDTH': width, 'WIDTH_BLOCK': width_block(score, width), 'ROWS': score.rows,
             'KEYS': score.keys, **_options(score)}
    row_tiles, strides = triton.cdiv(rows, score.rows), queries.stride()[:3]
    places, of_heads = (entries.offset, entries.base, entries.stop, entries.first_leaf, entries.first_stray), [
        pool.stride(0) for pool in pools]
    shape |= {'VOLUME': entries.volume, 'OF_LEAF': entries.leaf}
    here = len(through)     # of lines among the counts
    begin = 0 if not through else split[here]

    def votes(first: int, count: int, twice: bool = False) -> torch.Tensor:
        found = torch.empty(kv_heads, count, dtype=torch.float32, device=queries.device)
        votes_kernel[triton.cdiv(count, counting.keys), kv_heads](
            scores, tops[begin:], sums[begin:], found, rows, count, first, column[-1], split[-1] - begin,
            TWICE=twice, ROWS=counting.rows, KEYS=counting.keys, SPLITS=SPLITS, **_options(counting))
        return found

    with _on(queries.device):
        if lines.count:
            flat = lines.flat
            score_kernel[tiles[here], kv_heads, row_tiles](
                queries, *pools, flat.places, flat.groups, flat.sizes, scores, tops, sums, rows, lines.count, 0, *places,
                column[here], column[-1], split[here], 0, *strides, *of_heads, _head_stride(flat.places),
                _head_stride(flat.sizes), 1, **shape)
        for number, (group, stretch) in enumerate(through, here + 1):
            score_kernel[tiles[number], kv_heads, row_tiles](
                queries, leaves.entries, *[None] * 7, leaves.size, scores, tops, sums, rows, counts[number],
                stretch.start, 0, 0, 0, 0, 0, column[number], column[-1], split[number], group, *strides, leaves.entries.stride(0),
                *[0] * 8, **shape | {'VOLUME': 1, 'OF_LEAF': 1})
        if not through:
            return lines.numbers, votes(0, lines.count)
        numbers, first_leaf = lines.room(kv_heads, column[here]), column[here + 1]
        shares = votes(first_leaf, column[-1] - first_leaf)
        for number, (group, stretch) in enumerate(through):
            of_leaves = here + 1 + number
            own = shares[:, column[of_leaves] - first_leaf:column[of_leaves + 1] - first_leaf]
            best = own.topk(leaves.opened, dim=-1, sorted=False).indices
            open_kernel[tiles[number] + tiles[of_leaves], kv_heads, row_tiles](
                queries[group], *pools, best, leaves.pages, leaves.sizes, numbers, scores, tops, sums, rows, leaves.opened,
                tiles[number], stretch.start, leaves.first_place, leaves.first, counts[of_leaves], *places, column[number],
                column[of_leaves], column[-1], split[number], split[of_leaves], *strides[1:], *of_heads,
                leaves.pages.stride(0), numbers.stride(0), LEAF=leaf,
                BEST_BLOCK=BEST, **shape | _options(opening))
        begin = 0
        return numbers, votes(0, first_leaf, twice=True)


def triton_page_places(best: torch.Tensor, votes: torch.Tensor, numbers: torch.Tensor | None, first: int, table: PageColumns,
                       tokens: int) -> list[Places]:
    """Arguments and results as in `page_places`.

    Raises:
        ValueError: the device cannot run Triton, or it cannot address such tensors.
    """
    _check(best, votes, table.columns, *(each for each in (numbers, table.moves, table.unwanted) if each is not None))
    kv_heads, chosen = best.shape
    near, stop, split = table.near, table.stop, table.packed and table.exact > 0
    exact = table.exact if split else 0
    pages = torch.empty(kv_heads, chosen + exact, dtype=torch.int64, device=best.device)
    placed = torch.empty(5, *pages.shape, dtype=torch.int32, device=best.device)
    best, votes = best.contiguous(), votes.contiguous()
    with _on(best.device):
        places_kernel[kv_heads,](
            best, votes, numbers, table.columns, table.moves, table.unwanted, table.boundary, pages, placed, chosen, exact, tokens,
            first, table.offset, table.base, near, stop, 0 if numbers is None else _head_stride(numbers), table.columns.stride(0),
            chosen + exact, SPLIT=split, CHOSEN=CHOSEN, **_options(PLACES))
    starts, lengths, slots, moves, below = placed
    moves = None if table.moves is None else moves

    def of(columns: slice, lengths: torch.Tensor, packed: bool, far: bool = False) -> Places:
        return Places(pages[:, columns], starts[:, columns], lengths[:, columns], None if moves is None else moves[:, columns],
                      slots[:, columns] if packed else None, far)

    own = slice(0, chosen)
    found = [of(own, below, False, far=True)] if near > first else []
    if near >= stop:
        return found
    found.append(of(own, lengths, table.packed))
    return [*found, of(slice(chosen, None), lengths, False)] if split else found


def _begins(counts: list[int]) -> list[int]:
    begins = [0]
    for count in counts:
        begins.append(begins[-1] + count)
    return begins


def _head_stride(tensor: torch.Tensor) -> int:
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


def _check(first: torch.Tensor, *others: torch.Tensor) -> None:
    if first.device.type != 'cuda' and not INTERPRETED:
        raise ValueError(f"implementation 'triton' needs tensors on a CUDA device, got {first.device}: use 'naive', or, for "
                         "Triton's interpreter, set TRITON_INTERPRET=1 before Python starts")
    for tensor in (first, *others):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError("implementation 'triton' needs tensors with stride 1 along their last dimension, got strides "
                             f'{tensor.stride()} of {tuple(tensor.shape)}')
        if tensor.device != first.device:
            raise ValueError(f'tensors must be on one device, got {tensor.device} beside {first.device}')


def _options(tile: Tile) -> dict:
    return {'num_warps': tile.warps, 'num_stages': tile.stages, 'maxnreg': tile.registers, 'enable_fp_fusion': True}


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    # Triton launches on the current device, which need not be the tensors'.
    return torch.cuda.device(device) if device.type == 'cuda' else contextlib.nullcontext()
