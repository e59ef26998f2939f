"""Paged attention from its definition, in plain torch on any device: the specification of the fast kernel, and what CPUs run.

Pages are gathered and read all at once, without a loop over pages or heads. The host looks at the lengths: on a GPU it waits.
"""
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch

from .parts import Noted, PoolPages, Read, Span
from .pool import PackedPool, Rope, unpack

# Elements of the largest temporaries: scores [kv_heads, rows, tokens], and keys or values gathered, in fp32 (16 MiB). Pages are
# read in pieces, and the rows of each in pieces, where these would be larger; one page of one row is the least piece.
PIECE = 2**22


class Pages(NamedTuple):
    """What to read: [kv_heads, pages] each; see `paged_attention`."""
    starts: torch.Tensor
    lengths: torch.Tensor
    moves: torch.Tensor | None
    entries: torch.Tensor | None

    def piece(self, first: int, end: int) -> 'Pages':
        return Pages(*(part if part is None else part[:, first:end] for part in self))


class Gathered(NamedTuple):
    """Tokens of some pages, each page as long as the longest: key, value [kv_heads, tokens, head_dim] fp32.

    `hidden` and `counted` are [kv_heads, 1, tokens] bool: tokens that are not there, and those that are evidence.
    """
    key: torch.Tensor
    value: torch.Tensor
    hidden: torch.Tensor | None
    counted: torch.Tensor | None


