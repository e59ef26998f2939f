"""Top-B selection and slot update in plain torch, batched over all layers and KV heads, without a host synchronisation."""
import torch

_ORDINAL_BITS = 32
_LARGEST_ORDINAL = 2**_ORDINAL_BITS - 1


def select_slots(importance: torch.Tensor, ordinal: torch.Tensor, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows move where so that slots [0, budget) hold the most important tokens.

    Args:
        importance: [..., live] fp32, not negative.
        ordinal: [..., live] int64, each token's index in its stream (below 2**32); ties go to the smaller one.
        budget: tokens to keep, 0 < budget < live.

    Returns:
        source, target: [..., moves] int64 slots, moves = min(live - budget, budget). Survivors of the frame go to evicted
        slots; a pair that has nothing to move names one slot twice.
    """
    live = importance.shape[-1]
    moves = min(live - budget, budget)
    # The bits of a non-negative float grow with it: one integer carries importance and, below it, the tie-break.
    rank = (importance.contiguous().view(torch.int32).long() << _ORDINAL_BITS) | (_LARGEST_ORDINAL - ordinal)
    kept = torch.zeros_like(importance, dtype=torch.bool)
    kept.scatter_(-1, rank.topk(budget, dim=-1, sorted=False).indices, True)
    evicted, survivor = ~kept[..., :budget], kept[..., budget:]
    target = evicted.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :moves]
    source = survivor.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :moves] + budget
    count = survivor.sum(dim=-1, keepdim=True)
    moving = torch.arange(moves, device=importance.device) < count
    return torch.where(moving, source, target), target


def naive_update_state(key: torch.Tensor, value: torch.Tensor, ordinal: torch.Tensor, importance: torch.Tensor,
                       live: int, budget: int) -> int:
    """Arguments and results as in `update_state`."""
    if live <= budget:
        return live
    source, target = select_slots(importance[..., :live], ordinal[..., :live], budget)
    ordinal.scatter_(-1, target, ordinal.gather(-1, source))
    rows_from = source[..., None].expand(*source.shape, key.shape[-1])
    rows_to = target[..., None].expand_as(rows_from)
    for rows in (key, value):
        rows.scatter_(-2, rows_to, rows.gather(-2, rows_from))
    return budget
