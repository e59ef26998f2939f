"""Scored attention in Triton: launches pass 1 (forward.py), the combination of its splits, and pass 2 (mass.py)."""
import contextlib
import functools
import math
from collections.abc import Sequence

import torch
import triton

from .configs import COMBINE, INTERPRETER, MAX_HEAD_DIM, PUT, Config, Tile, choose_splits, find_config, head_block
from .forward import combine_kernel, forward_kernel
from .mass import mass_kernel
from .put import put_kernel
from .streams import Stream

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
_ALIGNED = 64       # bytes: 16 elements of any dtype


def triton_scored_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
                            importance: torch.Tensor, config: Config | None = None,
                            splits: int | None = None) -> torch.Tensor:
    """Writes each key's importance into `importance` and returns the output, which lies in memory as
    [batch, queries, q_heads, head_dim]; other arguments as in `scored_attention`.

    Args:
        config: tiles of both passes; the entry of configs.py for the device when None.
        splits: parts of the keys that pass 1 works on side by side; as many as keep the device busy when None.

    Raises:
        ValueError: the device cannot run Triton, or it cannot address such tensors.
    """
    _check(query, key, value)
    return _launch(query, key, value, importance, key.shape[2], scale, config, splits)


def triton_scored_streams(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, streams: Sequence[Stream], layer: int,
                          scale: float, table: torch.Tensor, config: Config | None = None,
                          splits: int | None = None) -> torch.Tensor:
    """As `naive_scored_streams`; table: of these streams, see `streams.new_table`.

    Raises:
        ValueError: the device cannot run Triton, it cannot address such tensors, or a stream is laid out otherwise than a state.
    """
    _check(query, key, value)
    for number, stream in enumerate(streams):
        parts = stream.key, stream.value, stream.importance
        if not all(part.is_contiguous() for part in parts) or any(part.data_ptr() % _ALIGNED for part in (table, *parts)) or \
                stream.key.stride(1) % 16 or (stream.key.dtype, stream.value.dtype) != (key.dtype, key.dtype):
            raise ValueError(f'stream {number} must be contiguous {key.dtype}, aligned to {_ALIGNED} bytes, with heads a '
                             f'multiple of 16 elements apart, got {stream.key.dtype} {tuple(stream.key.shape)} with strides '
                             f'{stream.key.stride()}')
    # Keys and values of streams are found from where the table itself lies.
    (tokens, head_dim), here = query.shape[2:], table.view(key.dtype)
    with _on(query.device):
        put_kernel[triton.cdiv(tokens, PUT.rows), len(streams) * key.shape[1]](
            key, value, table[layer], here, tokens, key.shape[1], *key.stride()[:3], *value.stride()[:3], HEAD_DIM=head_dim,
            HEAD_BLOCK=head_block(head_dim), ROWS=PUT.rows, num_warps=PUT.warps, maxnreg=PUT.registers)
    return _launch(query, here, here, None, max(stream.live for stream in streams), scale, config, splits, table[layer],
                   key.shape[1])


