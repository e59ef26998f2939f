"""What the arguments of paged attention must be, told before a kernel computes nonsense from them."""
import torch

from .parts import Span
from .pool import PackedPool, Rope

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check(query, key, value, starts, lengths, moves, noted, rope, entries) -> None:
    """Raise ValueError, named by the argument, for what `paged_attention` cannot take."""
    _check_query(query)
    kv_heads, _, head_dim = query.shape
    if head_dim % 2:
        raise ValueError(f'head_dim must be even, for dimensions turn in pairs, got {head_dim}')
    packed = isinstance(key, PackedPool)
    capacity = _check_packed(key, value, kv_heads, head_dim) if packed else _check_raw(query, key, value)
    if starts.ndim != 2 or starts.shape[0] != kv_heads or starts.dtype != torch.int32:
        raise ValueError(f'starts must be int32 [{kv_heads}, pages], got {starts.dtype} {tuple(starts.shape)}')
    for name, tensor in (('lengths', lengths), ('moves', moves), ('entries', entries)):
        if tensor is not None and (tensor.shape != starts.shape or tensor.dtype != torch.int32):
            raise ValueError(f'{name} must be int32 {tuple(starts.shape)} like starts, got {tensor.dtype} '
                             f'{tuple(tensor.shape)}')
    if noted is not None and (noted.shape != (capacity,) or noted.dtype not in (torch.bool, torch.uint8)):
        raise ValueError(f'noted must be bool [{capacity}], one per row of the pool, got {noted.dtype} {tuple(noted.shape)}')
    if rope is None and (packed or moves is not None):
        raise ValueError(f'rope must be given: {"a PackedPool has its keys before RoPE" if packed else "moves turn the keys"}')
    if packed and entries is None:
        raise ValueError('entries must be given: they say which scale and zero each page of a PackedPool has')
    if rope is not None:
        _check_rope(rope, kv_heads, head_dim, capacity if packed else None)
    for name, tensor in (('starts', starts), ('lengths', lengths), ('moves', moves), ('entries', entries), ('noted', noted)):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f'{name} is on {tensor.device} rather than {query.device} like query')


def check_span(query: torch.Tensor, span: Span) -> None:
    """Raise ValueError for a span that such a query cannot read."""
    _check_query(query)
    tokens = _check_raw(query, span.key, span.value)
    if not 0 < span.new <= tokens or query.shape[1] % span.new:
        raise ValueError(f'span must have the {span.new} tokens that ask, and each KV head as many rows of each, got {tokens} '
                         f'tokens and {query.shape[1]} rows')
    if span.places is not None and (span.places.ndim != 1 or span.places.dtype != torch.int64
                                    or span.places.device != query.device):
        raise ValueError(f'places of span must be int64 [new] on {query.device} like query, got {span.places.dtype} '
                         f'{tuple(span.places.shape)} on {span.places.device}')


def _check_query(query: torch.Tensor) -> None:
    if query.ndim != 3 or 0 in query.shape or query.dtype not in _FLOATS:
        raise ValueError('query must be [kv_heads, rows, head_dim], not empty, in float32, float16 or bfloat16, got '
                         f'{query.dtype} {tuple(query.shape)}')


def _check_raw(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    for name, tensor in (('key', key), ('value', value)):
        if tensor is None or tensor.ndim != 3 or (tensor.shape[0], tensor.shape[2]) != (query.shape[0], query.shape[2]):
            raise ValueError(f'{name} must be [{query.shape[0]}, capacity, {query.shape[2]}] to go with query '
                             f'{tuple(query.shape)}, got {None if tensor is None else tuple(tensor.shape)}')
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(f'{name} is {tensor.dtype} on {tensor.device} rather than {query.dtype} on {query.device} '
                             'like query')
    if key.shape != value.shape:
        raise ValueError(f'key and value must have the same shape, got {tuple(key.shape)} and {tuple(value.shape)}')
    return key.shape[1]


def _check_packed(pool: PackedPool, value: torch.Tensor | None, kv_heads: int, head_dim: int) -> int:
    if value is not None:
        raise ValueError('value must be None with a PackedPool, which has the values too')
    if pool.bits not in (4, 8):
        raise ValueError(f'bits of a PackedPool must be 4 or 8, got {pool.bits}')
    capacity, page_capacity = pool.key_codes.shape[1], pool.key_scale.shape[1]
    codes = (kv_heads, capacity, head_dim * pool.bits // 8)
    for name in ('key_codes', 'value_codes', 'key_scale', 'key_zero', 'value_scale', 'value_zero'):
        tensor = getattr(pool, name)
        shape, dtype = (codes, torch.uint8) if name.endswith('codes') else ((kv_heads, page_capacity, head_dim), torch.float16)
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f'{name} of a PackedPool of {pool.bits} bits must be {dtype} {shape} with heads of {head_dim}, '
                             f'got {tensor.dtype} {tuple(tensor.shape)}')
    return capacity


def _check_rope(rope: Rope, kv_heads: int, head_dim: int, capacity: int | None) -> None:
    """`capacity` of a packed pool, None for a raw one."""
    for name in ('frequencies', 'stream_frequencies'):
        tensor = getattr(rope, name)
        if tensor.shape != (head_dim // 2,) or tensor.dtype != torch.float32:
            raise ValueError(f'{name} of rope must be float32 [{head_dim // 2}], got {tensor.dtype} {tuple(tensor.shape)}')
    if capacity is None:
        return
    if rope.axes is None or rope.axes.shape != (head_dim // 2,) or rope.axes.dtype not in (torch.int32, torch.int64):
        raise ValueError(f'axes of rope must be integers [{head_dim // 2}], got '
                         f'{None if rope.axes is None else (rope.axes.dtype, tuple(rope.axes.shape))}')
    positions = rope.positions
    if positions is None or positions.ndim != 2 or positions.shape[1] != capacity or positions.dtype != torch.int32:
        raise ValueError(f'positions of rope must be int32 [axes, {capacity}], one per row of the pool, got '
                         f'{None if positions is None else (positions.dtype, tuple(positions.shape))}')
    if rope.bias is not None and (rope.bias.shape != (kv_heads, head_dim) or rope.bias.dtype != torch.float32):
        raise ValueError(f'bias of rope must be float32 [{kv_heads}, {head_dim}], got {rope.bias.dtype} '
                         f'{tuple(rope.bias.shape)}')
