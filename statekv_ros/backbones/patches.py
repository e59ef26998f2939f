"""From resized frames to what vision towers take, on the device: the numbers of the library's PIL/numpy image processors.

Frames travel to the device as the bytes that they are, a quarter of the traffic and none of the CPU time of fp32 patches.
"""
import functools

import numpy as np
import torch

from statekv_ros.backbones.pixels import PixelSpec, SquareSpec, Statistics
from statekv_ros.backbones.upload import to_device


def square_pixels(frames: torch.Tensor, spec: SquareSpec) -> torch.Tensor:
    """Prepared frames, uint8 [frames, size, size, 3] -> fp32 [frames, 3, size, size]."""
    return _normalise(frames.permute(0, 3, 1, 2), spec, channel_axis=1)


def patchify(frames: torch.Tensor, spec: PixelSpec) -> torch.Tensor:
    """Cut frames into patches and normalise them.

    Args:
        frames: uint8 [steps * spec.temporal_patch_size, tall, wide, 3], as `prepare` resized them, step after step.

    Returns:
        fp32 [patches, 3 * temporal * patch * patch], patches of one merged token next to each other.
    """
    _, tall, wide, channels = frames.shape
    time, patch, merge = spec.temporal_patch_size, spec.patch_size, spec.merge_size
    grid = frames.reshape(-1, time, tall // spec.factor, merge, patch, wide // spec.factor, merge, patch, channels)
    # -> [step, rows, columns, merge row, merge column, channel, time, y, x]
    order = grid.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return _normalise(order, spec, channel_axis=5).view(-1, channels * time * patch * patch)


def _normalise(values: torch.Tensor, spec: PixelSpec | SquareSpec, channel_axis: int) -> torch.Tensor:
    """uint8 with three channels along `channel_axis` -> fp32, contiguous: scaled to 0..1, then (value - mean) / std."""
    first = torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=values.device)
    index = values.int() + first.view(3, *[1] * (values.ndim - 1 - channel_axis))
    return _table(spec.mean, spec.std, values.device).index_select(0, index.flatten()).view(values.shape)


@functools.lru_cache(maxsize=None)
def _table(mean: Statistics, std: Statistics, device: torch.device) -> torch.Tensor:
    """Result for each of the 256 values of each channel, [768]: the library's arithmetic (scale in fp64, the rest in fp32)
    to the last bit. Never dropped, because recorded graphs read it where it lies."""
    values = (np.arange(256) * (1 / 255)).astype(np.float32)
    channels = [(values - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]
    return to_device(torch.from_numpy(np.concatenate(channels)), device)
