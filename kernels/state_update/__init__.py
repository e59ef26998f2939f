"""The recurrent update of the compressed state: keep the B most important keys, moving only what changed."""
import torch

from .naive import naive_update_state
from .slots import move_rows, move_slots, select_slots

__all__ = ['move_rows', 'select_slots', 'update_state']
_IMPLEMENTATIONS = {'slots': move_slots, 'naive': naive_update_state}


def update_state(key: torch.Tensor, value: torch.Tensor, ordinal: torch.Tensor, importance: torch.Tensor, live: int,
                 budget: int, implementation: str = 'slots', beside: torch.Tensor | None = None) -> int:
    """Keep the `budget` most important of the first `live` slots, in place, for all layers and KV heads at once.

    The frame's tokens stand behind the state's slots; the survivors among them overwrite the slots of evicted tokens, so at
    most one frame of rows moves per head. Order inside the state has no meaning: keys carry their rotation.

    Args:
        key, value: [layers, kv_heads, capacity, head_dim], changed in place.
        ordinal: [layers, kv_heads, capacity] int64, index of each slot's token in its stream (below 2**32), changed in
            place; of equally important tokens the one with the smaller ordinal stays.
        importance: [layers, kv_heads, >= live] fp32, not negative.
        live: slots in use, state and frame together.
        budget: tokens to keep per layer and KV head.
        implementation: 'slots', or 'naive', which gathers all that is kept.
        beside: [n, layers, kv_heads, capacity], what else is known of each slot's token, changed in place as it moves; None:
            nothing.

    Returns:
        Slots in use afterwards: min(live, budget).

    Raises:
        ValueError: shapes or dtypes do not fit each other, budget is not positive, `live` is more than the slots given, or
            the implementation is unknown.

    Example:
        >>> key, value = torch.arange(4.).view(1, 1, 4, 1), torch.zeros(1, 1, 4, 1)
        >>> ordinal, importance = torch.arange(4).view(1, 1, 4), torch.tensor([[[0.1, 0.9, 0.3, 0.5]]])
        >>> update_state(key, value, ordinal, importance, live=4, budget=2)
        2
        >>> ordinal[..., :2].tolist(), key[..., :2, 0].tolist()
        ([[[3, 1]]], [[[3.0, 1.0]]])
    """
    if key.ndim != 4 or key.shape != value.shape:
        raise ValueError('key and value must have one shape [layers, kv_heads, capacity, head_dim], got '
                         f'{tuple(key.shape)} and {tuple(value.shape)}')
    if ordinal.shape != key.shape[:3] or ordinal.dtype != torch.int64:
        raise ValueError(f'ordinal must be int64 {tuple(key.shape[:3])} like key, got {ordinal.dtype} '
                         f'{tuple(ordinal.shape)}')
    if importance.shape[:-1] != key.shape[:2] or importance.dtype != torch.float32:
        raise ValueError(f'importance must be float32 {tuple(key.shape[:2])} x slots like key, got {importance.dtype} '
                         f'{tuple(importance.shape)}')
    if beside is not None and beside.shape[1:] != key.shape[:3]:
        raise ValueError(f'beside must be [n, {", ".join(map(str, key.shape[:3]))}] like key, got {tuple(beside.shape)}')
    if budget <= 0:
        raise ValueError(f'budget must be a positive number of tokens, got {budget}')
    if not 0 <= live <= min(key.shape[2], importance.shape[2]):
        raise ValueError(f'live must be at most {min(key.shape[2], importance.shape[2])} slots, got {live}')
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f'implementation must be one of {", ".join(_IMPLEMENTATIONS)}, got {implementation!r}')
    return _IMPLEMENTATIONS[implementation](key, value, ordinal, importance, live, budget, beside)
