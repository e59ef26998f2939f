"""What the Qwen-VL families share: patches of two frames, frames of any size, M-RoPE."""
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from statekv_ros.backbones.base import StagedStep
from statekv_ros.backbones.checkpoint import Checkpoint
from statekv_ros.backbones.family import Family
from statekv_ros.backbones.patches import patchify
from statekv_ros.backbones.pixels import PixelSpec, Statistics
from statekv_ros.backbones.upload import to_device


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
        self._grids: dict[tuple[int, int, int], dict[str, torch.Tensor]] = {}

    def _visual_grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self._pixels.factor, width // self._pixels.factor

    @abstractmethod
    def _indices(self, grid: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the vision tower gathers by, from the patches of each step, [[1, rows, columns], ...] on the host."""

    @abstractmethod
    def _seen(self, step: StagedStep, visual: torch.Tensor,
              deepstack: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
        """What `_see` returns, from what the vision tower says, [rows, tokens, hidden] each."""

    def _see(self, step: StagedStep) -> tuple[torch.Tensor, dict[str, Any]]:
        """Rows go through the vision tower as images beside each other, which it keeps apart."""
        rows, (height, width) = len(step.token_ids), (side // self._pixels.patch_size for side in step.frames.shape[1:3])
        seen = self._model.model.visual(patchify(step.frames, self._pixels).to(self.dtype), **self._grid(rows, height, width))
        visual, *deepstack = (level.unflatten(0, (rows, -1)) for level in (
            seen.pooler_output, *(getattr(seen, 'deepstack_features', None) or ())))
        return self._seen(step, visual, deepstack)

    def _grid(self, images: int, height: int, width: int) -> dict[str, torch.Tensor]:
        """The grid's arguments of the vision tower, which would otherwise work them out, and wait for the device, every time.

        The grid and the ends of sequences stay on the host, where the tower reads them; the rest is on the device. Never
        dropped, because recorded graphs read it where it lies; frames come in few sizes.
        """
        if (images, height, width) not in self._grids:
            grid = torch.tensor([[1, height, width]] * images)
            self._grids[images, height, width] = {
                'grid_thw': grid, 'cu_seqlens': get_vision_cu_seqlens(grid),
                'position_ids': to_device(get_vision_position_ids(grid, self._pixels.merge_size), self.device),
                **self._indices(grid)}
        return self._grids[images, height, width]