def _launch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, importance: torch.Tensor | None, keys: int,
            scale: float, config: Config | None, splits: int | None, table: torch.Tensor | None = None,
            kv_heads: int = 0) -> torch.Tensor:
    """All passes over `keys` keys: those of `key`, or, where there is a table, of the longest stream."""
    batch, q_heads, queries, head_dim = query.shape
    kv_heads = kv_heads or key.shape[1]
    group = q_heads // kv_heads
    rows, heads = queries * group, batch * kv_heads
    config = config or _config(query.device, head_dim, query.element_size())
    row_tiles = triton.cdiv(rows, config.forward.rows)
    if splits is None:
        splits = 1 if INTERPRETED else _splits(row_tiles * heads, keys, config.forward, query.device)
    # Whole tiles to each split, and no split without a key.
    keys_per_split = triton.cdiv(triton.cdiv(keys, config.forward.keys), splits) * config.forward.keys
    splits = triton.cdiv(keys, keys_per_split)

    # Padding between streams is written by nobody.
    output = (torch.empty if table is None else torch.zeros)(
        batch, queries, q_heads, head_dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    lse = torch.empty(batch, kv_heads, rows, dtype=torch.float32, device=query.device)
    if splits == 1:
        partial, partial_lse = output[None], lse
    else:
        partial = torch.empty(splits, batch, queries, q_heads, head_dim, dtype=torch.float32,
                              device=query.device).transpose(2, 3)
        partial_lse = torch.empty(splits, batch, kv_heads, rows, dtype=torch.float32, device=query.device)

    if table is None:
        strides, mass = (*key.stride()[:3], *value.stride()[:3]), (importance, *importance.stride()[:2])
    else:
        strides, mass = (0, 0, head_dim) * 2, (lse, 0, 0)
    scale_log2 = scale * math.log2(math.e)
    shape = {'GROUP': group, 'HEAD_DIM': head_dim, 'HEAD_BLOCK': head_block(head_dim)}
    with _on(query.device):
        forward_kernel[row_tiles, splits, heads](
            query, key, value, partial, partial_lse, table, scale_log2, queries, keys, keys_per_split, kv_heads,
            *query.stride()[:3], *strides, *partial.stride()[:4], **shape, **_options(config.forward, query.dtype))
        if splits > 1:
            combine_kernel[triton.cdiv(rows, COMBINE.rows), heads](
                partial, partial_lse, output, lse, table, queries, splits, kv_heads, *partial.stride()[:4], *output.stride()[:3],
                **shape, ROWS=COMBINE.rows, num_warps=COMBINE.warps, num_stages=COMBINE.stages, maxnreg=COMBINE.registers,
                enable_fp_fusion=True)
        # A tile of pass 2 holds whole queries.
        tile = config.mass._replace(rows=max(config.mass.rows, triton.next_power_of_2(group)))
        mass_kernel[triton.cdiv(keys, tile.keys), heads](
            query, key, lse, mass[0], table, scale_log2, queries, keys, kv_heads, *query.stride()[:3], *strides[:3], *mass[1:],
            **shape, **_options(tile, query.dtype))
    return output


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    if query.device.type != 'cuda' and not INTERPRETED:
        raise ValueError(f"implementation 'triton' needs tensors on a CUDA device, got {query.device}: use 'naive', or, for "
                         "Triton's interpreter, set TRITON_INTERPRET=1 before Python starts")
    if query.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"implementation 'triton' takes head_dim up to {MAX_HEAD_DIM}, got {query.shape[3]}: use 'naive'")
    for name, tensor, part, addressed in (('query', query, 'batch entry', (1, 2)), ('key', key, 'head', (2,)),
                                          ('value', value, 'head', (2,))):
        if tensor.stride(3) != 1:
            raise ValueError(f'{name} must be contiguous along head_dim (stride 1), got strides {tensor.stride()}: '
                             f'call {name}.contiguous()')
        # The kernels count these in 32 bits.
        if sum((tensor.shape[dim] - 1) * tensor.stride(dim) for dim in addressed) + head_block(tensor.shape[3]) >= 2**31:
            raise ValueError(f'{name} must span less than 2**31 elements in a {part}, got shape {tuple(tensor.shape)} with '
                             f'strides {tensor.stride()}')


@functools.lru_cache
def _config(device: torch.device, head_dim: int, itemsize: int) -> Config:
    if INTERPRETED:
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return find_config(10 * major + minor, head_dim, itemsize)


@functools.lru_cache(maxsize=1024)
def _splits(programs: int, keys: int, tile: Tile, device: torch.device) -> int:
    return choose_splits(programs, keys, tile, torch.cuda.get_device_properties(device).multi_processor_count)


def _options(tile: Tile, dtype: torch.dtype) -> dict:
    # 'ieee' matters to fp32 alone: its dots are exact rather than rounded to tf32.
    return {'ROWS': tile.rows, 'KEYS': tile.keys, 'PRECISION': 'ieee', 'UPCAST': INTERPRETED and dtype == torch.bfloat16,
            'num_warps': tile.warps, 'num_stages': tile.stages, 'maxnreg': tile.registers, 'enable_fp_fusion': True}


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    # Triton launches on the current device, which need not be the tensors'.
    return torch.cuda.device(device) if device.type == 'cuda' else contextlib.nullcontext()
