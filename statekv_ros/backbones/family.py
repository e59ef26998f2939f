"""What the model families have in common: chat text around the video, a text model with our attention, one way to a step."""
import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from statekv_ros.backbones.attention_hook import ATTENTION
from statekv_ros.backbones.base import AttentionMemory, Backbone, KVLayout, StagedStep, TokenInputs
from statekv_ros.backbones.checkpoint import Checkpoint
from statekv_ros.backbones.fingerprint import fingerprint
from statekv_ros.backbones.pixels import PixelSpec, SquareSpec, prepare
from statekv_ros.backbones.rope import freeze_rope, require_dynamic, rescaled, rotate
from statekv_ros.backbones.size import ModelSize
from statekv_ros.backbones.upload import to_device
from statekv_ros.backbones.weights import layer_bytes, unpacked_bytes, weight_bytes
from statekv_ros.errors import ModelError
from statekv_ros.kernels.paged_attention import Rope

_FLOATS = torch.float32, torch.float16, torch.bfloat16


class Family(Backbone):
    """A family states its chat text and its step; the rest is here.

    The prompt is `system` (with `default_system` where the user gives none), `before_video`, the steps, `after_video`, the
    question, `after_question`: what the family's own processor and chat template write, cut where the stream cuts it.

    Attributes:
        system: text of the system prompt's turn, with {} for the prompt; left out when there is no prompt.
        default_system: system prompt of the family's chat template.
        before_video, after_video, after_question: text around the video and the question.
        before_text: in place of `before_video` in a turn that holds text alone.
        special_tokens: must each be one token of the checkpoint's tokenizer.
        position_axes: 1, or 3 for M-RoPE (time, height, width).
        stream_axes: the first of them, along which a stream advances, and that shifting it moves.
    """
    system = '<|im_start|>system\n{}<|im_end|>\n'
    default_system = ''
    before_video = before_text = '<|im_start|>user\n'
    after_video = ''
    after_question = '<|im_end|>\n<|im_start|>assistant\n'
    special_tokens: tuple[str, ...] = ('<|im_start|>', '<|im_end|>')
    position_axes = 1
    stream_axes: tuple[int, ...] = (0,)

    def __init__(self, checkpoint: Checkpoint, pixels: PixelSpec | SquareSpec, language: PreTrainedModel,
                 head: torch.nn.Module, system_prompt: str, rope_length: int):
        """
        Args:
            language, head: the checkpoint's text model and the layer from hidden states to logits.
            rope_length: see `load_backbone`.

        Raises:
            ModelError: a special token is missing, or the text model attends in a way that the memory cannot replace.
        """
        self.name, self.demonstration = checkpoint.name, checkpoint.demonstration
        self._model, self._tokenizer = checkpoint.model, checkpoint.tokenizer
        self._head, self._pixels = head, pixels
        self.weights, self._fingerprint = checkpoint.weights, checkpoint.fingerprint
        config = language.config
        if 'sliding_attention' in (getattr(config, 'layer_types', None) or ()):
            raise ModelError(f'model {self.name!r} has layers with sliding-window attention, which the memory replaces: '
                             'set use_sliding_window to false in its config.json')
        self.max_position = freeze_rope(language, rope_length, self.name)
        language.set_attn_implementation(ATTENTION)
        head_dim = getattr(config, 'head_dim', None) or config.hidden_size // config.num_attention_heads
        self.layout = KVLayout(config.num_hidden_layers, config.num_key_value_heads, head_dim,
                               language.embed_tokens.weight.dtype, self._model.device)   # other weights may have 8 bits
        self.q_heads = config.num_attention_heads
        self.frames_per_step = 1
        self._take(language)
        ids = {token: self._token_id(token) for token in self.special_tokens}
        self.stop_token_ids = checkpoint.stop_token_ids | {ids['<|im_end|>']}
        prompt = system_prompt or self.default_system
        self._system_text = self.system.format(prompt) if prompt else ''
        self._prefix_ids = self._tokenize(self._system_text + self.before_video)

    @abstractmethod
    def _step_text(self, number: int, seconds: Sequence[float]) -> tuple[str, str]:
        """Text before and after the visual tokens of a step; `number` of its first frame counts from 1."""

    @abstractmethod
    def _see(self, step: StagedStep) -> tuple[torch.Tensor, dict[str, Any]]:
        """Visual tokens [rows, tokens, hidden] of a step on the device, and further keyword arguments of the text model."""

    @abstractmethod
    def _visual_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of a step's visual tokens, from the size of its prepared frames in pixels."""

    def _step_positions(self, position: int, seconds: Sequence[float], before: int, rows: int, columns: int,
                        after: int) -> tuple[torch.Tensor, int]:
        """Positions of a step's text, visual grid and text, and that of the token that follows; here one after another."""
        end = position + before + rows * columns + after
        return torch.arange(position, end)[None], end

    def _take(self, language: PreTrainedModel) -> None:
        """Run this text model from now on."""
        self._language = language
        self._frequencies = language.rotary_emb.inv_freq.float()
        self._axes = self._frequency_axes().to(self._frequencies.device)
        self._stream_frequencies = self._frequencies * torch.isin(self._axes, self._axes.new_tensor(self.stream_axes))

    def _frequency_axes(self) -> torch.Tensor:
        """Position axis that each RoPE frequency turns with, [head_dim / 2]."""
        return torch.zeros(len(self._frequencies), dtype=torch.long)

    def for_length(self, positions: int) -> 'Family':
        """This model with its dynamic-NTK RoPE scaled, once and for all, for so many positions, or itself where it is meant for as
        many. Weights are shared, and streams of both may run beside each other.

        Raises:
            ModelError: its RoPE is of another type.
        """
        require_dynamic(self._language, self.name)
        if positions <= self.max_position:
            return self
        other = copy.copy(self)
        other._take(rescaled(self._language, positions))
        other.max_position = positions
        return other

    def video_positions(self, seconds: Sequence[float], height: int, width: int) -> int:
        """Positions that the prefix and a video take, so that of the first token behind it.

        Args:
            seconds: time of each frame after the first.
            height, width: of its camera frames in pixels.
        """
        rows, columns = self._visual_grid(*self.frame_size(height, width))
        position = len(self._prefix_ids)
        for first in range(0, len(seconds), self.frames_per_step):
            times = seconds[first:first + self.frames_per_step]
            before, after = (len(self._tokenize(text)) for text in self._step_text(first + 1, times))
            _, position = self._step_positions(position, times, before, rows, columns, after)
        return position

    @property
    def model(self) -> PreTrainedModel:
        """The checkpoint's whole model."""
        return self._model

    @property
    def fingerprint(self) -> str:
        return self._fingerprint or fingerprint(self._model)

    def prepare(self, frame: np.ndarray) -> np.ndarray:
        return prepare(frame, self._pixels)

    def frame_size(self, height: int, width: int) -> tuple[int, int]:
        return self._pixels.frame_size(height, width)

    def prefix(self) -> TokenInputs:
        return self.embed(self._prefix_ids, 0)

    def encode(self, frames: Sequence[np.ndarray], seconds: Sequence[float], position: int,
               first_frame: int = 0) -> TokenInputs:
        return self.encode_step(self.stage(frames, seconds, position, first_frame))

    def encode_step(self, step: StagedStep) -> TokenInputs:
        """As `encode`, of what `stage` made of it."""
        return self.embed_step(step.on(self.device))

    def stage(self, frames: Sequence[np.ndarray], seconds: Sequence[float], position: int,
              first_frame: int = 0) -> StagedStep:
        """The host's part of `encode`: text, positions, and the frames side by side."""
        before, after = map(self._tokenize, self._step_text(first_frame + 1, seconds))
        rows, columns = self._visual_grid(*frames[0].shape[:2])
        positions, next_position = self._step_positions(position, seconds, len(before), rows, columns, len(after))
        start = int(positions.reshape(-1, positions.shape[-1])[:len(self.stream_axes), 0].min())
        frames = [*frames, *[frames[-1]] * (self.frames_per_step - len(frames))]
        return StagedStep(torch.from_numpy(np.stack(frames)), torch.tensor([before + after], dtype=torch.long), positions,
                          next_position, start, len(before), rows * columns)

    @torch.inference_mode()
    def embed_step(self, step: StagedStep) -> TokenInputs:
        """The device's part of `encode`: every shape depends on shapes alone and the host never waits, so that the device can
        replay it as a graph."""
        visual, extra = self._see(step)
        text = self._language.embed_tokens(step.token_ids)
        embeds = torch.cat([text[:, :step.visual_start], visual.to(self.dtype), text[:, step.visual_start:]], dim=1)
        return TokenInputs(embeds, step.positions, step.next_position, step.start, step.visual_start, step.visual_tokens,
                           extra)

    def step_tokens(self, height: int, width: int) -> int:
        rows, columns = self._visual_grid(*self.frame_size(height, width))
        return rows * columns + sum(len(self._tokenize(text)) for text in self._step_text(1, [0.0]))

    def size(self, height: int, width: int) -> ModelSize:
        config, layout = self._language.config, self.layout
        return ModelSize(
            self.name, weight_bytes(self._model), layout.layers, layout.kv_heads,
            self.q_heads, layout.head_dim, config.hidden_size, config.intermediate_size, config.vocab_size,
            layout.dtype.itemsize, self.step_tokens(height, width), self.frames_per_step, self.position_axes,
            layer_bytes(self._model), unpacked_bytes(self._model, self.weights, layout.dtype))

    def tokenize_question(self, question: str) -> list[int]:
        # White space around it could join a token with the text beside it.
        return [*self._tokenize(self.after_video), *self.tokenize_text(question.strip()),
                *self._tokenize(self.after_question)]

    def tokenize_text(self, text: str) -> list[int]:
        """Token ids of text that is data: what looks like a special token in it does not become one."""
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def text_turn(self) -> tuple[list[int], list[int]]:
        """Token ids before and after the text of a user's turn that holds no video; behind them the answer begins."""
        return self._tokenize(self._system_text + self.before_text), self._tokenize(self.after_question)

    def question_slice(self, token_ids: Sequence[int]) -> slice:
        return slice(len(self._tokenize(self.after_video)), len(token_ids) - len(self._tokenize(self.after_question)))

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int], position: int) -> TokenInputs:
        end = position + len(token_ids)
        return TokenInputs(self._embed_ids(token_ids), self._line(position, end), end, position)

    @torch.inference_mode()
    def embed_rows(self, token_ids: Sequence[int], positions: Sequence[int]) -> TokenInputs:
        """One text token a row, each at a position of its own; next_position and start are the first one's."""
        ids, places = to_device(torch.tensor([token_ids, positions], dtype=torch.long)[..., None], self.device)
        return replace(self.embed_there(ids, places), next_position=positions[0] + 1, start=positions[0])

    @torch.inference_mode()
    def embed_there(self, token_ids: torch.Tensor, positions: torch.Tensor) -> TokenInputs:
        """As `embed_rows`, of ids and positions on the device, [rows, 1] int64 each; next_position and start, which nobody has
        told the host, are 0."""
        places = positions if self.position_axes == 1 else positions.expand(self.position_axes, -1, -1)
        return TokenInputs(self._language.embed_tokens(token_ids), places, 0, 0)

    def pick(self, inputs: TokenInputs, chosen: torch.Tensor) -> TokenInputs:
        """Some of a step's visual tokens, with all that the text model is given of them, where they stand in the stream.

        chosen: indices among the step's visual tokens, [tokens] int64.
        """
        tokens = inputs.visual_start + chosen
        return replace(inputs, embeds=inputs.embeds[:, tokens], positions=inputs.positions[..., tokens], visual_start=0,
                       visual_tokens=len(chosen), extra={})

    def joined(self, parts: Sequence[TokenInputs]) -> TokenInputs:
        """What `pick` gave, one behind the other in one piece; positions stay as they are."""
        return replace(parts[0], embeds=torch.cat([part.embeds for part in parts], dim=1),
                       positions=torch.cat([part.positions for part in parts], dim=-1),
                       next_position=parts[-1].next_position, visual_tokens=sum(part.visual_tokens for part in parts))

    def in_line(self, inputs: TokenInputs, position: int) -> TokenInputs:
        """The same tokens at consecutive positions from `position` on, as text has them."""
        end = position + inputs.tokens
        return replace(inputs, positions=self._line(position, end), start=position, next_position=end)

    def rotate(self, vectors: torch.Tensor, positions: torch.Tensor | int) -> torch.Tensor:
        if torch.is_tensor(positions):
            positions = positions[..., None].float()
        return rotate(vectors, positions * self._stream_frequencies)

    def unrotated(self, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        per_axis = positions.reshape(-1, positions.shape[-1])
        return rotate(vectors, -per_axis[self._axes].T.float() * self._frequencies)

    @property
    def rope(self) -> Rope:
        return Rope(self._frequencies, self._stream_frequencies, self._axes)

    @property
    def key_bias(self) -> torch.Tensor | None:
        attentions = [layer.self_attn for layer in self._language.layers]
        # A norm behind the projection would turn its bias into something else for each token.
        if attentions[0].k_proj.bias is None or hasattr(attentions[0], 'k_norm'):
            return None
        biases = torch.stack([attention.k_proj.bias.float() for attention in attentions])
        return biases.view(len(biases), self.layout.kv_heads, -1) * self._language.rotary_emb.attention_scaling

    @cached_property
    def query_squares(self) -> torch.Tensor | None:
        squares = []
        for layer in self._language.layers:
            attention = layer.self_attn
            weight = getattr(attention.q_proj, 'weight', None)
            if type(weight) is not torch.nn.Parameter or weight.dtype not in _FLOATS:       # in few bits, by whatever library
                return None
            # Were the channels of what the norm gives independent, each as large as any other.
            weight = weight.float() * layer.input_layernorm.weight.float()
            square = weight.square().sum(dim=1)
            if attention.q_proj.bias is not None:
                square = square + attention.q_proj.bias.float().square()
            square = square.view(self.layout.kv_heads, -1, self.layout.head_dim)
            if hasattr(attention, 'q_norm'):
                square = square / square.mean(dim=-1, keepdim=True) * attention.q_norm.weight.float().square()
            # Channels that turn with each other are as large as each other, on the average of all positions.
            both = square.mean(dim=1).unflatten(-1, (2, -1)).mean(dim=1)
            squares.append(torch.cat([both, both], dim=-1) * attention.scaling ** 2)
        return torch.stack(squares)

    def starts(self, inputs: TokenInputs) -> torch.Tensor:
        positions = inputs.positions.reshape(-1, inputs.tokens)
        return positions[:len(self.stream_axes)].amin(dim=0)

    def largest_shift(self, inputs: TokenInputs) -> int:
        return int(inputs.positions.min())

    def shifted(self, inputs: TokenInputs, shift: int) -> TokenInputs:
        if not shift:
            return inputs
        return replace(inputs, positions=inputs.positions - shift, next_position=inputs.next_position - shift,
                       start=inputs.start - shift)

    @torch.inference_mode()
    def forward(self, inputs: TokenInputs, memory: AttentionMemory) -> torch.Tensor:
        return self._language(inputs_embeds=inputs.embeds, position_ids=inputs.positions, use_cache=False,
                              statekv=memory, **inputs.extra).last_hidden_state

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _line(self, position: int, end: int) -> torch.Tensor:
        """Positions that advance by one a token, on all axes."""
        positions = torch.arange(position, end, device=self.device)[None]
        return positions if self.position_axes == 1 else positions.expand(self.position_axes, 1, -1)

    def _tokenize(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _token_id(self, token: str) -> int:
        ids = self._tokenize(token)
        if len(ids) != 1:
            raise ModelError(f'the tokenizer of model {self.name!r} has no token {token!r}, which its family writes around '
                             'frames and turns: it is not the tokenizer of this checkpoint')
        return ids[0]

    def _embed_ids(self, token_ids: Sequence[int]) -> torch.Tensor:
        return self._language.embed_tokens(to_device(torch.tensor([token_ids], dtype=torch.long), self.device))
