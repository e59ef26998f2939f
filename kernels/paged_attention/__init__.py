"""Attention of an answer over chosen pages of its memory, which may be in few bits, and what share each page got."""
import math
from collections.abc import Callable, Iterable, Sequence

import torch

from statekv_ros.kernels.fitness import run

from .checks import check, check_span
from .naive import naive_masses, naive_paged_attention, naive_span_and_pages, read_span, together
from .parts import Noted, PoolPages, Read, Span
from .pool import PackedPool, Rope

__all__ = ['OPERATION', 'Noted', 'PackedPool', 'PoolPages', 'Read', 'Rope', 'Span', 'masses', 'paged_attention', 'read_span',
           'span_and_pages', 'together']
OPERATION = 'paged_attention'


def paged_attention(query: torch.Tensor, key: torch.Tensor | PackedPool, value: torch.Tensor | None, starts: torch.Tensor,
                    lengths: torch.Tensor, scale: float, moves: torch.Tensor | None = None,
                    noted: torch.Tensor | None = None, rope: Rope | None = None, entries: torch.Tensor | None = None,
                    implementation: str | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Attention of rows over pages of a pool: part of a whole that its log-sum-exp puts together with other parts.

    A page is a run of the pool's rows. Each KV head reads pages of its own, all of whose tokens every query row sees. With
    `lse` of everything that a row reads, here and elsewhere, `exp(page_lse - lse)` is the share that a page got.

    Args:
        query: [kv_heads, rows, head_dim], rotated; rows = query heads of a KV head x tokens. bf16, fp16 or fp32.
        key: [kv_heads, capacity, head_dim] in the dtype of `query`, rotated; or a `PackedPool`, with `rope` and `entries`.
        value: as `key`; None with a `PackedPool`.
        starts: [kv_heads, pages] int32, first row of each page in the pool, in any order.
        lengths: [kv_heads, pages] int32, tokens of each page, best of like lengths; 0 for an entry that is not used, which
            may have anything in `starts`, `moves` and `entries`.
        scale: factor on the scores, above 0.
        moves: [kv_heads, pages] int32, or None for 0: each page's keys are read as if they stood so many positions further
            right along the stream (negative: left). Needs `rope`.
        noted: [capacity] bool, rows that count as evidence; None where nobody asks.
        rope: how keys turn.
        entries: [kv_heads, pages] int32, row of the scales and zeros that each page has in a `PackedPool`.
        implementation: 'triton' (CUDA; head_dim up to 256, 128 of a PackedPool), 'naive' (any device), or None for 'triton'
            on CUDA where it runs and 'naive' elsewhere. Only 'naive' checks that pages are in the pool: a GPU would
            have to be waited for.

    Returns:
        output [kv_heads, rows, head_dim] fp32, normalised within what was read (0 where nothing was); lse [kv_heads, rows]
        fp32, natural logarithm of the sum of exp(score * scale), -inf where nothing was read; page_lse
        [kv_heads, rows, pages] fp32, the same of each page's noted rows, or None; -inf where there are none, or where they
        have less than 2**-126 of the row's greatest.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other, something needed is missing, a page is not in the pool,
            or the implementation is unknown or cannot run here.

    Example:
        >>> query, key, value = torch.randn(2, 4, 32), torch.randn(2, 100, 32), torch.randn(2, 100, 32)
        >>> starts, lengths = torch.tensor([[0, 50], [9, 0]]).int(), torch.tensor([[9, 9], [9, 0]]).int()
        >>> output, lse, _ = paged_attention(query, key, value, starts, lengths, scale=32 ** -0.5)
        >>> output.shape, lse.shape
        (torch.Size([2, 4, 32]), torch.Size([2, 4]))
    """
    check(query, key, value, starts, lengths, moves, noted, rope, entries)
    if not 0 < scale < math.inf:
        raise ValueError(f'scale must be a positive number, got {scale}')
    arguments = (query, key, value, starts, lengths, scale, moves, noted, rope, entries)
    return run(OPERATION, implementation, query.device, lambda: _triton().triton_paged_attention(*arguments),
               lambda: naive_paged_attention(*arguments))


def span_and_pages(query: torch.Tensor, span: Span, pools: Sequence[PoolPages], scale: float, noting: bool = False,
                   later: Callable[[], Iterable[PoolPages]] = tuple, implementation: str | None = None) -> Read:
    """Attention of rows over a span of tokens and pages of some pools, as if they lay side by side.

    Args:
        query: [kv_heads, rows, head_dim], rotated, rows = query heads of a KV head x `span.new` tokens. bf16, fp16 or fp32.
        span: a token at least, in the dtype of `query`. Where it has places, these say how far it is read: how long it is, nobody
            but the device needs to know.
        pools: as `paged_attention` takes them.
        noting: keep what `masses` needs; each of the pools then says which rows are `noted`.
        later: gives further pools, of which each is read before the next one is asked for; may be called again.
        implementation: as of `paged_attention`.

    Raises:
        ValueError: as `paged_attention`; a pool does not say which rows are noted.
    """
    check_span(query, span)
    for pages in pools:
        _check_pages(query, pages, scale, noting)
    arguments = query, span, pools, lambda: (_check_pages(query, pages, scale, noting) for pages in later()), scale, noting
    return run(OPERATION, implementation, query.device, lambda: _triton().triton_span_and_pages(*arguments),
               lambda: naive_span_and_pages(*arguments))


def masses(noted: Sequence[Noted], lse: torch.Tensor, implementation: str | None = None) -> list[torch.Tensor]:
    """Softmax mass of each token of a span and each page's noted rows, added up over the rows.

    Args:
        noted: of `span_and_pages`.
        lse: of all that the rows read, here and elsewhere, [kv_heads, rows] fp32.

    Returns:
        [kv_heads, tokens or pages] fp32 of each part.
    """
    every = [run(OPERATION, implementation, lse.device, lambda: _triton().triton_masses(each, lse),
                 lambda: naive_masses(each, lse)) for each in noted]
    return [part for mass, each in zip(every, noted) for part in mass.split(each.counts, dim=1)]


def _triton():
    # Here rather than above: most machines without a GPU never need it, and some cannot install it.
    from . import triton
    return triton


def _check_pages(query: torch.Tensor, pages: PoolPages, scale: float, noting: bool) -> PoolPages:
    check(query, *pages)
    if noting and pages.noted is None:
        raise ValueError('noted must say which rows of the pool count, where masses are noted')
    if not 0 < scale < math.inf:
        raise ValueError(f'scale must be a positive number, got {scale}')
    return pages
