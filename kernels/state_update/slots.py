"""The update by slots: survivors of the frame overwrite evicted tokens, batched over all layers and KV heads.

Every size depends on shapes alone, so the host never waits for the device, and the device can replay it as a graph.
"""
import torch

_ORDINAL_BITS = 32
_LARGEST_ORDINAL = 2**_ORDINAL_BITS - 1


def select_slots(importance: torch.Tensor, ordinal: torch.Tensor, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows move where so that slots [0, budget) hold the most important tokens.

    Works on what is dropped, a frame's worth of slots, rather than on what is kept, the whole budget.

    Args:
        importance: [..., live] fp32, not negative.
        ordinal: [..., live] int64, each token's index in its stream (below 2**32); ties go to the smaller one.
        budget: tokens to keep, 0 < budget < live.

    Returns:
        source, target: [..., moves] int64 slots, moves = min(live - budget, budget). Survivors from behind the budget go to
        slots of dropped tokens; a pair that has nothing to move names one slot twice.
    """
    over = importance.shape[-1] - budget
    moves = min(over, budget)
    # The bits of a non-negative float grow with it: one integer carries importance and, below it, the tie-break.
    rank = (importance.contiguous().view(torch.int32).long() << _ORDINAL_BITS) | (_LARGEST_ORDINAL - ordinal)
    dropped = rank.topk(over, dim=-1, largest=False, sorted=False).indices
    survives = torch.ones((*dropped.shape[:-1], over + 1), dtype=torch.int8, device=dropped.device)
    # The last column takes those dropped from within the budget.
    survives.scatter_(-1, torch.where(dropped < budget, over, dropped - budget), 0)
    # As many survive behind the budget as are dropped within it; each list has its own first, in the order of slots.
    source = survives[..., :over].argsort(dim=-1, descending=True, stable=True)[..., :moves] + budget
    target = dropped.sort(dim=-1).values[..., :moves]
    return torch.where(target < budget, source, target), target


def move_slots(key: torch.Tensor, value: torch.Tensor, ordinal: torch.Tensor, importance: torch.Tensor, live: int,
               budget: int, beside: torch.Tensor | None = None) -> int:
    """Arguments and results as in `update_state`."""
    if live <= budget:
        return live
    move_rows(key, value, ordinal, *select_slots(importance[..., :live], ordinal[..., :live], budget), beside)
    return budget


def move_rows(key: torch.Tensor, value: torch.Tensor, ordinal: torch.Tensor, source: torch.Tensor, target: torch.Tensor,
              beside: torch.Tensor | None = None) -> None:
    """Do what `select_slots` said, in place; what was moved stays in its old slot too, so that doing it again changes nothing.
    Other arguments as in `update_state`."""
    ordinal.scatter_(-1, target, ordinal.gather(-1, source))
    rows_from = source[..., None].expand(*source.shape, key.shape[-1])
    rows_to = target[..., None].expand_as(rows_from)
    for rows in (key, value):
        rows.scatter_(-2, rows_to, rows.gather(-2, rows_from))
    if beside is not None:
        there, here = (slots.expand(len(beside), *slots.shape) for slots in (target, source))
        beside.scatter_(-1, there, beside.gather(-1, here))
