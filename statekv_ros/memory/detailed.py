"""The detailed cache: keys and values of every token that was seen, appended once in chunks and read only to answer."""
from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from statekv_ros.backbones.base import Backbone, TokenInputs
from statekv_ros.errors import ParameterError
from statekv_ros.memory.chunks import Block, Chunk, MemoryView, runs
from statekv_ros.memory.positions import PositionPolicy, StepPlace
from statekv_ros.memory.records import StepRecord


class DetailedCache:
    """Append-only store in chunks, with an optional bound on its bytes: past it, the oldest chunk is forgotten.

    A step never straddles two chunks, so every step is one contiguous view. The prefix has a chunk of its own that is
    never forgotten. `begin`, one `write` per layer, `commit`: a step that fails before `commit` leaves no trace.

    Within a chunk, keys stand at their true distances, whatever was re-indexed meanwhile: they are turned to that when
    written, once, and never again. A chunk spans no more positions than the model knows; an answer turns its query instead.

    Attributes:
        tokens: tokens held.
        forgotten_frames: camera frames that went with forgotten chunks.
    """

    def __init__(self, backbone: Backbone, chunk_tokens: int, max_bytes: int, positions: PositionPolicy):
        """
        Args:
            chunk_tokens: capacity of a chunk.
            max_bytes: bound on the bytes of all chunks but the prefix's, 0 for none.

        Raises:
            ParameterError: chunk_tokens is not positive, or max_bytes is too small for two chunks.
        """
        if chunk_tokens <= 0:
            raise ParameterError(f'chunk_tokens must be a positive number of tokens, got {chunk_tokens}')
        layout = backbone.layout
        least = 2 * chunk_tokens * layout.bytes_per_token
        if max_bytes and max_bytes < least:
            raise ParameterError(f'the detailed cache needs at least two chunks: {least} bytes at {chunk_tokens} tokens a '
                                 f'chunk, got {max_bytes} bytes: raise max_detailed_mb or lower chunk_tokens')
        self.layout = layout
        self.tokens = 0
        self.forgotten_frames = 0
        self._chunk_tokens = chunk_tokens
        self._max_bytes = max_bytes
        self._positions, self._backbone = positions, backbone
        self._turn = 0
        self._prefix: Chunk | None = None
        self._chunks: deque[Chunk] = deque()
        self._open: Chunk | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values held."""
        return self.tokens * self.layout.bytes_per_token

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all chunks, unused room included."""
        return sum(chunk.capacity for chunk in self._all()) * self.layout.bytes_per_token

    def begin(self, step: StepPlace, shift: int, prefix: bool = False) -> None:
        """Make room for a step that the model is given `shift` left of its true positions."""
        if prefix:
            self._open = self._prefix = self._new_chunk(step.tokens, 0)
        elif not self._chunks or not self._fits(step, self._chunks[-1]):
            tokens = max(step.tokens, self._chunk_tokens)
            self._forget_for(tokens)
            # A shift that stays leaves the chunk's keys as they come, not rounded once more. One that changes with
            # every step has them turned anyhow: then the chunk begins at position 0 and has all positions before it.
            stays = self._positions.lazy or not shift
            self._chunks.append(self._new_chunk(tokens, shift if stays else step.start))
        if not prefix:
            self._open = self._chunks[-1]
        self._turn = shift - self._open.shift

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keys and values [1, kv_heads, tokens, head_dim] of the step that was begun."""
        end = self._open.used + key.shape[2]
        self._open.key[layer, :, self._open.used:end] = self._backbone.rotate(key[0], self._turn) if self._turn else key[0]
        self._open.value[layer, :, self._open.used:end] = value[0]

    def write_all(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keys and values [layers, kv_heads, tokens, head_dim] of the step that was begun, instead of `write` for each layer."""
        end = self._open.used + key.shape[2]
        self._open.key[:, :, self._open.used:end] = self._backbone.rotate(key, self._turn) if self._turn else key
        self._open.value[:, :, self._open.used:end] = value

    def commit(self, record: StepRecord, inputs: TokenInputs) -> None:
        """Make the step that was begun part of the memory; `inputs` at their true positions."""
        chunk = self._open
        keys = chunk.key[:, :, chunk.used:chunk.used + record.tokens]
        # Rotation would blur the mean: the tokens of a step stand at different places. One pass over the step's own keys,
        # and one token's worth of memory a step.
        positions = self._backbone.shifted(inputs, chunk.shift).positions
        mean = self._backbone.unrotated(keys.float(), positions).mean(dim=2)[None]
        chunk.means = mean if chunk.means is None else torch.cat([chunk.means, mean])
        chunk.records.append(record)
        chunk.used += record.tokens
        self.tokens += record.tokens

    def of_heads(self, backbone: Backbone, heads: slice) -> DetailedCache:
        """What is held now of some KV heads, for reading: it shares its storage with this one. `backbone` has those heads."""
        part = copy.copy(self)
        part.layout, part._backbone, part._open = backbone.layout, backbone, None
        chunks = {id(chunk): replace(chunk, key=chunk.key[:, heads], value=chunk.value[:, heads],
                                     means=None if chunk.means is None else chunk.means[:, :, heads],
                                     records=[*chunk.records]) for chunk in self._all()}
        part._prefix = None if self._prefix is None else chunks[id(self._prefix)]
        part._chunks = deque(chunks[id(chunk)] for chunk in self._chunks)
        return part

    def records(self) -> Iterator[StepRecord]:
        """Every step held, oldest first, without the prefix."""
        for chunk in self._chunks:
            yield from chunk.records

    def blocks(self, wanted: Callable[[StepRecord], bool]) -> list[Block]:
        """The prefix and all wanted steps, oldest first. Nothing that comes later changes what lies there."""
        blocks = []
        for chunk in self._all():
            start = 0
            for number, record in enumerate(chunk.records):
                if record.step < 0 or wanted(record):
                    blocks.append(Block(chunk, number, start, record))
                start += record.tokens
        return blocks

    def view(self, wanted: Callable[[StepRecord], bool]) -> tuple[list[MemoryView], list[StepRecord]]:
        """The prefix and all wanted steps as they stand now; later appends do not show in it."""
        blocks = self.blocks(wanted)
        return [run.view() for run in runs(blocks)], [block.record for block in blocks if block.record.step >= 0]

    def _all(self) -> Iterator[Chunk]:
        if self._prefix is not None:
            yield self._prefix
        yield from self._chunks

    def _fits(self, step: StepPlace, chunk: Chunk) -> bool:
        return chunk.used + step.tokens <= chunk.capacity and not self._positions.passes_limit(step, chunk.shift)

    def _new_chunk(self, tokens: int, shift: int) -> Chunk:
        return Chunk(self.layout.empty(tokens), self.layout.empty(tokens), shift=shift)

    def _forget_for(self, tokens: int) -> None:
        room = self._max_bytes // self.layout.bytes_per_token - tokens
        while self._max_bytes and self._chunks and sum(chunk.capacity for chunk in self._chunks) > room:
            oldest = self._chunks.popleft()
            self.tokens -= oldest.used
            self.forgotten_frames += sum(record.frames for record in oldest.records)
