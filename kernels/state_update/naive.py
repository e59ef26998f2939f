"""The update from its definition, by sorting and gathering all that is kept: the specification of slots.py."""
import torch


def naive_update_state(key: torch.Tensor, value: torch.Tensor, ordinal: torch.Tensor, importance: torch.Tensor,
                       live: int, budget: int, beside: torch.Tensor | None = None) -> int:
    """Arguments and results as in `update_state`; the kept tokens end up in stream order."""
    if live <= budget:
        return live
    # Stable sorts: by ordinal first, so that of equally important tokens the earlier one comes first.
    by_ordinal = ordinal[..., :live].argsort(dim=-1, stable=True)
    by_importance = importance[..., :live].gather(-1, by_ordinal).argsort(dim=-1, descending=True, stable=True)
    kept = by_ordinal.gather(-1, by_importance[..., :budget].sort(dim=-1).values)
    ordinal[..., :budget] = ordinal.gather(-1, kept)
    for rows in (key, value):
        rows[..., :budget, :] = rows.gather(-2, kept[..., None].expand(*kept.shape, rows.shape[-1]))
    if beside is not None:
        beside[..., :budget] = beside.gather(-1, kept.expand(len(beside), *kept.shape))
    return budget
