"""Votes and places in plain torch on any device: the specification of the fast kernels, and what CPUs run."""
import torch

from .candidates import Leaves, Lines
from .places import PageColumns, Places

# Numbers of the entries that a CPU makes fp32 at a time: they stay near it, and the room for them is used again and again.
_AT_A_TIME = 2**17


class Scratch:
    """Room for entries that a CPU scores, which multiplies halves slowly: a few at a time, in fp32.

    Attributes:
        leaves: that it takes at a time.
    """

    def __init__(self, kv_heads: int, width: int, leaf: int, dtype: torch.dtype):
        """width: numbers in an entry; leaf: pages in one."""
        self.leaf, self.leaves = leaf, max(1, _AT_A_TIME // (kv_heads * width * leaf))
        shape = kv_heads * self.leaves, leaf * width
        self.halves, self.floats = torch.empty(shape, dtype=dtype), torch.empty(shape)

    def pages(self, queries: torch.Tensor, entries: torch.Tensor, sizes: torch.Tensor) -> list[torch.Tensor]:
        """Scores of pages side by side, in pieces; as `_scores` takes them."""
        pieces, count, step = [], entries.shape[1], self.leaves * self.leaf
        for begin in range(0, count, step):
            piece = entries[:, begin:begin + step]
            floats = self.floats.view(-1, piece.shape[2])[:piece.shape[0] * piece.shape[1]].view(piece.shape).copy_(piece)
            pieces.append(_scores(queries, floats, sizes[..., begin:begin + step] if sizes.shape[-1] > 1 else sizes))
        return pieces

    def of_leaves(self, queries: torch.Tensor, entries: torch.Tensor, leaves: torch.Tensor,
                  sizes: torch.Tensor) -> list[torch.Tensor]:
        """Scores of the pages of some leaves, in pieces.

        Args:
            entries: by leaf, [leaves of all KV heads, pages of a leaf x width].
            leaves: which of them, [kv_heads, n] int64.
        """
        pieces = []
        for piece, of_piece in zip(leaves.split(self.leaves, dim=1), sizes.split(self.leaves * self.leaf, dim=2)):
            halves, floats = self.halves[:piece.numel()], self.floats[:piece.numel()]
            torch.index_select(entries, 0, piece.flatten(), out=halves)
            pieces.append(_scores(queries, floats.copy_(halves).view(len(leaves), -1, queries.shape[-1]), of_piece))
        return pieces


def naive_page_votes(queries: torch.Tensor, entries: torch.Tensor, offset: int, lines: Lines, leaves: Leaves | None,
                     scratch: Scratch | None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Arguments and results as in `page_votes`."""
    kv_heads, rows, width = queries.shape[1:]
    if scratch is None and queries.device.type == 'cpu':
        scratch = Scratch(kv_heads, width, leaves.pages.shape[2] if leaves else 1, entries.dtype)
    pages = scratch.pages if scratch else _at_once
    scores = []
    for line in lines:
        scores += pages(queries[line.group], _lying(entries, line.places, offset), line.sizes)
    through = leaves.through if leaves else ()
    for group, stretch in through:
        scores += pages(queries[group], leaves.entries[:, stretch], leaves.size)
    every = torch.cat(scores, dim=-1)
    if not through:
        return lines.numbers, torch.softmax(every, dim=-1).sum(dim=1)
    heads = torch.arange(kv_heads, device=entries.device)[:, None]
    of_all, leaf, by_leaf = leaves.pages.shape[1], leaves.pages.shape[2], leaves.pages.flatten(0, 1)
    entries_by_leaf, first_leaf = entries.view(-1, leaf * width), leaves.first_place // leaf
    shares, begin = torch.softmax(every, dim=-1), lines.count
    opened, numbers = [], []
    for group, stretch in through:
        end = begin + stretch.stop - stretch.start
        best = shares[..., begin:end].sum(dim=1).topk(leaves.opened, dim=-1, sorted=False).indices
        # What stays closed keeps its share: else a row that wants a bit of everything had more say in what is open.
        every[..., begin:end].scatter_(2, best[:, None].expand(-1, rows, -1), float('-inf'))
        begin = end
        found = by_leaf.index_select(0, (best + (heads * of_all + stretch.start)).flatten()).view(kv_heads, -1)
        sizes = leaves.sizes.index_select(0, (found - leaves.first).flatten()).view(kv_heads, 1, -1)
        best = best + (heads * (entries.shape[1] // leaf) + first_leaf + stretch.start)
        if scratch:
            opened += scratch.of_leaves(queries[group], entries_by_leaf, best, sizes)
        else:
            chosen = entries_by_leaf.index_select(0, best.flatten()).view(kv_heads, -1, width)
            opened += _at_once(queries[group], chosen, sizes)
        numbers.append(found)
    numbers.append(lines.numbers.expand(kv_heads, -1))
    votes = torch.softmax(torch.cat([*opened, every], dim=-1), dim=-1).sum(dim=1)
    numbers = torch.cat(numbers, dim=-1)
    return numbers, votes[:, :numbers.shape[-1]]


def naive_page_places(best: torch.Tensor, numbers: torch.Tensor | None, first: int, table: PageColumns,
                      tokens: int) -> list[Places]:
    """Arguments and results as in `page_places`."""
    heads = len(best)
    pages = best + first if numbers is None else numbers.expand(heads, -1).gather(1, best).long()
    starts, lengths, slots = table.columns[:3, pages + table.offset].unbind(0)
    lengths = lengths.masked_fill(lengths.cumsum(dim=-1) > tokens, 0)
    if table.unwanted is not None:
        lengths = lengths.masked_fill(table.unwanted[pages - table.base], 0)
    moves = None if table.moves is None else table.moves[pages - table.base]
    near, stop = table.near, table.stop
    far = []
    if near > first:
        below = lengths.masked_fill(pages >= near, 0)
        far = [Places(pages, starts, below, moves, far=True)]
        if near >= stop:
            return far
        lengths = lengths - below
    if not table.packed:
        return [*far, Places(pages, starts, lengths, moves)]
    if not table.exact:
        return [*far, Places(pages, starts, lengths, moves, slots)]
    # Few pages are exact: each is read or not, rather than found among the best.
    exact, in_few_bits = torch.arange(stop - table.exact, stop, device=pages.device), pages < table.boundary
    of_exact = lengths.masked_fill(in_few_bits, 0)[..., None]
    chosen = torch.where(pages[..., None] == exact, of_exact, 0).sum(dim=1, dtype=torch.int32)
    own = slice(stop - table.exact, stop)

    def of_all_heads(columns: torch.Tensor) -> torch.Tensor:
        return columns.expand(heads, -1)

    return [*far, Places(pages, starts, lengths.masked_fill(~in_few_bits, 0), moves, slots),
            Places(of_all_heads(exact), of_all_heads(table.columns[0, own.start + table.offset:own.stop + table.offset]), chosen,
                   None if table.moves is None else of_all_heads(table.moves[own.start - table.base:own.stop - table.base]))]


def _lying(entries: torch.Tensor, places: slice | torch.Tensor, offset: int) -> torch.Tensor:
    """Entries at some places, [kv_heads, pages, width]."""
    if isinstance(places, slice):
        return entries[:, places.start + offset:places.stop + offset]
    return entries.gather(1, (places + offset)[..., None].expand(-1, -1, entries.shape[-1]))


def _at_once(queries: torch.Tensor, entries: torch.Tensor, sizes: torch.Tensor) -> list[torch.Tensor]:
    return [_scores(queries, entries, sizes)]


def _scores(queries: torch.Tensor, entries: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """[kv_heads, rows, pages] fp32 of queries [kv_heads, rows, width] fp32, entries [kv_heads, pages, width] and sizes
    [kv_heads or 1, 1, pages or 1] fp32."""
    if entries.dtype == queries.dtype:
        return torch.baddbmm(sizes, queries, entries.transpose(1, 2))
    return torch.bmm(queries.to(entries.dtype), entries.transpose(1, 2)).float().add_(sizes)
