"""Frames resized without torchvision, as the library's own PIL/numpy image processors resize them, to the last bit."""
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from statekv_ros.errors import FrameError

MAX_ASPECT_RATIO = 200

Statistics = tuple[float, ...]
OPENAI_CLIP = {'mean': (0.48145466, 0.4578275, 0.40821073), 'std': (0.26862954, 0.26130258, 0.27577711)}
IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
HALF = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}


@dataclass(frozen=True)
class PixelSpec:
    """Patches of frames of any size, as the Qwen vision towers take them.

    Attributes:
        patch_size, merge_size: pixels per patch, patches per visual token (each along one side).
        temporal_patch_size: frames per patch.
        min_pixels, max_pixels: bounds on height x width of one resized frame.
        mean, std: per channel, on values 0..1.
        resample: PIL's number of the resize filter.
    """
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    mean: Statistics = HALF['mean']
    std: Statistics = HALF['std']
    resample: int = Image.Resampling.BICUBIC

    @property
    def factor(self) -> int:
        """Height and width of a resized frame are multiples of this many pixels: one visual token."""
        return self.patch_size * self.merge_size

    def frame_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a prepared frame: multiples of `factor`, nearest to the aspect ratio, area within the bounds.

        Raises:
            FrameError: an empty image, or sides that differ by more than a factor of 200.
        """
        _check_size(height, width)
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise FrameError(f'image sides may differ by a factor of {MAX_ASPECT_RATIO} at most, got {width}x{height}: '
                             'crop the camera image')
        factor, area = self.factor, height * width
        tall, wide = round(height / factor) * factor, round(width / factor) * factor
        if tall * wide > self.max_pixels:
            shrink = math.sqrt(area / self.max_pixels)
            tall = max(factor, math.floor(height / shrink / factor) * factor)
            wide = max(factor, math.floor(width / shrink / factor) * factor)
        elif tall * wide < self.min_pixels:
            grow = math.sqrt(self.min_pixels / area)
            tall = math.ceil(height * grow / factor) * factor
            wide = math.ceil(width * grow / factor) * factor
        return tall, wide


@dataclass(frozen=True)
class SquareSpec:
    """Frames squeezed into one square of fixed size, as the InternViT and SigLIP towers take a video's frames.

    Attributes:
        size: height and width in pixels.
        mean, std, resample: as in `PixelSpec`.
    """
    size: int
    mean: Statistics = HALF['mean']
    std: Statistics = HALF['std']
    resample: int = Image.Resampling.BICUBIC

    def frame_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a prepared frame.

        Raises:
            FrameError: an empty image.
        """
        _check_size(height, width)
        return self.size, self.size


def prepare(frame: np.ndarray, spec: PixelSpec | SquareSpec) -> np.ndarray:
    """Resize one frame, uint8 [height, width, 3], to `spec.frame_size`.

    Raises:
        FrameError: as `frame_size`.
    """
    tall, wide = spec.frame_size(*frame.shape[:2])
    if (tall, wide) == frame.shape[:2]:
        return frame
    return np.asarray(Image.fromarray(frame).resize((wide, tall), spec.resample))


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise FrameError(f'image must have at least one pixel, got {width}x{height}')
