"""Qwen3-VL: two frames a step, a text timestamp before each step, DeepStack features, M-RoPE positions.

A step is '<12.5 seconds><|vision_start|>', one visual token per 32x32 pixels, '<|vision_end|>'; the time is the mean of its
two frames'. No system prompt unless the user gives one.
"""
from collections.abc import Sequence
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

    def visual_features(self, inputs: TokenInputs) -> torch.Tensor:
        """Input embeddings and, beside them, the DeepStack features that the first layers add to them."""
        return torch.cat([super().visual_features(inputs), *inputs.extra['deepstack_visual_embeds']], dim=1)

    def embed_features(self, features: torch.Tensor, position: int) -> TokenInputs:
        embeds, *deep = features.split(self._language.config.hidden_size, dim=1)
        inputs = super().embed_features(embeds, position)
        inputs.extra['visual_pos_masks'] = torch.ones(1, inputs.tokens, dtype=torch.bool, device=self.device)
        inputs.extra['deepstack_visual_embeds'] = deep
        return inputs

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
