"""Qwen3-VL: two frames a step, a text timestamp before each step, DeepStack features, M-RoPE positions."""
from collections.abc import Sequence

import numpy as np
import torch

from statekv_ros.backbones.attention_hook import ATTENTION
from statekv_ros.backbones.base import AttentionMemory, Backbone, KVLayout, TokenInputs
from statekv_ros.backbones.checkpoint import Checkpoint
from statekv_ros.backbones.pixels import PixelSpec, patchify, resize


class Qwen3VL(Backbone):
    """Adapter around `Qwen3VLForConditionalGeneration`."""

    def __init__(self, checkpoint: Checkpoint, max_frame_pixels: int, min_frame_pixels: int, system_prompt: str):
        self.name = checkpoint.name
        self._model = checkpoint.model
        self._tokenizer = checkpoint.tokenizer
        self._language = self._model.model.language_model
        config = self._model.config
        text, vision = config.text_config, config.vision_config
        self._model.set_attn_implementation({'text_config': ATTENTION, 'vision_config': 'sdpa'})
        self.layout = KVLayout(text.num_hidden_layers, text.num_key_value_heads, text.head_dim,
                               self._model.dtype, self._model.device)
        self.frames_per_step = vision.temporal_patch_size
        self.max_position = text.max_position_embeddings
        self.stop_token_ids = checkpoint.stop_token_ids
        self._pixels = PixelSpec(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size,
                                 min_frame_pixels, max_frame_pixels,
                                 **checkpoint.pixel_statistics)
        self._video_token = config.video_token_id
        self._vision_start, self._vision_end = config.vision_start_token_id, config.vision_end_token_id
        system = f'<|im_start|>system\n{system_prompt}<|im_end|>\n' if system_prompt else ''
        self._prefix_text = f'{system}<|im_start|>user\n'

    def prepare(self, frame: np.ndarray) -> np.ndarray:
        return resize(frame, self._pixels)

    def prefix(self) -> TokenInputs:
        return self.embed(self._tokenize(self._prefix_text), 0)

    @torch.inference_mode()
    def encode(self, frames: Sequence[np.ndarray], seconds: Sequence[float], position: int) -> TokenInputs:
        patches = torch.from_numpy(patchify(frames, self._pixels)).to(self.device, self.dtype, non_blocking=True)
        rows = frames[0].shape[0] // self._pixels.factor
        columns = frames[0].shape[1] // self._pixels.factor
        merge = self._pixels.merge_size
        grid = torch.tensor([[1, rows * merge, columns * merge]], device=self.device)
        features = self._model.model.get_video_features(patches, grid)
        visual, deepstack = _joined(features.pooler_output), [_joined(f) for f in features.deepstack_features]

        before = [*self._tokenize(f'<{(seconds[0] + seconds[-1]) / 2:.1f} seconds>'), self._vision_start]
        embeds = torch.cat([self._embed_ids(before), visual[None].to(self.dtype), self._embed_ids([self._vision_end])],
                           dim=1)
        positions, next_position = _step_positions(position, len(before), rows, columns)
        is_visual = torch.zeros(1, embeds.shape[1], dtype=torch.bool)
        is_visual[:, len(before):-1] = True
        return TokenInputs(embeds, positions.to(self.device), next_position,
                           visual_start=len(before), visual_tokens=rows * columns,
                           extra={'visual_pos_masks': is_visual.to(self.device), 'deepstack_visual_embeds': deepstack})

    def tokenize_question(self, question: str) -> list[int]:
        # A question is data: text that looks like a special token must not become one.
        return [*self._tokenizer(question, add_special_tokens=False, split_special_tokens=True).input_ids,
                *self._tokenize('<|im_end|>\n<|im_start|>assistant\n')]

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int], position: int) -> TokenInputs:
        positions = torch.arange(position, position + len(token_ids), device=self.device)
        return TokenInputs(self._embed_ids(token_ids), positions.expand(3, 1, -1), position + len(token_ids))

    @torch.inference_mode()
    def forward(self, inputs: TokenInputs, memory: AttentionMemory) -> torch.Tensor:
        return self._language(inputs_embeds=inputs.embeds, position_ids=inputs.positions, use_cache=False,
                              statekv=memory, **inputs.extra).last_hidden_state

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.lm_head(hidden)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _tokenize(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _embed_ids(self, token_ids: Sequence[int]) -> torch.Tensor:
        return self._language.embed_tokens(torch.tensor([token_ids], device=self.device))


def _joined(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Library versions differ: one tensor, or one per video."""
    return features if torch.is_tensor(features) else torch.cat(tuple(features))


def _step_positions(position: int, before: int, rows: int, columns: int) -> tuple[torch.Tensor, int]:
    """M-RoPE positions [3, 1, tokens] (time, height, width) of `before` text tokens, a visual grid and one text token.

    Text advances all three axes together; the grid shares one time, spreads over height and width, and the text after it
    goes on behind the grid's longer side.
    """
    text = torch.arange(position, position + before).expand(3, -1)
    corner = position + before
    height, width = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing='ij')
    grid = torch.stack([torch.zeros_like(height), height, width]).flatten(1) + corner
    end = corner + max(rows, columns)
    return torch.cat([text, grid, torch.full((3, 1), end)], dim=1)[:, None], end + 1
