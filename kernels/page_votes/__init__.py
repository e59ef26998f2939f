"""Which pages of its memory an answer reads: the votes that its rows have for them, and where the chosen ones lie."""
import torch

from statekv_ros.kernels.fitness import run

from .candidates import Entries, Leaves, Line, Lines
from .cpu import cpu_page_votes
from .naive import Scratch, naive_page_places, naive_page_votes
from .places import PageColumns, Places

__all__ = ['OPERATION', 'Entries', 'Leaves', 'Line', 'Lines', 'PageColumns', 'Places', 'Scratch', 'page_places', 'page_votes']
OPERATION = 'page_votes'


def page_votes(queries: torch.Tensor, entries: Entries, lines: Lines, leaves: Leaves | None = None,
               scratch: Scratch | None = None, implementation: str | None = None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Each row spreads one vote over all candidates, by the softmax of their scores: its product with a candidate's entry, and
    the logarithm of how many tokens that stands for.

    Pages of `lines` are scored one by one. Where there are leaves, those are scored as well; then the best ones of each stretch
    are opened, and their pages are scored in their place. Votes of what stays closed are lost. A page may be a candidate twice
    then: where its size is -inf, or it is a stray in its leaf, it has -1, and is not among the best even of those without votes.

    Args:
        queries: what the entries are multiplied with, for each group of candidates, [groups, kv_heads, rows, width] fp32.
        entries: of pages, at their places; contiguous.
        lines: one page at least, here or in a leaf.
        scratch: room that 'naive' uses again and again, on a CPU; None: new room.
        implementation: 'triton' (CUDA), 'cpu' (compiled when the package is installed), 'naive' (any device), or None for
            'triton' on CUDA and 'cpu' on a CPU where they run, and 'naive' elsewhere.

    Returns:
        Pages by number, [kv_heads or 1, pages] int32, opened ones first, None for all of `lines` in their order; their votes
        [kv_heads, pages] fp32, summed over rows. With 'triton', numbers are valid until the next call with the same `lines`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other, there is no candidate, or the implementation is unknown or
            cannot run here.
    """
    _check_votes(queries, entries, lines, leaves)
    return run(OPERATION, implementation, queries.device,
               lambda: _triton().triton_page_votes(queries, entries, lines, leaves),
               lambda: naive_page_votes(queries, entries, lines, leaves, scratch),
               lambda library: cpu_page_votes(library, queries, entries, lines, leaves))


def page_places(best: torch.Tensor, votes: torch.Tensor, numbers: torch.Tensor | None, first: int, table: PageColumns,
                tokens: int, implementation: str | None = None) -> list[Places]:
    """Where the best pages lie, as many as are no more than `tokens` tokens together.

    Args:
        best: which of the candidates, best first, [kv_heads, n] int64.
        votes: that they have, [kv_heads, n] fp32; one with less than 0 is not read.
        numbers: of the candidates' pages, [kv_heads or 1, candidates] int32; None: they count from `first` on.
        table: the pages that there are.
        implementation: 'triton', 'naive' or None, as of `page_votes`.

    Returns:
        Those below the device, where it has not all; those on it; and, where only some are in few bits, those that may be exact
        by themselves: these are few, so each is there, chosen or not.
    """
    if best.ndim != 2 or best.dtype != torch.int64 or tokens < 1:
        raise ValueError(f'best must be int64 [kv_heads, n] and tokens positive, got {best.dtype} {tuple(best.shape)} and '
                         f'{tokens}')
    if votes.shape != best.shape or votes.dtype != torch.float32:
        raise ValueError(f'votes must be float32 {list(best.shape)}, as many as best, got {votes.dtype} {tuple(votes.shape)}')
    arguments = best, votes, numbers, first, table, tokens
    return run(OPERATION, implementation, best.device, lambda: _triton().triton_page_places(*arguments),
               lambda: naive_page_places(*arguments))


def _triton():
    # Here rather than above: most machines without a GPU never need it, and some cannot install it.
    from . import triton
    return triton


def _check_votes(queries: torch.Tensor, entries: Entries, lines: Lines, leaves: Leaves | None) -> None:
    if queries.ndim != 4 or queries.dtype != torch.float32 or 0 in queries.shape:
        raise ValueError('queries must be float32 [groups, kv_heads, rows, width], not empty, got '
                         f'{queries.dtype} {tuple(queries.shape)}')
    kv_heads, _, width = queries.shape[1:]
    numbers = torch.float16, torch.float32
    alike = (entries.exact.dtype,)
    pools = [('entries', entries.exact, numbers, width), ('codes', entries.codes, (torch.uint8,), -(-width // 2)),
             ('entries of strays', entries.strays, alike, width), ('entries of leaves', entries.leaves, alike, width)]
    if leaves is not None:
        pools.append(('entries of leaves', leaves.entries, numbers, width))
    for name, pool, dtypes, wide in pools:
        if pool.ndim != 3 or (pool.shape[0], pool.shape[2]) != (kv_heads, wide) or pool.dtype not in dtypes:
            named = ' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)
            raise ValueError(f'{name} must be {named} [{kv_heads}, capacity, {wide}], got {pool.dtype} {tuple(pool.shape)}')
        if pool.device != queries.device:
            raise ValueError(f'{name} are on {pool.device} rather than {queries.device} like queries')
    if not lines.count and (leaves is None or not leaves.through):
        raise ValueError('there is no candidate: lines have no page, and no leaves are gone through')
