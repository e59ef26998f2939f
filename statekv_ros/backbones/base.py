"""What the streaming memory needs to know of a model family: pixels in, embeddings and positions out."""
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from statekv_ros.backbones.size import ModelSize
from statekv_ros.backbones.upload import to_device
from statekv_ros.kernels.paged_attention import Rope


@dataclass(frozen=True)
class KVLayout:
    """Shape of the keys and values of one token: [layers, kv_heads, head_dim] each, in `dtype` on `device`."""
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    def empty(self, tokens: int) -> torch.Tensor:
        """Room for the keys (or the values) of `tokens` tokens: [layers, kv_heads, tokens, head_dim]."""
        return torch.empty(self.layers, self.kv_heads, tokens, self.head_dim, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class TokenInputs:
    """Tokens ready for the language model: one frame step, the prefix, or a piece of a question.

    Attributes:
        embeds: [rows, tokens, hidden]; one row, but for steps of several streams beside each other.
        positions: virtual positions as the model wants them, [rows, tokens] or [axes, rows, tokens] (M-RoPE).
        next_position: the virtual position of the token that follows.
        start: where the first token stands along the stream (M-RoPE: on the axes that advance with it).
        visual_start, visual_tokens: where the frame's visual tokens stand among these tokens.
        extra: keyword arguments of the family's language model (DeepStack features, for example).
    """
    embeds: torch.Tensor
    positions: torch.Tensor
    next_position: int
    start: int
    visual_start: int = 0
    visual_tokens: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.embeds.shape[1]


@dataclass(frozen=True)
class StagedStep:
    """One frame step as the device needs it, before the vision tower: three tensors and the numbers that shapes depend on. Or
    steps of several streams, a row for each: see `beside`.

    Attributes:
        frames: uint8 [rows x frames_per_step, height, width, 3], resized; the last one repeated where frames are missing.
        token_ids: int64 [rows, text tokens], the text before the visual tokens and, from `visual_start` on, behind them.
        positions, next_position, start, visual_start, visual_tokens: as in `TokenInputs`.
    """
    frames: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    next_position: int
    start: int
    visual_start: int
    visual_tokens: int

    @property
    def tokens(self) -> int:
        return self.token_ids.shape[1] + self.visual_tokens

    def on(self, device: torch.device) -> 'StagedStep':
        """The same step with its tensors on `device`, without making the host wait."""
        return replace(self, frames=to_device(self.frames, device), token_ids=to_device(self.token_ids, device),
                       positions=to_device(self.positions, device))


class AttentionMemory(Protocol):
    """What a forward pass attends to: called once per layer with that layer's rotated queries and keys."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float) -> torch.Tensor:
        """query [rows, q_heads, tokens, head_dim], key and value [rows, kv_heads, tokens, head_dim] -> output like query."""


class Backbone(ABC):
    """Adapter of one model family around a frozen model; holds no stream's state, so many streams share one.

    Attributes:
        name: where the checkpoint was loaded from.
        layout: shape of one token's keys and values; q_heads: query heads of a layer.
        frames_per_step: camera frames that one frame step consumes.
        max_position: positions the model was trained for.
        position_axes: numbers in a token's position.
        stop_token_ids: tokens that end an answer.
        weights: 'as_stored', or what the language model's weights were quantised to: 'int8' or 'int4'.
        demonstration: all that the model knows, where it is a demonstration whose answers no robot should act on; else empty.
    """
    name: str
    demonstration: str = ''
    weights: str = 'as_stored'
    layout: KVLayout
    q_heads: int
    frames_per_step: int
    max_position: int
    position_axes: int
    stop_token_ids: frozenset[int]

    @property
    def fingerprint(self) -> str:
        """Which model it is, wherever it was loaded from.

        Raises:
            NotImplementedError: it is none that a memory could be kept of.
        """
        raise NotImplementedError(f'{type(self).__name__} has no fingerprint')

    @property
    def device(self) -> torch.device:
        return self.layout.device

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in the detailed cache."""
        return self.layout.bytes_per_token

    @abstractmethod
    def prepare(self, frame: np.ndarray) -> np.ndarray:
        """Resize one frame, uint8 [height, width, 3] RGB, to the model's own size; runs on the CPU.

        Raises:
            FrameError: the frame is too small or too elongated for the model.
        """

    @abstractmethod
    def frame_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels to which `prepare` resizes a camera frame of this size.

        Raises:
            FrameError: as `prepare`.
        """

    @abstractmethod
    def prefix(self) -> TokenInputs:
        """The tokens before the first frame (chat template, system prompt), from position 0."""

    @abstractmethod
    def encode(self, frames: Sequence[np.ndarray], seconds: Sequence[float], position: int,
               first_frame: int = 0) -> TokenInputs:
        """One frame step: vision tower, wrapper tokens and positions of prepared frames of one size.

        Args:
            frames: as `prepare` returned them; fewer than `frames_per_step` are padded by repeating the last.
            seconds: time of each frame in the stream.
            position: virtual position of the step's first token.
            first_frame: number of the first of these frames in the stream, from 0; some families write it before the frame.
        """

    @abstractmethod
    def step_tokens(self, height: int, width: int) -> int:
        """Tokens of the stream's first step for camera frames of this size in pixels. Later steps may have a token or two
        more where the step's text counts frames or seconds.

        Raises:
            FrameError: as `prepare`.
        """

    @abstractmethod
    def size(self, height: int, width: int) -> ModelSize:
        """The model's sizes, with the step of camera frames of this size in pixels."""

    @abstractmethod
    def tokenize_question(self, question: str) -> list[int]:
        """Token ids from the end of the video to the start of the answer."""

    @abstractmethod
    def question_slice(self, token_ids: Sequence[int]) -> slice:
        """The question's own tokens among those of `tokenize_question`."""

    @abstractmethod
    def embed(self, token_ids: Sequence[int], position: int) -> TokenInputs:
        """Plain text tokens from virtual position `position`."""

    @abstractmethod
    def rotate(self, vectors: torch.Tensor, positions: torch.Tensor | int) -> torch.Tensor:
        """Keys or queries [..., tokens, head_dim] as if they had stood `positions` (int64 [..., tokens], or one number;
        negative: further left) further right along the stream. In fp32, returned in the dtype they came in.
        """

    @abstractmethod
    def unrotated(self, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys or queries [..., tokens, head_dim] as they are before any rotation, from those at `positions` (as in
        `TokenInputs`).
        """

    @property
    @abstractmethod
    def rope(self) -> Rope:
        """How keys turn with their positions, for kernels."""

    @property
    @abstractmethod
    def key_bias(self) -> torch.Tensor | None:
        """What the model adds to each token's keys before it rotates them, [layers, kv_heads, head_dim] fp32; None for
        nothing."""

    @property
    def query_squares(self) -> torch.Tensor | None:
        """About how large the squares of a rotated query's channels are, times the squared attention scale, going by the
        weights: [layers, kv_heads, head_dim] fp32; None where they do not tell."""
        return None

    @abstractmethod
    def starts(self, inputs: TokenInputs) -> torch.Tensor:
        """Where each token stands along the stream, [tokens] int64, never falling: the tokens of a grid share one place."""

    @abstractmethod
    def largest_shift(self, inputs: TokenInputs) -> int:
        """By how many positions a step can stand further left in the stream and still be laid out as the model knows it."""

    @abstractmethod
    def shifted(self, inputs: TokenInputs, shift: int) -> TokenInputs:
        """The same tokens `shift` positions further left in the stream."""

    @abstractmethod
    def forward(self, inputs: TokenInputs, memory: AttentionMemory) -> torch.Tensor:
        """Run the language model with its attention answered by `memory`; hidden states [rows, tokens, hidden]."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., hidden] -> logits [..., vocabulary]."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """Answer tokens to text, special tokens left out."""
