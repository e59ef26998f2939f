"""Many videos of one shape through the engine at once, for evaluations: to the memory, each video is some more KV heads.

Every policy treats KV heads apart, so the engine's own code keeps the videos apart; only the model sees a batch. All videos
need frames of one size at the same times, and questions asked together need equally many tokens.
"""
import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from statekv_ros.backbones.base import AttentionMemory, Backbone, TokenInputs
from statekv_ros.backbones.beside import Beside
from statekv_ros.backbones.family import Family
from statekv_ros.backbones.size import ModelSize
from statekv_ros.errors import QuestionError
from statekv_ros.kernels.paged_attention import Rope
from statekv_ros.memory import VideoStream
from statekv_ros.memory.answering.reading import read_snapshot
from statekv_ros.memory.answering.snapshot import take_snapshot
from statekv_ros.memory.policies import AnswerPolicy


class Lockstep(Backbone):
    """A backbone that watches `videos` videos; a frame of it is theirs, one below the other: [videos x height, width, 3].

    What the vision tower sees is remembered by step, so that further policies on the same videos need not look again: use one
    instance per set of videos.
    """

    def __init__(self, inner: Family, videos: int):
        self.inner, self.videos = inner, videos
        self.name, self.frames_per_step, self.max_position = inner.name, inner.frames_per_step, inner.max_position
        self.position_axes = inner.position_axes
        self.stop_token_ids, self.demonstration = inner.stop_token_ids, inner.demonstration
        self.layout = replace(inner.layout, kv_heads=videos * inner.layout.kv_heads)
        self.q_heads = videos * inner.q_heads
        self._seen: dict[tuple[int, int], TokenInputs] = {}

    def prepare(self, frame: np.ndarray) -> np.ndarray:
        return np.concatenate([self.inner.prepare(part) for part in np.split(frame, self.videos)])

    def frame_size(self, height: int, width: int) -> tuple[int, int]:
        tall, wide = self.inner.frame_size(height // self.videos, width)
        return self.videos * tall, wide

    def prefix(self) -> TokenInputs:
        inputs = self.inner.prefix()
        return replace(inputs, embeds=inputs.embeds.expand(self.videos, -1, -1))

    def encode(self, frames: Sequence[np.ndarray], seconds: Sequence[float], position: int,
               first_frame: int = 0) -> TokenInputs:
        if (first_frame, position) not in self._seen:
            parts = list(zip(*(np.split(frame, self.videos) for frame in frames)))
            step = Beside([self.inner.stage(part, seconds, position, first_frame) for part in parts]).step
            seen = self.inner.embed_step(step.on(self.device))
            self._seen[first_frame, position] = replace(seen, positions=seen.positions[..., :1, :])      # they are alike
        return self._seen[first_frame, position]

    def step_tokens(self, height: int, width: int) -> int:
        return self.inner.step_tokens(height // self.videos, width)

    def size(self, height: int, width: int) -> ModelSize:
        return self.inner.size(height // self.videos, width)

    def tokenize_question(self, question: str) -> list[int]:
        return self.inner.tokenize_question(question)

    def question_slice(self, token_ids: Sequence[int]) -> slice:
        return self.inner.question_slice(token_ids)

    def embed(self, token_ids: Sequence[int], position: int) -> TokenInputs:
        inputs = self.inner.embed(token_ids, position)
        return replace(inputs, embeds=inputs.embeds.expand(self.videos, -1, -1))

    def embed_each(self, token_ids: Sequence[Sequence[int]], position: int) -> TokenInputs:
        """As `embed`, with other tokens for each video."""
        parts = [self.inner.embed(ids, position) for ids in token_ids]
        return replace(parts[0], embeds=torch.cat([part.embeds for part in parts]))

    def rotate(self, vectors: torch.Tensor, positions: torch.Tensor | int) -> torch.Tensor:
        return self.inner.rotate(vectors, positions)

    def unrotated(self, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.inner.unrotated(vectors, positions)

    @property
    def rope(self) -> Rope:
        return self.inner.rope

    @property
    def key_bias(self) -> torch.Tensor | None:
        bias = self.inner.key_bias
        return None if bias is None else bias.repeat(1, self.videos, 1)

    @property
    def query_squares(self) -> torch.Tensor | None:
        squares = self.inner.query_squares
        return None if squares is None else squares.repeat(1, self.videos, 1)

    def starts(self, inputs: TokenInputs) -> torch.Tensor:
        return self.inner.starts(inputs)

    def largest_shift(self, inputs: TokenInputs) -> int:
        return self.inner.largest_shift(inputs)

    def shifted(self, inputs: TokenInputs, shift: int) -> TokenInputs:
        return self.inner.shifted(inputs, shift)

    def forward(self, inputs: TokenInputs, memory: AttentionMemory) -> torch.Tensor:
        """Hidden states [videos, tokens, hidden]."""
        return self.inner.forward(inputs, _Folded(memory))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner.logits(hidden)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.inner.decode(token_ids)


class _Folded:
    """Shows a memory the videos of a batch as KV heads."""

    def __init__(self, memory: AttentionMemory):
        self._memory = memory

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float) -> torch.Tensor:
        output = self._memory.attend(layer, *(part.reshape(1, -1, *part.shape[2:]) for part in (query, key, value)), scale)
        return output.reshape(query.shape)


@torch.inference_mode()
def answer_together(stream: VideoStream, questions: Sequence[str], answer_policy: AnswerPolicy,
                    max_tokens: int = 8) -> tuple[list[str], int]:
    """The most likely answer to each video's question, from what was seen until now, and how many tokens of its memory each
    could read; leaves no trace.

    Args:
        stream: of a `Lockstep`, with no frame waiting for its partner.
        questions: one per video.

    Raises:
        QuestionError: nothing seen yet, a frame waits, or the questions differ in tokens.
    """
    lockstep: Lockstep = stream.backbone
    asked = [lockstep.tokenize_question(question) for question in questions]
    if len(set(map(len, asked))) > 1:
        raise QuestionError(f'questions asked together need equally many tokens, got {sorted(set(map(len, asked)))}: ask those '
                            'of one length at a time')
    snapshot = take_snapshot(stream.seen(), answer_policy, (None, None))
    if snapshot.pending:
        raise QuestionError('a frame waits for its partner: ask after a whole step')
    if answer_policy.retrieves:
        raise QuestionError('videos in lockstep retrieve other steps each: ask one video at a time, see video_of')
    reading = read_snapshot(snapshot)
    position, told = snapshot.position, [[] for _ in questions]
    running = set(range(len(questions)))
    for _ in range(max_tokens):
        inputs = lockstep.embed_each(asked, position)
        reading.begin(inputs.tokens)
        hidden = lockstep.forward(inputs, reading)
        reading.commit()
        position = inputs.next_position
        asked = [[token] for token in lockstep.logits(hidden[:, -1]).argmax(dim=-1).tolist()]
        for row in sorted(running):
            if asked[row][0] in lockstep.stop_token_ids:
                running.remove(row)
            else:
                told[row].append(asked[row][0])
        if not running:
            break
    return [lockstep.decode(ids) for ids in told], reading.tokens


def video_of(stream: VideoStream, row: int) -> VideoStream:
    """One video's memory as it stands now, for asking it alone; not to be stepped, and without the answer policy `state`."""
    lockstep: Lockstep = stream.backbone
    heads = lockstep.inner.layout.kv_heads
    video = copy.copy(stream)
    video.backbone = lockstep.inner
    video.detailed = stream.detailed.of_heads(lockstep.inner, slice(row * heads, (row + 1) * heads))
    return video
