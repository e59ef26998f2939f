"""Attention of one frame step that also tells how much softmax mass each key received (its importance)."""
import torch

from .naive import naive_scored_attention

_IMPLEMENTATIONS = {'naive': naive_scored_attention}


def scored_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None,
                     implementation: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefix-causal attention of a frame over [state ; frame], and the importance of each of those keys.

    Query i of the frame sees every key of the state and keys 0..i of the frame (StateKV, arXiv 2605.31598). The importance
    of key j is the softmax mass it received, summed over the frame's queries and over the query heads of its KV group, so
    the importances of one KV head sum to queries x group size.

    Args:
        query: [batch, q_heads, queries, head_dim], bf16, fp16 or fp32.
        key: [batch, kv_heads, keys, head_dim], keys >= queries: the state's keys first, then the frame's. Same dtype.
        value: as `key`.
        scale: factor on the scores; 1 / sqrt(head_dim) when None.
        implementation: 'naive' or None for the best one on the device.

    Returns:
        output [batch, q_heads, queries, head_dim] in the dtype of `query`; importance [batch, kv_heads, keys] in fp32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other, or the implementation is unknown.

    Example:
        >>> q, k, v = torch.randn(1, 4, 3, 32), torch.randn(1, 2, 10, 32), torch.randn(1, 2, 10, 32)
        >>> output, importance = scored_attention(q, k, v)
        >>> output.shape, importance.shape, round(importance.sum().item())
        (torch.Size([1, 4, 3, 32]), torch.Size([1, 2, 10]), 12)
    """
    _check(query, key, value)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    name = implementation or 'naive'
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f'implementation must be one of {sorted(_IMPLEMENTATIONS)}, got {name!r}')
    return _IMPLEMENTATIONS[name](query, key, value, scale)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    for name, tensor in (('query', query), ('key', key), ('value', value)):
        if tensor.ndim != 4:
            raise ValueError(f'{name} must be [batch, heads, tokens, head_dim], got {tensor.ndim} dimensions: '
                             f'{tuple(tensor.shape)}')
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f'{name} must be float32, float16 or bfloat16, got {tensor.dtype}')
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(f'{name} is {tensor.dtype} on {tensor.device} rather than {query.dtype} on {query.device} '
                             'like query')
    if key.shape != value.shape:
        raise ValueError(f'key and value must have the same shape, got {tuple(key.shape)} and {tuple(value.shape)}')
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f'query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch or head_dim')
    if query.shape[1] % key.shape[1]:
        raise ValueError(f'q_heads must be a multiple of kv_heads, got {query.shape[1]} and {key.shape[1]}')
    if key.shape[2] < query.shape[2]:
        raise ValueError(f'keys must hold the state and the frame, so at least {query.shape[2]} of them, '
                         f'got {key.shape[2]}')
