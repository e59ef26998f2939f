"""Attention of one frame step that also tells how much softmax mass each key received (its importance)."""
import math

import torch

from statekv_ros.kernels.fitness import choose, run

from .naive import naive_scored_attention

OPERATION = 'scored_attention'


def scored_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None,
                     implementation: str | None = None,
                     importance_out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefix-causal attention of a frame over [state ; frame], and the importance of each of those keys.

    Query i of the frame sees every key of the state and keys 0..i of the frame (StateKV, arXiv 2605.31598). The importance
    of key j is the softmax mass it received, summed over the frame's queries and over the query heads of its KV group, so
    the importances of one KV head sum to queries x group size. No gradient flows through it.

    Args:
        query: [batch, q_heads, queries, head_dim], bf16, fp16 or fp32; any strides, but 'triton' wants 1 for head_dim.
        key: [batch, kv_heads, keys, head_dim], keys >= queries: the state's keys first, then the frame's. Same dtype.
        value: as `key`.
        scale: factor on the scores, above 0; 1 / sqrt(head_dim) when None.
        implementation: 'triton' (CUDA; head_dim up to 256), 'naive' (any device), or None for 'triton' on CUDA where it
            runs and 'naive' elsewhere.
        importance_out: where to put the importance, [batch, kv_heads, keys] fp32, 1 apart along keys; a new tensor when None.

    Returns:
        output [batch, q_heads, queries, head_dim] in the dtype of `query`; importance [batch, kv_heads, keys] in fp32, which
        is `importance_out` where that was given.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other, or the implementation is unknown or cannot run here.

    Example:
        >>> q, k, v = torch.randn(1, 4, 3, 32), torch.randn(1, 2, 10, 32), torch.randn(1, 2, 10, 32)
        >>> output, importance = scored_attention(q, k, v)
        >>> output.shape, importance.shape, round(importance.sum().item())
        (torch.Size([1, 4, 3, 32]), torch.Size([1, 2, 10]), 12)
    """
    _check(query, key, value)
    importance = _importance(key, importance_out)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if not 0 < scale < math.inf:
        raise ValueError(f'scale must be a positive number, got {scale}')
    arguments = query, key, value, scale, importance
    output = run(OPERATION, implementation, query.device, lambda: _run_triton(*arguments),
                 lambda: naive_scored_attention(*arguments))
    return output, importance


def default_implementation(device: torch.device) -> str:
    """What `scored_attention` takes on this device when it is not told; warns (once) of a GPU without Triton."""
    return choose(OPERATION, device)


def _run_triton(*arguments) -> torch.Tensor:
    # Here rather than above: most machines without a GPU never need it, and some cannot install it.
    from .triton import triton_scored_attention
    return triton_scored_attention(*arguments)


def _importance(key: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    if given is None:
        return torch.empty(key.shape[:3], dtype=torch.float32, device=key.device)
    if (given.shape, given.dtype, given.device) != (key.shape[:3], torch.float32, key.device) or given.stride(2) != 1:
        raise ValueError(f'importance_out must be float32 {tuple(key.shape[:3])} on {key.device} with stride 1 along keys, got '
                         f'{given.dtype} {tuple(given.shape)} on {given.device} with strides {given.stride()}')
    return given


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    for name, tensor in (('query', query), ('key', key), ('value', value)):
        if tensor.ndim != 4:
            raise ValueError(f'{name} must be [batch, heads, tokens, head_dim], got {tensor.ndim} dimensions: '
                             f'{tuple(tensor.shape)}')
        if 0 in tensor.shape:
            raise ValueError(f'{name} must not be empty, got shape {tuple(tensor.shape)}')
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
