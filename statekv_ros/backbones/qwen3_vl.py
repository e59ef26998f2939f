"""Qwen3-VL: two frames a step, a text timestamp before each step, DeepStack features, M-RoPE positions.

A step is '<12.5 seconds><|vision_start|>', one visual token per 32x32 pixels, '<|vision_end|>'; the time is the mean of its
two frames'. No system prompt unless the user gives one.
"""
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from statekv_ros.backbones.base import TokenInputs
from statekv_ros.backbones.mrope import axes_interleaved, grid_positions, text_positions
from statekv_ros.backbones.pixels import HALF
from statekv_ros.backbones.qwen_vl import QwenVL, joined


class Qwen3VL(QwenVL):
    """Adapter around `Qwen3VLForConditionalGeneration`."""
    pixel_defaults = HALF

    def encode(self, frames: Sequence[np.ndarray], seconds: Sequence[float], position: int,
               first_frame: int = 0) -> TokenInputs:
        inputs = super().encode(frames, seconds, position, first_frame)
        is_visual = torch.zeros(1, inputs.tokens, dtype=torch.bool)
        is_visual[:, inputs.visual_start:inputs.visual_start + inputs.visual_tokens] = True
        inputs.extra['visual_pos_masks'] = is_visual.to(self.device)
        return inputs

    def pick(self, inputs: TokenInputs, chosen: torch.Tensor) -> TokenInputs:
        picked = super().pick(inputs, chosen)
        picked.extra['visual_pos_masks'] = torch.ones(1, len(chosen), dtype=torch.bool, device=self.device)
        picked.extra['deepstack_visual_embeds'] = [level[chosen] for level in inputs.extra['deepstack_visual_embeds']]
        return picked

    def joined(self, parts: Sequence[TokenInputs]) -> TokenInputs:
        extras = [part.extra for part in parts]
        return replace(super().joined(parts), extra={
            'visual_pos_masks': torch.cat([extra['visual_pos_masks'] for extra in extras], dim=1),
            'deepstack_visual_embeds': [torch.cat(level) for level in zip(*(e['deepstack_visual_embeds'] for e in extras))]})

    def _step_text(self, number: int, seconds: Sequence[float]) -> tuple[str, str]:
        return f'<{(seconds[0] + seconds[-1]) / 2:.1f} seconds><|vision_start|>', '<|vision_end|>'

    def _see(self, frames: Sequence[np.ndarray]) -> tuple[torch.Tensor, dict[str, Any]]:
        features = self._features(frames)
        return joined(features.pooler_output), {'deepstack_visual_embeds': [joined(f) for f in features.deepstack_features]}

    def _frequency_axes(self) -> torch.Tensor:
        return axes_interleaved(self._language.config.rope_parameters['mrope_section'])

    def _step_positions(self, position: int, seconds: Sequence[float], before: int, rows: int, columns: int,
                        after: int) -> tuple[torch.Tensor, int]:
        """The grid shares one time; the text behind it goes on behind the grid's longer side."""
        corner = position + before
        end = corner + max(rows, columns)
        return torch.cat([text_positions(position, before), grid_positions(corner, corner, rows, columns),
                          text_positions(end, after)], dim=2), end + after
