"""Qwen3-VL: two frames a step, a text timestamp before each step, DeepStack features, M-RoPE positions.

A step is '<12.5 seconds><|vision_start|>', one visual token per 32x32 pixels, '<|vision_end|>'; the time is the mean of its
two frames'. No system prompt unless the user gives one.
"""
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from statekv_ros.backbones.base import StagedStep, TokenInputs
from statekv_ros.backbones.checkpoint import Checkpoint
from statekv_ros.backbones.mrope import axes_interleaved, grid_positions, text_positions
from statekv_ros.backbones.pixels import HALF
from statekv_ros.backbones.qwen_vl import QwenVL
from statekv_ros.backbones.upload import to_device
from statekv_ros.errors import ModelError


class Qwen3VL(QwenVL):
    """Adapter around `Qwen3VLForConditionalGeneration`."""
    pixel_defaults = HALF

    def __init__(self, checkpoint: Checkpoint, max_frame_pixels: int, min_frame_pixels: int, system_prompt: str,
                 rope_length: int):
        super().__init__(checkpoint, max_frame_pixels, min_frame_pixels, system_prompt, rope_length)
        visual, layers = self._model.model.visual, self._language.layers
        taken, depth = list(visual.deepstack_visual_indexes), len(visual.blocks)
        if len(taken) > len(layers) or not all(0 <= index < depth for index in taken):
            raise ModelError(f'config.json of model {self.name!r} has deepstack_visual_indexes {taken}: they must be layers of '
                             f'the vision tower, 0 to {depth - 1}, and at most {len(layers)}')
        for depth, layer in enumerate(layers[:len(taken)]):
            layer.register_forward_hook(partial(_add_deepstack, depth), with_kwargs=True)

    def pick(self, inputs: TokenInputs, chosen: torch.Tensor) -> TokenInputs:
        picked = super().pick(inputs, chosen)
        picked.extra['deepstack'] = [level[:, inputs.visual_start + chosen] for level in inputs.extra['deepstack']]
        return picked

    def joined(self, parts: Sequence[TokenInputs]) -> TokenInputs:
        levels = zip(*(part.extra['deepstack'] for part in parts))
        return replace(super().joined(parts), extra={'deepstack': [torch.cat(level, dim=1) for level in levels]})

    def _step_text(self, number: int, seconds: Sequence[float]) -> tuple[str, str]:
        return f'<{(seconds[0] + seconds[-1]) / 2:.1f} seconds><|vision_start|>', '<|vision_end|>'

    def _seen(self, step: StagedStep, visual: torch.Tensor,
              deepstack: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
        text_behind = step.tokens - step.visual_start - step.visual_tokens
        return visual, {'deepstack': [pad(level.to(self.dtype), (0, 0, step.visual_start, text_behind))
                                      for level in deepstack]}

    def _indices(self, grid: torch.Tensor) -> dict[str, torch.Tensor]:
        tower = self._model.model.visual
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid, num_grid_per_side=tower.num_grid_per_side, mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners, spatial_merge_size=tower.spatial_merge_size)
        return {'interp_indices': to_device(indices, self.device), 'interp_weights': to_device(weights, self.device)}

    def _frequency_axes(self) -> torch.Tensor:
        return axes_interleaved(self._language.config.rope_parameters['mrope_section'])

    def _step_positions(self, position: int, seconds: Sequence[float], before: int, rows: int, columns: int,
                        after: int) -> tuple[torch.Tensor, int]:
        """The grid shares one time; the text behind it goes on behind the grid's longer side."""
        corner = position + before
        end = corner + max(rows, columns)
        return torch.cat([text_positions(position, before), grid_positions(corner, corner, rows, columns),
                          text_positions(end, after)], dim=2), end + after


def _add_deepstack(depth: int, layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any],
                   hidden: torch.Tensor) -> torch.Tensor | None:
    """Add one level of the vision tower's features, [rows, tokens, hidden] with zeros at the text, behind a decoder layer.

    The library adds them by a boolean mask, whose result has a shape that only the device knows, so that the host would wait
    for it in each of these layers.
    """
    levels = kwargs.get('deepstack')
    return None if levels is None else hidden + levels[depth]
