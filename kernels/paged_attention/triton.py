"""Paged attention in Triton: launches the passes over pages and spans, the combination of their splits, and the masses (all in
forward.py)."""
import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import triton

from .configs import (COMBINE, INTERPRETER, MASS, MAX_HEAD_DIM, MAX_PACKED_HEAD_DIM, Tile, choose_splits, find_tile, head_block)
from .forward import combine_kernel, forward_kernel, mass_kernel
from .parts import Noted, PoolPages, Read, Span
from .pool import PackedPool, Rope

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


class _Pass(NamedTuple):
    """A launch over pages of one pool, or over a span.

    Attributes:
        tile, row_tiles, splits, pages_per_split: how it is cut.
        pages: that it goes through; of a span, so many keys of the tile at a time.
    """
    source: PoolPages | Span
    tile: Tile
    row_tiles: int
    splits: int
    pages_per_split: int
    pages: int


def triton_paged_attention(query: torch.Tensor, key: torch.Tensor | PackedPool, value: torch.Tensor | None,
                           starts: torch.Tensor, lengths: torch.Tensor, scale: float, moves: torch.Tensor | None,
                           noted: torch.Tensor | None, rope: Rope | None, entries: torch.Tensor | None,
                           tile: Tile | None = None, splits: int | None = None,
                           ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Arguments and results as in `paged_attention`.

    Args:
        tile: that of the pass over the pages; the entry of configs.py when None.
        splits: parts of the pages worked on side by side; as many as keep the device busy when None.

    Raises:
        ValueError: the device cannot run Triton, or it cannot address such tensors.
    """
    one = _pass(query, PoolPages(key, value, starts, lengths, moves, noted, rope, entries), tile, splits)
    with _on(query.device):
        chunk = _read(query, [one], scale, noted is not None)
        output, lse = _combined(query, [chunk])
    return output, lse, chunk.noted.lse if chunk.noted else None


def triton_span_and_pages(query: torch.Tensor, span: Span, pools: Sequence[PoolPages],
                          later: Callable[[], Iterable[PoolPages]], scale: float, noting: bool) -> Read:
    """Arguments and results as in `span_and_pages`. Raises ValueError as `triton_paged_attention`."""
    passes = [_pass(query, source) for source in (span, *pools)]
    with _on(query.device):
        chunks = [_read(query, passes, scale, noting)]
        for pages in later():
            chunks.append(_read(query, [_pass(query, pages)], scale, noting))
        return Read(*_combined(query, chunks), [chunk.noted for chunk in chunks if chunk.noted])


def triton_masses(noted: Noted, lse: torch.Tensor) -> torch.Tensor:
    """Arguments and results as in `masses`, of all columns."""
    kv_heads, rows, columns = noted.lse.shape
    mass = torch.empty(kv_heads, columns, dtype=torch.float32, device=lse.device)
    with _on(lse.device):
        mass_kernel[triton.cdiv(columns, MASS.keys), kv_heads](
            noted.lse, lse.contiguous(), mass, rows, columns, ROWS=MASS.rows, KEYS=MASS.keys, num_warps=MASS.warps,
            num_stages=MASS.stages, maxnreg=MASS.registers, enable_fp_fusion=True)
    return mass


class _Chunk(NamedTuple):
    """Outputs [splits, kv_heads, rows, head_dim] and log-sum-exps [splits, kv_heads, rows] that are to be put together."""
    output: torch.Tensor
    lse: torch.Tensor
    noted: Noted | None


def _pass(query: torch.Tensor, source: PoolPages | Span, tile: Tile | None = None, splits: int | None = None) -> _Pass:
    kv_heads, rows, head_dim = query.shape
    is_span = isinstance(source, Span)
    bits = 16 if is_span else source.bits
    pool, rope = (source.key, None) if is_span else (source.key, source.rope)
    if bits == 16:
        _check(query, (pool, source.value), (None,) * 4, bits, rope)
    else:
        _check(query, (pool.key_codes, pool.value_codes),
               (pool.key_scale, pool.key_zero, pool.value_scale, pool.value_zero), bits, rope)
    tile = tile or (INTERPRETER if INTERPRETED else find_tile(head_dim, query.element_size(), bits, rows))
    row_tiles = triton.cdiv(rows, tile.rows)
    pages = triton.cdiv(source.key.shape[1], tile.keys) if is_span else source.starts.shape[1]
    if splits is None:
        splits = 1 if INTERPRETED else _splits(row_tiles * kv_heads, pages, query.device)
    pages_per_split = triton.cdiv(max(pages, 1), splits)
    splits = triton.cdiv(max(pages, 1), pages_per_split)   # none without a page
    return _Pass(source, tile, row_tiles, splits, pages_per_split, pages)


def _read(query: torch.Tensor, passes: Sequence[_Pass], scale: float, noting: bool) -> _Chunk:
    """Launch passes, each of which writes its part of the same tensors."""
    splits = sum(each.splits for each in passes)
    output = torch.empty(splits, *query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(splits, *query.shape[:2], dtype=torch.float32, device=query.device)
    counts = [each.source.key.shape[1] if isinstance(each.source, Span) else each.pages for each in passes]
    noted = torch.empty(*query.shape[:2], sum(counts), dtype=torch.float32, device=query.device) if noting else None
    split = column = 0
    for each, count in zip(passes, counts):
        _launch(query, each, scale, output[split:], lse[split:], None if noted is None else noted[..., column:])
        split, column = split + each.splits, column + count
    return _Chunk(output, lse, None if noted is None else Noted(noted, counts))


def _launch(query: torch.Tensor, one: _Pass, scale: float, output: torch.Tensor, lse: torch.Tensor,
            page_lse: torch.Tensor | None) -> None:
    kv_heads, rows, head_dim = query.shape
    source, tile = one.source, one.tile
    scales, s_stride, turn, p_axis, tables, noted, t_head, bits = (None,) * 4, (0, 0), (None,) * 5, 0, (None,) * 4, None, 0, 16
    tokens, new, places = (source.key.shape[1], source.new, source.places) if isinstance(source, Span) else (0, 1, None)
    pools = source.key, source.value
    if isinstance(source, PoolPages):
        rope, pool, noted, bits = source.rope, source.key, source.noted, source.bits
        noted = None if noted is None else noted.contiguous()
        tables, t_head = _tables(source.starts, source.lengths, source.moves, source.entries)
        if bits < 16:
            pools, s_stride = (pool.key_codes, pool.value_codes), pool.key_scale.stride()[:2]
            scales = pool.key_scale, pool.key_zero, pool.value_scale, pool.value_zero
            turn = rope.frequencies, rope.stream_frequencies, rope.axes, rope.positions, rope.bias
            p_axis = rope.positions.stride(0)
        elif source.moves is not None:
            turn = (None, rope.stream_frequencies, None, None, None)
    # 'ieee' matters to fp32 alone: its dots are exact rather than rounded to tf32.
    forward_kernel[one.row_tiles, one.splits, kv_heads](
        query, *pools, *scales, *tables, noted, places, *turn, output, lse, page_lse, scale * math.log2(math.e), rows, one.pages,
        one.pages_per_split, t_head, 0 if page_lse is None else page_lse.stride(1), tokens, new, *query.stride()[:2],
        *pools[0].stride()[:2], *pools[1].stride()[:2], *s_stride, p_axis, HEAD_DIM=head_dim, HEAD_BLOCK=head_block(head_dim),
        ROWS=tile.rows, KEYS=tile.keys, BITS=bits, PRECISION='ieee', UPCAST=INTERPRETED and query.dtype == torch.bfloat16,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers, enable_fp_fusion=True)


def _combined(query: torch.Tensor, chunks: Sequence[_Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of all splits."""
    partial, partial_lse = chunks[0][:2] if len(chunks) == 1 else (torch.cat(parts) for parts in list(zip(*chunks))[:2])
    if len(partial) == 1:
        return partial[0], partial_lse[0]
    kv_heads, rows, head_dim = query.shape
    output, lse = torch.empty_like(partial[0]), torch.empty_like(partial_lse[0])
    combine_kernel[triton.cdiv(kv_heads * rows, COMBINE.rows),](
        partial, partial_lse, output, lse, kv_heads * rows, len(partial), HEAD_DIM=head_dim, HEAD_BLOCK=head_block(head_dim),
        ROWS=COMBINE.rows, num_warps=COMBINE.warps, num_stages=COMBINE.stages, maxnreg=COMBINE.registers, enable_fp_fusion=True)
    return output, lse


def _tables(*tables: torch.Tensor | None) -> tuple[list[torch.Tensor | None], int]:
    """Tables with a row for each KV head, and how far these are apart: the same in all, and none where all heads share one."""
    given = [table for table in tables if table is not None]
    if any(table.stride() != given[0].stride() for table in given) or given[0].stride(1) != 1:
        tables = [None if table is None else table.contiguous() for table in tables]
        given = [table for table in tables if table is not None]
    return list(tables), given[0].stride(0)


def _check(query: torch.Tensor, pools: tuple, scales: tuple, bits: int, rope: Rope | None) -> None:
    head_dim = query.shape[2]
    if query.device.type != 'cuda' and not INTERPRETED:
        raise ValueError(f"implementation 'triton' needs tensors on a CUDA device, got {query.device}: use 'naive', or, for "
                         "Triton's interpreter, set TRITON_INTERPRET=1 before Python starts")
    largest = MAX_HEAD_DIM if bits == 16 else MAX_PACKED_HEAD_DIM
    if head_dim > largest:
        raise ValueError(f"implementation 'triton' takes head_dim up to {largest} from a pool of {bits} bits, got {head_dim}: "
                         "use 'naive'")
    if bits == 4 and head_dim % 4:
        raise ValueError("implementation 'triton' takes 4 bits where head_dim is a multiple of 4, so that both halves of a key "
                         f"are whole bytes, got {head_dim}: use 'naive'")
    for name, tensor in zip(('query', 'keys of the pool', 'values of the pool'), (query, *pools)):
        if tensor.stride(2) != 1:
            raise ValueError(f'{name} must be contiguous along head_dim (stride 1), got strides {tensor.stride()}')
        # The kernel counts these in 32 bits.
        if (tensor.shape[1] - 1) * tensor.stride(1) + head_block(head_dim) >= 2**31:
            raise ValueError(f'{name} must span less than 2**31 elements in a head, got shape {tuple(tensor.shape)} with '
                             f'strides {tensor.stride()}')
    if bits == 16:
        return
    if len({tensor.stride() for tensor in scales}) > 1 or scales[0].stride(2) != 1:
        raise ValueError('scales and zeros of a PackedPool must lie alike in memory, with stride 1 along head_dim, got strides '
                         f'{[tensor.stride() for tensor in scales]}')
    if rope.positions.stride(1) != 1 or rope.positions.shape[0] * rope.positions.stride(0) >= 2**31:
        raise ValueError('positions of rope must have stride 1 along the rows and span less than 2**31, got strides '
                         f'{rope.positions.stride()}')
    for name in ('frequencies', 'stream_frequencies', 'axes', 'bias'):
        tensor = getattr(rope, name)
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f'{name} of rope must be contiguous, got strides {tensor.stride()}: call .contiguous()')


@functools.lru_cache(maxsize=1024)
def _splits(programs: int, pages: int, device: torch.device) -> int:
    return choose_splits(programs, pages, torch.cuda.get_device_properties(device).multi_processor_count)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    # Triton launches on the current device, which need not be the tensors'.
    return torch.cuda.device(device) if device.type == 'cuda' else contextlib.nullcontext()
