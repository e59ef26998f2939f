"""M-RoPE positions of the Qwen-VL families: every token has one position per axis (time, height, width)."""
import torch


def text_positions(position: int, tokens: int) -> torch.Tensor:
    """[3, 1, tokens]: text advances all three axes together."""
    return torch.arange(position, position + tokens).expand(3, 1, -1)


def grid_positions(time: int, corner: int, rows: int, columns: int) -> torch.Tensor:
    """[3, 1, rows * columns]: the tokens of one step share `time` and spread over height and width from `corner`."""
    height, width = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing='ij')
    return torch.stack([torch.full_like(height, time), height + corner, width + corner]).reshape(3, 1, -1)
