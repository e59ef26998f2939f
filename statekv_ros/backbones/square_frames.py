"""What the families of fixed-size frames share: one square frame a step, a square grid of visual tokens, plain positions."""
from typing import Any

import torch
from transformers import PreTrainedModel

from statekv_ros.backbones.base import StagedStep
from statekv_ros.backbones.checkpoint import Checkpoint
from statekv_ros.backbones.family import Family
from statekv_ros.backbones.patches import square_pixels
from statekv_ros.backbones.pixels import SquareSpec, Statistics


class SquareFrames(Family):
    """Base of the adapters whose vision tower takes frames of one size.

    Attributes:
        pixel_defaults: mean and std of checkpoints that state none.
    """
    pixel_defaults: dict[str, Statistics]

    def __init__(self, checkpoint: Checkpoint, size: int, side: int, language: PreTrainedModel, head: torch.nn.Module,
                 system_prompt: str, rope_length: int):
        """
        Args:
            size: height and width of a frame in pixels.
            side: height and width of a frame in visual tokens.
        """
        pixels = SquareSpec(size, **{**self.pixel_defaults, **checkpoint.pixel_statistics})
        self._side = side
        super().__init__(checkpoint, pixels, language, head, system_prompt, rope_length)

    def _visual_grid(self, height: int, width: int) -> tuple[int, int]:
        return self._side, self._side

    def _see(self, step: StagedStep) -> tuple[torch.Tensor, dict[str, Any]]:
        return self._features(square_pixels(step.frames, self._pixels).to(self.dtype)), {}

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [rows, 3, size, size] -> visual tokens [rows, side * side, hidden]."""
        return self._model.model.get_image_features(pixels).pooler_output
