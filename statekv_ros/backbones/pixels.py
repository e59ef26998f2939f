"""Pixels without torchvision: the resize rule and patch order of the Qwen vision towers, with PIL and numpy."""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from statekv_ros.errors import FrameError

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class PixelSpec:
    """How a checkpoint wants its pixels.

    Attributes:
        patch_size, merge_size: pixels per patch, patches per visual token (each along one side).
        temporal_patch_size: frames per patch.
        min_pixels, max_pixels: bounds on height x width of one resized frame.
        mean, std: per channel, on values 0..1.
    """
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def factor(self) -> int:
        """Height and width of a resized frame are multiples of this many pixels."""
        return self.patch_size * self.merge_size


def target_size(height: int, width: int, spec: PixelSpec) -> tuple[int, int]:
    """Height and width, multiples of `spec.factor`, nearest to the aspect ratio with an area within the bounds.

    Raises:
        FrameError: an empty image, or sides that differ by more than a factor of 200.
    """
    if min(height, width) < 1:
        raise FrameError(f'image must have at least one pixel, got {width}x{height}')
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise FrameError(f'image sides may differ by a factor of {MAX_ASPECT_RATIO} at most, got {width}x{height}: '
                         'crop the camera image')
    factor, area = spec.factor, height * width
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > spec.max_pixels:
        shrink = math.sqrt(area / spec.max_pixels)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif tall * wide < spec.min_pixels:
        grow = math.sqrt(spec.min_pixels / area)
        tall = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return tall, wide


def resize(frame: np.ndarray, spec: PixelSpec) -> np.ndarray:
    """uint8 [height, width, 3] -> uint8 [tall, wide, 3] of `target_size`, bicubic with antialiasing."""
    tall, wide = target_size(frame.shape[0], frame.shape[1], spec)
    if (tall, wide) == frame.shape[:2]:
        return frame
    return np.asarray(Image.fromarray(frame).resize((wide, tall), Image.Resampling.BICUBIC))


def patchify(frames: Sequence[np.ndarray], spec: PixelSpec) -> np.ndarray:
    """Normalise and cut frames of one size into patches.

    Args:
        frames: uint8 [tall, wide, 3], `spec.temporal_patch_size` of them or fewer (the last one is repeated).

    Returns:
        fp32 [patches, 3 * temporal * patch * patch], patches of one merged token next to each other.
    """
    frames = [*frames, *[frames[-1]] * (spec.temporal_patch_size - len(frames))]
    pixels = np.stack(frames).astype(np.float32) * np.float32(1 / 255)
    pixels = (pixels - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    time, tall, wide, channels = pixels.shape
    patch, merge = spec.patch_size, spec.merge_size
    grid = pixels.reshape(time, tall // spec.factor, merge, patch, wide // spec.factor, merge, patch, channels)
    # -> [rows, columns, merge row, merge column, channel, time, y, x]
    order = grid.transpose(1, 4, 2, 5, 7, 0, 3, 6)
    return np.ascontiguousarray(order).reshape(-1, channels * time * patch * patch)
