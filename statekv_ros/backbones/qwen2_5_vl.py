"""Qwen2.5-VL: two frames a step, one video for the whole stream, time in the positions instead of in text.

The prompt has one '<|vision_start|>' before the first step and one '<|vision_end|>' before the question; a step is its
visual tokens alone, one per 28x28 pixels. The system prompt is 'You are a helpful assistant.' unless the user gives
another.

Positions. All steps spread over the same heights and widths, from the position behind '<|vision_start|>'. On the time
axis a step stands at that position plus `tokens_per_second` times the seconds since the stream's first frame, rounded
down: what the library computes from a constant frame interval, and the true time where the interval varies, as a camera's
does. The text behind the video goes on behind the greatest position of any axis. That is the rule of the model's authors,
and the library's until version 4; its version 5 puts that text only max(rows, columns) behind the video's start, whatever
the video's length, which for more than a few seconds is in the midst of the video, where the model was never trained to
find a question. The two rules agree while the video lasts no longer than max(rows, columns) / tokens_per_second.

Only the time axis advances with the stream, so only it is shifted in an endless one.
"""
from collections.abc import Sequence
from typing import Any

import torch
from transformers.vision_utils import get_vision_window_index

from statekv_ros.backbones.base import StagedStep, TokenInputs
from statekv_ros.backbones.mrope import axes_in_sections, grid_positions
from statekv_ros.backbones.pixels import OPENAI_CLIP
from statekv_ros.backbones.qwen_vl import QwenVL
from statekv_ros.backbones.upload import to_device


class Qwen2_5VL(QwenVL):
    """Adapter around `Qwen2_5_VLForConditionalGeneration`."""
    default_system = 'You are a helpful assistant.'
    before_video = '<|im_start|>user\n<|vision_start|>'
    after_video = '<|vision_end|>'
    pixel_defaults = OPENAI_CLIP
    stream_axes = (0,)

    def _step_text(self, number: int, seconds: Sequence[float]) -> tuple[str, str]:
        return '', ''

    def _seen(self, step: StagedStep, visual: torch.Tensor,
              deepstack: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
        return visual, {}

    def _indices(self, grid: torch.Tensor) -> dict[str, torch.Tensor]:
        vision = self._model.config.vision_config
        windows, ends = get_vision_window_index(grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)
        return {'window_index': to_device(windows, self.device), 'cu_window_seqlens': ends}

    def _frequency_axes(self) -> torch.Tensor:
        return axes_in_sections(self._language.config.rope_parameters['mrope_section'])

    def largest_shift(self, inputs: TokenInputs) -> int:
        """Time stays behind the prefix, and the text that follows behind the grid, as in a short video."""
        grid_end = int(inputs.positions[1:].max()) + 1
        return max(0, min(inputs.start - len(self._prefix_ids), inputs.next_position - grid_end))

    def shifted(self, inputs: TokenInputs, shift: int) -> TokenInputs:
        moved = super().shifted(inputs, shift)
        if moved is not inputs:
            moved.positions[1:] = inputs.positions[1:]
        return moved

    def _step_positions(self, position: int, seconds: Sequence[float], before: int, rows: int, columns: int,
                        after: int) -> tuple[torch.Tensor, int]:
        """The next position never goes back, even when frames become smaller."""
        corner = len(self._prefix_ids)
        time = corner + int(seconds[0] * self._model.config.vision_config.tokens_per_second)
        return grid_positions(time, corner, rows, columns), max(position, time + 1, corner + rows, corner + columns)
