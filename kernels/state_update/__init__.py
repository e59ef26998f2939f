"""The recurrent update of the compressed state: keep the B most important keys, moving only what changed."""
import torch

from .naive import naive_update_state, select_slots

__all__ = ['select_slots', 'update_state']


def update_state(key: torch.Tensor, value: torch.Tensor, ordinal: torch.Tensor, importance: torch.Tensor, live: int,
                 budget: int) -> int:
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

    Returns:
        Slots in use afterwards: min(live, budget).

    Raises:
        ValueError: budget is not positive, or `live` is more than the slots given.
    """
    if budget <= 0:
        raise ValueError(f'budget must be a positive number of tokens, got {budget}')
    if live > key.shape[-2] or live > importance.shape[-1]:
        raise ValueError(f'live must be at most {min(key.shape[-2], importance.shape[-1])} slots, got {live}')
    return naive_update_state(key, value, ordinal, importance, live, budget)
