"""Votes and places in plain torch on any device: the specification of the fast kernels, and what CPUs without them run."""
import torch

from .candidates import MIDDLE, Entries, Leaves, Line, Lines
from .places import PageColumns, Places

# Numbers of the entries that a CPU makes fp32 at a time: they stay near it, and the room for them is used again and again.
_AT_A_TIME = 2**18


class Scratch:
    """Room for entries that a CPU scores, which multiplies halves slowly: a few at a time, in fp32."""

    def __init__(self, kv_heads: int, width: int, leaf: int, dtype: torch.dtype):
        """width: numbers in an entry; leaf: pages in one."""
        self._leaf, self._leaves = leaf, max(1, _AT_A_TIME // (width * leaf))
        self._pages = max(1, self._leaves * leaf // kv_heads)
        shape = max(self._leaves, -(-kv_heads * self._pages // leaf)), leaf * width
        self._floats, self._room = torch.empty(shape), torch.empty(shape, dtype=dtype)

    def pages(self, queries: torch.Tensor, entries: torch.Tensor, sizes: torch.Tensor) -> list[torch.Tensor]:
        """Scores of pages side by side, in pieces; as `_scores` takes them."""
        pieces, count, step = [], entries.shape[1], self._pages
        for begin in range(0, count, step):
            piece = entries[:, begin:begin + step]
            floats = self._floats.view(-1, piece.shape[2])[:piece.shape[0] * piece.shape[1]].view(piece.shape).copy_(piece)
            pieces.append(_scores(queries, floats, sizes[..., begin:begin + step] if sizes.shape[-1] > 1 else sizes))
        return pieces

    def of_leaves(self, queries: torch.Tensor, entries: Entries, places: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Scores of the pages of some leaves, [kv_heads, rows, pages].

        Args:
            places: of their first pages, [kv_heads, n] int64, ascending where some have codes.
            sizes: of all their pages, [kv_heads, 1, pages].
        """
        (kv_heads, rows, _), count, leaf = queries.shape, places.shape[1], self._leaf
        scores = sizes.view(kv_heads, 1, count, leaf).repeat(1, rows, 1, 1)
        at = _rows(places + entries.offset, entries.exact, leaf)
        cuts = (places < entries.stop).sum(dim=1).tolist() if entries.coded else [0] * kv_heads
        for head, cut in enumerate(cuts):
            of_head = slice(head, head + 1)
            for begin in range(0, cut, self._leaves):
                piece = slice(begin, min(cut, begin + self._leaves))
                found = _of_codes(entries, _of_pages(places[of_head, piece], leaf), of_head)
                scores[head, :, piece].flatten(1).addmm_(queries[head], found[0].T)
            if cut < count:
                self._add(queries[head], entries.exact, at[head, cut:], scores[head, :, cut:])
        return scores.flatten(2)

    def _add(self, queries: torch.Tensor, exact: torch.Tensor, at: torch.Tensor, scores: torch.Tensor) -> None:
        """Add the products of queries [rows, width] and the pages of leaves `at` of all KV heads' to scores [rows, n, pages of a
        leaf]."""
        by_leaf = exact.view(-1, self._leaf * queries.shape[1])
        for begin in range(0, len(at), self._leaves):
            piece = slice(begin, begin + self._leaves)
            picked = at[piece]
            floats = self._floats[:len(picked)].copy_(torch.index_select(by_leaf, 0, picked, out=self._room[:len(picked)]))
            scores[:, piece].flatten(1).addmm_(queries, floats.view(-1, queries.shape[1]).T)


class AtOnce:
    """As `Scratch`, in one piece and new room, without waiting for the device."""

    def __init__(self, leaf: int):
        self.leaf = leaf

    def pages(self, queries: torch.Tensor, entries: torch.Tensor, sizes: torch.Tensor) -> list[torch.Tensor]:
        return [_scores(queries, entries, sizes)]

    def of_leaves(self, queries: torch.Tensor, entries: Entries, places: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        leaf, (kv_heads, _, width), capacity = self.leaf, queries.shape, entries.exact.shape[1]
        at = _rows((places + entries.offset).clamp(0, capacity - leaf), entries.exact, leaf)
        found = entries.exact.view(-1, leaf * width).index_select(0, at.flatten()).view(kv_heads, -1, width)
        scores = _scores(queries, found, sizes)
        if not entries.coded:
            return scores
        places = _of_pages(places, leaf)
        return torch.where((places < entries.stop)[:, None], _scores(queries, _of_codes(entries, places), sizes), scores)


def naive_page_votes(queries: torch.Tensor, entries: Entries, lines: Lines, leaves: Leaves | None,
                     scratch: Scratch | AtOnce | None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Arguments and results as in `page_votes`."""
    kv_heads, rows, width = queries.shape[1:]
    leaf = leaves.pages.shape[2] if leaves else 1
    own = queries.device.type == 'cpu' and scratch is None
    room = Scratch(kv_heads, width, leaf, entries.exact.dtype) if own else scratch or AtOnce(leaf)
    scores = []
    for line in lines:
        scores += _of_line(room, queries[line.group], entries, line)
    through = leaves.through if leaves else ()
    for group, stretch in through:
        scores += room.pages(queries[group], leaves.entries[:, stretch], leaves.size)
    every = torch.cat(scores, dim=-1)
    if not through:
        return lines.numbers, torch.softmax(every, dim=-1).sum(dim=1)
    heads = torch.arange(kv_heads, device=queries.device)[:, None]
    of_all, by_leaf = leaves.pages.shape[1], leaves.pages.flatten(0, 1)
    shares, begin = torch.softmax(every, dim=-1), lines.count
    opened, numbers, elsewhere = [], [], []
    for group, stretch in through:
        end = begin + stretch.stop - stretch.start
        best = shares[..., begin:end].sum(dim=1).topk(leaves.opened, dim=-1, sorted=False).indices
        # What stays closed keeps its share: else a row that wants a bit of everything had more say in what is open.
        every[..., begin:end].scatter_(2, best[:, None].expand(-1, rows, -1), float('-inf'))
        begin = end
        best = best + stretch.start
        if entries.coded:       # those that have codes first
            best = best.sort(dim=-1).values
        found = by_leaf.index_select(0, (best + heads * of_all).flatten()).view(kv_heads, -1)
        strays = found < 0
        found = torch.where(strays, ~found, found)
        sizes = leaves.sizes.index_select(0, (found - leaves.first).flatten()).view(kv_heads, -1)
        sizes = sizes.masked_fill(strays, float('-inf'))[:, None]
        elsewhere.append(sizes[:, 0] == float('-inf'))
        opened.append(room.of_leaves(queries[group], entries, best * leaf + leaves.first_place, sizes))
        numbers.append(found)
    numbers.append(lines.numbers.expand(kv_heads, -1))
    votes = torch.softmax(torch.cat([*opened, every], dim=-1), dim=-1).sum(dim=1)
    elsewhere.append(every[:, 0, :lines.count] == float('-inf'))
    numbers, elsewhere = torch.cat(numbers, dim=-1), torch.cat(elsewhere, dim=-1)
    return numbers, votes[:, :numbers.shape[-1]].masked_fill_(elsewhere, -1)


def naive_page_places(best: torch.Tensor, votes: torch.Tensor, numbers: torch.Tensor | None, first: int, table: PageColumns,
                      tokens: int) -> list[Places]:
    """Arguments and results as in `page_places`."""
    heads = len(best)
    pages = best + first if numbers is None else numbers.expand(heads, -1).gather(1, best).long()
    pages = pages.masked_fill(votes < 0, first)     # some other one's; or none that there is any more
    starts, lengths, slots = table.columns[:3, pages + table.offset].unbind(0)
    lengths = lengths.masked_fill(votes < 0, 0)
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


def _of_line(room: Scratch | AtOnce, queries: torch.Tensor, entries: Entries, line: Line) -> list[torch.Tensor]:
    """Scores of a line's pages, in pieces."""
    if line.volume is None:
        found = _strays(entries, line.places) if line.strays else _lying(entries.exact, line.places, entries.offset)
        return room.pages(queries, found, line.sizes)
    places = line.places
    if isinstance(places, slice):
        places = torch.arange(places.start, places.stop, device=queries.device)[None]
    found = _of_codes(entries, places.expand(len(queries), -1))
    if line.strays:
        found = torch.where(places[..., None] < 0, _strays(entries, places.clamp_max(-1)), found)
    return room.pages(queries, found, line.sizes)


def _strays(entries: Entries, places: torch.Tensor) -> torch.Tensor:
    """Entries of strays at ~places [kv_heads or 1, n], [kv_heads, n, width]."""
    index = (~places - entries.first_stray).clamp_min(0)
    return _lying(entries.strays, index.expand(len(entries.strays), -1), 0)


def _of_codes(entries: Entries, places: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
    """What codes at places [kv_heads, n] stand for, [kv_heads, n, width] fp32; something or other where there is none.

    Args:
        heads: the KV heads that these are.
    """
    codes, steps, scales, leaves = (of_all[heads] for of_all in (entries.codes, entries.steps, entries.scales, entries.leaves))
    at = (places - entries.base).clamp(0, codes.shape[1] - 1)
    pairs = _lying(codes, at, 0)
    levels = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(2)[..., :steps.shape[2]] - MIDDLE
    step = _lying(steps, at // entries.volume, 0) * scales.gather(1, at // entries.leaf)[..., None]
    leaf = ((places - entries.first_leaf) // entries.leaf).clamp(0, leaves.shape[1] - 1)
    return levels * step + _lying(leaves, leaf, 0)


def _of_pages(places: torch.Tensor, leaf: int) -> torch.Tensor:
    """Places of all pages of leaves, from those of the first ones [kv_heads, n], [kv_heads, n x leaf]."""
    return (places[..., None] + torch.arange(leaf, device=places.device)).flatten(1)


def _rows(places: torch.Tensor, pool: torch.Tensor, leaf: int) -> torch.Tensor:
    """Which rows of [kv_heads x leaves, ...] the leaves at places [kv_heads, n] of each KV head of a pool are."""
    heads = torch.arange(len(pool), device=pool.device)[:, None]
    return places // leaf + heads * (pool.shape[1] // leaf)


def _lying(pool: torch.Tensor, places: slice | torch.Tensor, offset: int) -> torch.Tensor:
    """Entries at some places, [kv_heads, pages, width]."""
    if isinstance(places, slice):
        return pool[:, places.start + offset:places.stop + offset]
    # By rows: `gather` would look each number up.
    rows = _rows(places + offset, pool, 1)
    return pool.reshape(-1, pool.shape[2]).index_select(0, rows.flatten()).view(*rows.shape, -1)


def _scores(queries: torch.Tensor, entries: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """[kv_heads, rows, pages] fp32 of queries [kv_heads, rows, width] fp32, entries [kv_heads, pages, width] and sizes
    [kv_heads or 1, 1 or rows, pages or 1] fp32."""
    if entries.dtype == queries.dtype:
        return torch.baddbmm(sizes, queries, entries.transpose(1, 2))
    return torch.bmm(queries.to(entries.dtype), entries.transpose(1, 2)).float().add_(sizes)
