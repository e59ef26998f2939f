"""M-RoPE positions of the Qwen-VL families: every token has one position per axis (time, height, width)."""
from collections.abc import Sequence

import torch


def text_positions(position: int, tokens: int) -> torch.Tensor:
    """[3, 1, tokens]: text advances all three axes together."""
    return torch.arange(position, position + tokens).expand(3, 1, -1)


def grid_positions(time: int, corner: int, rows: int, columns: int) -> torch.Tensor:
    """[3, 1, rows * columns]: the tokens of one step share `time` and spread over height and width from `corner`."""
    height, width = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing='ij')
    return torch.stack([torch.full_like(height, time), height + corner, width + corner]).reshape(3, 1, -1)


def axes_in_sections(sections: Sequence[int]) -> torch.Tensor:
    """Axis that each frequency turns with, [head_dim / 2]: one run of frequencies per axis (Qwen2.5-VL)."""
    return torch.arange(len(sections)).repeat_interleave(torch.tensor(sections))


def axes_interleaved(sections: Sequence[int]) -> torch.Tensor:
    """Axis that each frequency turns with, [head_dim / 2]: axes in turn, time where the others have run out (Qwen3-VL)."""
    axes = torch.zeros(sum(sections), dtype=torch.long)
    for axis in (1, 2):
        axes[axis:3 * sections[axis]:3] = axis
    return axes