def naive_paged_attention(query: torch.Tensor, key: torch.Tensor | PackedPool, value: torch.Tensor | None,
                          starts: torch.Tensor, lengths: torch.Tensor, scale: float, moves: torch.Tensor | None,
                          noted: torch.Tensor | None, rope: Rope | None, entries: torch.Tensor | None,
                          ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Arguments and results as in `paged_attention`. Raises ValueError for a page that is not in the pool."""
    kv_heads, rows, head_dim = query.shape
    count = starts.shape[1]
    shortest, longest = (end.item() for end in lengths.aminmax()) if lengths.numel() else (0, 0)
    pages = Pages(starts, lengths, moves, entries)
    if shortest <= 0 and (most := int((lengths != 0).sum(dim=1).max()) if count else 0) < count:
        # Of several pools, most pages of each may lie elsewhere.
        order = (lengths == 0).int().argsort(dim=1, stable=True)[:, :most]
        pages = (part if part is None else part.gather(1, order) for part in pages)
        starts, lengths, moves, entries = pages
        output, lse, of_used = naive_paged_attention(query, key, value, starts, lengths, scale, moves, noted, rope, entries)
        if of_used is not None:
            of_all = of_used.new_full((kv_heads, rows, count), float('-inf'))
            of_used = of_all.scatter_(2, order[:, None].expand(-1, rows, -1), of_used)
        return output, lse, of_used
    if shortest <= 0:
        # Such an entry may say anything. Row 0 stands for its tokens, hidden.
        unused = lengths == 0
        pages = Pages(*(part if part is None else part.masked_fill(unused, 0) for part in pages))
    _check_in_pool(pages, shortest, key)

    per_piece = max(1, PIECE // (kv_heads * max(longest, 1) * head_dim))
    rows_per_piece = max(1, PIECE // (kv_heads * max(longest, 1) * min(per_piece, max(count, 1))))
    if longest and count <= per_piece and rows <= rows_per_piece:
        return _attend(query, _gather(key, value, pages, noted, rope, shortest, longest), scale, count)
    output = torch.zeros_like(query, dtype=torch.float32)
    lse = output.new_full((kv_heads, rows), float('-inf'))
    page_lse = None if noted is None else lse[..., None].repeat(1, 1, count)
    for first in range(0, count if longest else 0, per_piece):
        piece = pages.piece(first, first + per_piece)
        gathered = _gather(key, value, piece, noted, rope, shortest, longest)
        for row in range(0, rows, rows_per_piece):
            cut = slice(row, row + rows_per_piece)
            more, more_lse, of_pages = _attend(query[:, cut], gathered, scale, piece.starts.shape[1])
            # Finite, so that nothing weighs 0 where nothing was read at all.
            total = torch.logaddexp(lse[:, cut], more_lse)
            finite = total.clamp_min(-1e30)
            output[:, cut] = (output[:, cut] * (lse[:, cut] - finite).exp()[..., None]
                              + more * (more_lse - finite).exp()[..., None])
            lse[:, cut] = total
            if of_pages is not None:
                page_lse[:, cut, first:first + per_piece] = of_pages
    return output, lse, page_lse


def naive_span_and_pages(query: torch.Tensor, span: Span, pools: Sequence[PoolPages],
                         later: Callable[[], Iterable[PoolPages]], scale: float, noting: bool) -> Read:
    """Arguments and results as in `span_and_pages`."""
    read = [read_span(query.float() * scale, span, noting, PIECE)]
    for pages in chain(pools, later()):
        key, value, starts, lengths, moves, noted, rope, entries = pages
        output, lse, page_lse = naive_paged_attention(query, key, value, starts, lengths, scale, moves, noted, rope, entries)
        read.append(Read(output, lse, [Noted(page_lse, [starts.shape[1]])] if noting else []))
    return together(read)


def together(read: Sequence[Read]) -> Read:
    """What was read in parts, as if at once."""
    if len(read) == 1:
        return read[0]
    lse = torch.stack([part.lse for part in read])
    outputs = torch.stack([part.output for part in read])
    return Read((outputs * torch.softmax(lse, dim=0)[..., None]).sum(dim=0), lse.logsumexp(dim=0),
                [noted for part in read for noted in part.noted])


def naive_masses(noted: Noted, lse: torch.Tensor) -> torch.Tensor:
    """Arguments and results as in `masses`, of all columns."""
    return torch.exp(noted.lse - lse[..., None]).sum(dim=1)


def read_span(rows: torch.Tensor, span: Span, noting: bool, most: int) -> Read:
    """Attention of rows [kv_heads, group x new, head_dim] fp32, queries times the scale.

    Args:
        most: elements of the largest tensor of scores, unless a single row has more.
    """
    kv_heads, count, tokens = *rows.shape[:2], span.key.shape[1]
    key, value = span.key.float().transpose(1, 2), span.value.float()
    per_piece = max(1, most // (kv_heads * max(1, tokens)))
    read = [_read_rows(rows[:, begin:begin + per_piece], key, value, span.places, begin, noting)
            for begin in range(0, count, per_piece)]
    if len(read) == 1:
        return read[0]
    output, lse = (torch.cat(parts, dim=1) for parts in zip(*(part[:2] for part in read)))
    scores = [torch.cat([part.noted[0].lse for part in read], dim=1)] if noting else []
    return Read(output, lse, [Noted(each, [tokens]) for each in scores])


def _read_rows(rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor, places: torch.Tensor | None, first: int,
               noting: bool) -> Read:
    """As `read_span`; `first`: number of the first of these rows, keys [kv_heads, head_dim, tokens], all in fp32."""
    scores = rows @ key
    if places is not None:
        if len(places) > 1:
            places = places[torch.arange(first, first + rows.shape[1], device=rows.device) % len(places), None]
        scores.masked_fill_(torch.arange(scores.shape[2], device=rows.device) > places, float('-inf'))
    weights = torch.log_softmax(scores, dim=-1)
    lse = scores[..., 0] - weights[..., 0]     # every row sees the first token
    weights.exp_()
    return Read(weights @ value, lse, [Noted(scores, [scores.shape[2]])] if noting else [])


def _attend(query: torch.Tensor, gathered: Gathered, scale: float,
            pages: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    scores = torch.bmm(query.float() * scale, gathered.key.transpose(1, 2))
    if gathered.hidden is not None:
        scores.masked_fill_(gathered.hidden, float('-inf'))
    top = scores.amax(dim=-1, keepdim=True)
    if gathered.hidden is not None:
        top.clamp_min_(-1e30)    # finite, so that a row of nothing has weights of 0 rather than NaN
    weights = scores.sub_(top).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    lse = total.log().add_(top).squeeze(-1)
    page_lse = None
    if gathered.counted is not None:
        page_lse = (weights * gathered.counted).view(*weights.shape[:2], pages, -1).sum(dim=-1).log_().add_(top)
    if gathered.hidden is not None:
        total.clamp_min_(1)      # changes nothing but 0: the greatest weight alone is 1
    return torch.bmm(weights, gathered.value).div_(total), lse, page_lse


def _gather(key: torch.Tensor | PackedPool, value: torch.Tensor | None, pages: Pages, noted: torch.Tensor | None,
            rope: Rope | None, shortest: int, longest: int) -> Gathered:
    offset = torch.arange(longest, dtype=torch.int32, device=pages.starts.device)
    hidden = None
    if shortest < longest:
        hidden = (offset >= pages.lengths[..., None]).flatten(1).unsqueeze(1)
        # A page's last token stands for those that it has not, so that no row is read that was never written.
        offset = offset.minimum((pages.lengths[..., None] - 1).clamp_min_(0))
    index = pages.starts[..., None] + offset
    if isinstance(key, PackedPool):
        keys, values = _unpacked(key, index, pages.entries)
        if rope.bias is not None:
            keys += rope.bias[:, None, None]
        keys = _turned(keys, _angles(rope, index, pages.moves)).flatten(1, 2)
    else:
        keys, values = (rows.float() for rows in _rows((key, value), index.flatten(1)))
        if pages.moves is not None:
            angles = pages.moves[..., None, None] * rope.stream_frequencies
            keys = _turned(keys.view(*index.shape, -1), angles).flatten(1, 2)
    if shortest <= 0:
        values.masked_fill_(hidden.transpose(1, 2), 0)   # 0 times a NaN that lies in row 0 would be NaN
    counted = None
    if noted is not None:
        counted = noted.bool()[index].flatten(1).unsqueeze(1)
        counted = counted if hidden is None else counted & ~hidden
    return Gathered(keys, values, hidden, counted)


def _rows(pools: tuple[torch.Tensor, ...], index: torch.Tensor) -> list[torch.Tensor]:
    """Rows `index` [kv_heads, n] of each of some [kv_heads, capacity, width]: [kv_heads, n, width]."""
    heads = torch.arange(index.shape[0], device=index.device)[:, None]
    if not all(pool.is_contiguous() for pool in pools):
        return [pool[heads, index] for pool in pools]
    # Four times as fast on a CPU.
    flat = (index + heads * pools[0].shape[1]).flatten()
    return [pool.flatten(0, 1).index_select(0, flat).view(*index.shape, -1) for pool in pools]


def _unpacked(pool: PackedPool, index: torch.Tensor, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [kv_heads, pages, tokens of a page, head_dim] fp32, not rotated, and values with pages and tokens in one."""
    codes = _rows((pool.key_codes, pool.value_codes), index.flatten(1))
    scales = _rows((pool.key_scale, pool.key_zero, pool.value_scale, pool.value_zero), entries)
    key_scale, key_zero, value_scale, value_zero = (each.float().unsqueeze(2) for each in scales)
    keys, values = (unpack(each, pool.bits).float().view(*index.shape, -1) for each in codes)
    return torch.addcmul(key_zero, keys, key_scale), torch.addcmul(value_zero, values, value_scale).flatten(1, 2)


def _angles(rope: Rope, index: torch.Tensor, moves: torch.Tensor | None) -> torch.Tensor:
    """Of rows `index` [kv_heads, pages, tokens]: [..., head_dim / 2] fp32, as the model has them for tokens standing there."""
    positions = rope.positions.index_select(1, index.flatten()).t().index_select(1, rope.axes).view(*index.shape, -1)
    if moves is not None:
        # Whole numbers are added, so that a page hours away that is read from close by loses nothing to fp32.
        positions = positions + moves[..., None, None] * (rope.stream_frequencies != 0)
    return positions * rope.frequencies


def _turned(keys: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Keys [kv_heads, pages, tokens, head_dim], turned by angles [kv_heads, pages, tokens or 1, head_dim / 2]."""
    cos, sin = angles.cos(), angles.sin()
    first, second = keys.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _check_in_pool(pages: Pages, shortest: int, key: torch.Tensor | PackedPool) -> None:
    if not pages.starts.numel():
        return
    capacity = (key.key_codes if isinstance(key, PackedPool) else key).shape[1]
    first, end = pages.starts.min().item(), (pages.starts + pages.lengths).max().item()
    if shortest < 0 or first < 0 or end > capacity:
        raise ValueError(f'pages must lie within the {capacity} rows of the pool, got lengths from {shortest}, starts from '
                         f'{first} and ends up to {end}')
    if isinstance(key, PackedPool):
        first, last = (number.item() for number in pages.entries.aminmax())
        if first < 0 or last >= key.key_scale.shape[1]:
            raise ValueError(f'entries must be among the {key.key_scale.shape[1]} scales of the pool, got {first} to {last}')
