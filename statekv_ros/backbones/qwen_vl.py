"""What the Qwen-VL families share: patches of two frames, frames of any size, M-RoPE."""
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from statekv_ros.backbones.checkpoint import Checkpoint
from statekv_ros.backbones.family import Family
from statekv_ros.backbones.pixels import PixelSpec, Statistics, patchify


class QwenVL(Family):
    """Base of the adapters around the library's `Qwen2_5_VL...` and `Qwen3VL...` models.

    Attributes:
        pixel_defaults: mean and std of checkpoints that state none.
    """
    special_tokens = ('<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>')
    position_axes = 3
    stream_axes = (0, 1, 2)
    pixel_defaults: dict[str, Statistics]

    def __init__(self, checkpoint: Checkpoint, max_frame_pixels: int, min_frame_pixels: int, system_prompt: str,
                 rope_length: int):
        model, vision = checkpoint.model, checkpoint.model.config.vision_config
        pixels = PixelSpec(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, min_frame_pixels,
                           max_frame_pixels, **{**self.pixel_defaults, **checkpoint.pixel_statistics})
        super().__init__(checkpoint, pixels, model.model.language_model, model.lm_head, system_prompt, rope_length)
        self.frames_per_step = vision.temporal_patch_size

    def _visual_grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self._pixels.factor, width // self._pixels.factor

    def _features(self, frames: Sequence[np.ndarray]) -> Any:
        """Output of the vision tower for one step of prepared frames."""
        height, width = (side // self._pixels.patch_size for side in frames[0].shape[:2])
        return self._model.model.get_video_features(self._on_device(patchify(frames, self._pixels)),
                                                    torch.tensor([[1, height, width]], device=self.device))


def joined(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Library versions differ: one tensor, or one per video."""
    return features if torch.is_tensor(features) else torch.cat(tuple(features))
