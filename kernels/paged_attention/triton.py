"""Paged attention in Triton: launches the pass over the pages (forward.py) and the combination of its splits."""
import contextlib
import functools
import math

import torch
import triton

from .configs import (COMBINE, INTERPRETER, MAX_HEAD_DIM, MAX_PACKED_HEAD_DIM, Tile, choose_splits, find_tile, head_block)
from .forward import combine_kernel, forward_kernel
from .pool import PackedPool, Rope

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


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
    kv_heads, rows, head_dim = query.shape
    pages, bits = starts.shape[1], key.bits if isinstance(key, PackedPool) else 16
    if bits == 16:
        pools, scales, s_stride = (key, value), (None,) * 4, (0, 0)
    else:
        pools, scales = (key.key_codes, key.value_codes), (key.key_scale, key.key_zero, key.value_scale, key.value_zero)
        s_stride = key.key_scale.stride()[:2]
    _check(query, pools, scales, bits, rope)
    tile = tile or (INTERPRETER if INTERPRETED else find_tile(head_dim, query.element_size(), bits, rows))
    row_tiles = triton.cdiv(rows, tile.rows)
    if splits is None:
        splits = 1 if INTERPRETED else _splits(row_tiles * kv_heads, pages, query.device)
    pages_per_split = triton.cdiv(max(pages, 1), splits)
    splits = triton.cdiv(max(pages, 1), pages_per_split)   # none without a page

    output = torch.empty(kv_heads, rows, head_dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(kv_heads, rows, dtype=torch.float32, device=query.device)
    page_lse = None if noted is None else torch.empty(kv_heads, rows, pages, dtype=torch.float32, device=query.device)
    partial, partial_lse = (output, lse) if splits == 1 else (output.new_empty(splits, *output.shape),
                                                             lse.new_empty(splits, *lse.shape))
    turn = (None,) * 5
    if bits < 16:
        turn = (rope.frequencies, rope.stream_frequencies, rope.axes, rope.positions, rope.bias)
    elif moves is not None:
        turn = (None, rope.stream_frequencies, None, None, None)
    tables = (table if table is None else table.contiguous() for table in (starts, lengths, moves, entries, noted))
    shape = {'HEAD_DIM': head_dim, 'HEAD_BLOCK': head_block(head_dim)}
    with _on(query.device):
        # 'ieee' matters to fp32 alone: its dots are exact rather than rounded to tf32.
        forward_kernel[row_tiles, splits, kv_heads](
            query, *pools, *scales, *tables, *turn, partial, partial_lse, page_lse, scale * math.log2(math.e), rows, pages,
            pages_per_split, *query.stride()[:2], *pools[0].stride()[:2], *pools[1].stride()[:2], *s_stride,
            rope.positions.stride(0) if bits < 16 else 0, **shape, ROWS=tile.rows, KEYS=tile.keys, BITS=bits,
            PRECISION='ieee', UPCAST=INTERPRETED and query.dtype == torch.bfloat16, num_warps=tile.warps,
            num_stages=tile.stages, maxnreg=tile.registers, enable_fp_fusion=True)
        if splits > 1:
            combine_kernel[triton.cdiv(kv_heads * rows, COMBINE.rows),](
                partial, partial_lse, output, lse, kv_heads * rows, splits, **shape, ROWS=COMBINE.rows,
                num_warps=COMBINE.warps, num_stages=COMBINE.stages, maxnreg=COMBINE.registers, enable_fp_fusion=True)
    return output, lse, page_lse


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
