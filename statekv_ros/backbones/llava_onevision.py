"""LLaVA-OneVision: one frame a step, pooled to 196 visual tokens at 384x384, no text between frames.

The library ends a whole video with one newline embedding, at the place of a last '<video>' placeholder. A stream has no end,
so here the newline opens the question: `tokenize_question` begins with the id of '<video>', and `embed` gives that id the
newline's embedding, which it has nowhere else. No system prompt unless the user gives one.
"""
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from statekv_ros.backbones.base import TokenInputs
from statekv_ros.backbones.checkpoint import Checkpoint
from statekv_ros.backbones.pixels import OPENAI_CLIP
from statekv_ros.backbones.square_frames import SquareFrames


class LlavaOnevision(SquareFrames):
    """Adapter around `LlavaOnevisionForConditionalGeneration`."""
    system = '<|im_start|>system \n{}<|im_end|>'
    before_video = '<|im_start|>user '
    after_video = '<video>\n'
    before_text = '<|im_start|>user \n'
    after_question = '<|im_end|><|im_start|>assistant\n'
    special_tokens = ('<|im_start|>', '<|im_end|>', '<video>')
    pixel_defaults = OPENAI_CLIP

    def __init__(self, checkpoint: Checkpoint, max_frame_pixels: int, min_frame_pixels: int, system_prompt: str,
                 rope_length: int):
        model, vision = checkpoint.model, checkpoint.model.config.vision_config
        super().__init__(checkpoint, vision.image_size, math.ceil(vision.image_size // vision.patch_size / 2),
                         model.model.language_model, model.lm_head, system_prompt, rope_length)
        self._newline_id = self._token_id('<video>')

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int], position: int) -> TokenInputs:
        inputs = super().embed(token_ids, position)
        for index, token in enumerate(token_ids):
            if token == self._newline_id:
                inputs.embeds[0, index] = self._model.model.image_newline
        return inputs

    @torch.inference_mode()
    def embed_there(self, token_ids: torch.Tensor, positions: torch.Tensor) -> TokenInputs:
        inputs = super().embed_there(token_ids, positions)
        is_newline, newline = token_ids[..., None] == self._newline_id, self._model.model.image_newline
        return replace(inputs, embeds=torch.where(is_newline, newline, inputs.embeds))

    def _step_text(self, number: int, seconds: Sequence[float]) -> tuple[str, str]:
        return '', ''

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self._model.model.get_video_features(pixels[:, None]).pooler_output
        return features[:, :self._side ** 2]  # newer library versions put the newline behind them
