"""The detailed cache: keys and values of every token that was seen, appended once in pages and read only to answer."""
from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from statekv_ros.backbones.base import Backbone, TokenInputs
from statekv_ros.errors import FrameError, ParameterError
from statekv_ros.memory.carried.positions import PositionPolicy, StepPlace
from statekv_ros.memory.detailed.index import DEFAULT_INDEX, INDEXES
from statekv_ros.memory.detailed.pages import HeldStep, MemoryView, Stretch, page_lengths, runs
from statekv_ros.memory.detailed.rows import RowPool
from statekv_ros.memory.detailed.table import PageTable
from statekv_ros.memory.records import StepRecord

PAGE_TOKENS = 64
_UNBOUNDED = 2**40
_BATCH = 8      # of a full pool this part is given back at once, so that what an answer reads is not overwritten at once


class DetailedCache:
    """Append-only, with an optional bound on its bytes: past it, the oldest steps are forgotten.

    Rows are in a pool, a step in one piece; the prefix has a place of its own and is never forgotten. `begin`, one `write` per
    layer, `commit`: a step that fails before `commit` leaves no trace. A machine whose memory is full counts as a bound.

    Attributes:
        pages: the pages held and their index entries; the prefix is not among them.
        tokens: tokens held.
        overwritten: ordinals below this one may have been overwritten by newer steps.
        forgotten_frames, forgotten_first_ns: camera frames that were forgotten, and the oldest header stamp among them.
    """

    def __init__(self, backbone: Backbone, max_bytes: int, positions: PositionPolicy, page_tokens: int = PAGE_TOKENS,
                 index: str = DEFAULT_INDEX):
        """
        Args:
            max_bytes: bound on the bytes of keys and values without the prefix's, 0 for none.
            page_tokens: a step is cut into pages of at most so many tokens.
            index: what describes a page; one of `INDEXES`.

        Raises:
            ParameterError: a size is not positive, or the index is unknown.
        """
        if page_tokens <= 0:
            raise ParameterError(f'page_tokens must be a positive number of tokens, got {page_tokens}')
        least = page_tokens * backbone.kv_bytes_per_token
        if max_bytes and max_bytes < least:
            raise ParameterError(f'the detailed cache needs room for at least a page of {page_tokens} tokens, {least} bytes, got '
                                 f'{max_bytes} bytes: raise max_detailed_mb')
        if index not in INDEXES:
            raise ParameterError(f'index must be one of {", ".join(INDEXES)}, got {index!r}')
        self.layout = backbone.layout
        self.tokens = self.overwritten = 0
        self.forgotten_frames = 0
        self.forgotten_first_ns: int | None = None
        self.pages = PageTable(backbone.layout, INDEXES[index])
        self._pool = RowPool(backbone.layout, max_bytes // backbone.kv_bytes_per_token if max_bytes else _UNBOUNDED)
        self._backbone, self._positions, self._page_tokens = backbone, positions, page_tokens
        self._steps: deque[HeldStep] = deque()
        self._leftovers: deque[tuple[int, int, int]] = deque()      # forgotten, still there: ordinal behind, first row, rows
        self._prefix: tuple[MemoryView, StepRecord] | None = None
        self._stretch: Stretch | None = None
        # Of the step that was begun: where it goes, the stretch, and how far its keys are turned on the way.
        self._key, self._value = self._pool.key, self._pool.value
        self._row = self._turn = 0

    @property
    def bytes(self) -> int:
        """Bytes that the cache takes: rows that are not in use, the prefix, index and page table included."""
        prefix = self._prefix[1].tokens if self._prefix else 0
        return self._pool.bytes + prefix * self.layout.bytes_per_token + self.pages.bytes

    def begin(self, step: StepPlace, shift: int, prefix: bool = False) -> None:
        """Make room for a step that the model is given `shift` left of its true positions.

        Raises:
            FrameError: the step alone is larger than the bound.
        """
        if prefix:
            self._key, self._value = self.layout.empty(step.tokens), self.layout.empty(step.tokens)
            self._row = self._turn = 0
            return
        self._row = self._make_room(step.tokens)
        self._key, self._value = self._pool.key, self._pool.value
        if self._stretch is None or self._leaves(step, self._stretch):
            # A shift that stays leaves the keys as they come, not rounded once more. One that changes with every step has them
            # turned anyhow: then the stretch begins at position 0 and has all positions before it.
            stays = self._positions.lazy or not shift
            self._stretch = Stretch(step.position, shift if stays else step.start)
        self._turn = shift - self._stretch.shift

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keys and values [1, kv_heads, tokens, head_dim] of the step that was begun."""
        rows = slice(self._row, self._row + key.shape[2])
        self._key[layer, :, rows] = self._backbone.rotate(key[0], self._turn) if self._turn else key[0]
        self._value[layer, :, rows] = value[0]

    def write_all(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keys and values [layers, kv_heads, tokens, head_dim] of the step that was begun, instead of `write` for each layer."""
        rows = slice(self._row, self._row + key.shape[2])
        self._key[:, :, rows] = self._backbone.rotate(key, self._turn) if self._turn else key
        self._value[:, :, rows] = value

    def commit(self, record: StepRecord, inputs: TokenInputs) -> None:
        """Make the step that was begun part of the memory; `inputs` at their true positions."""
        self.tokens += record.tokens
        if record.step < 0:
            ordinals = torch.arange(record.tokens, device=self.layout.device) + record.first_ordinal
            self._prefix = MemoryView(self._key, self._value, ordinals, record.position, 0), record
            return
        stretch, rows = self._stretch, slice(self._row, self._row + record.tokens)
        self._pool.take(self._row, record.tokens)
        self._pool.visual[rows] = False
        visual = self._row + record.visual_start
        self._pool.visual[visual:visual + record.visual_tokens] = True
        step = HeldStep(record, self._row, stretch, self.pages.stop, page_lengths(record.tokens, self._page_tokens),
                        inputs.positions)
        self._steps.append(step)
        # The index knows keys as if their stretch began at position 0: a query then stands alike before all that is far.
        keys = self._backbone.rotate(self._pool.key[:, :, rows].float(), stretch.shift - stretch.position)
        self.pages.append(self.pages.index.entries(keys, len(step.lengths)), step.row, record.tokens)

    def of_heads(self, backbone: Backbone, heads: slice) -> DetailedCache:
        """What is held now of some KV heads, for reading: it shares its storage with this one. `backbone` has those heads."""
        part = copy.copy(self)
        part.layout, part._backbone = backbone.layout, backbone
        part._pool = copy.copy(self._pool)
        part._pool.key, part._pool.value, part._pool.layout = self._pool.key[:, heads], self._pool.value[:, heads], part.layout
        part.pages = self.pages.of_heads(backbone.layout, heads)
        part._steps = deque(replace(step, mean=None if step.mean is None else step.mean[:, heads]) for step in self._steps)
        if self._prefix is not None:
            view, record = self._prefix
            part._prefix = replace(view, key=view.key[:, heads], value=view.value[:, heads]), record
        return part

    def records(self) -> Iterator[StepRecord]:
        """Every step held, oldest first, without the prefix."""
        return (step.record for step in self._steps)

    def steps(self, wanted: Callable[[StepRecord], bool] | None = None) -> list[HeldStep]:
        """All wanted steps (None: all), oldest first, without the prefix."""
        return [step for step in self._steps if wanted is None or wanted(step.record)]

    def prefix(self) -> list[MemoryView]:
        """The prefix, once it was seen."""
        return [self._prefix[0]] if self._prefix else []

    def view(self, steps: list[HeldStep]) -> MemoryView:
        """Steps that lie side by side, as `runs` finds them, where they lie."""
        first, last = steps[0], steps[-1]
        rows = slice(first.row, last.row + last.record.tokens)
        ordinals = torch.arange(rows.stop - rows.start, device=self.layout.device) + first.record.first_ordinal
        return MemoryView(self._pool.key[:, :, rows], self._pool.value[:, :, rows], ordinals, first.record.position,
                          first.stretch.shift, first.record.first_ordinal, reused=True)

    def views(self, steps: list[HeldStep] | None = None) -> list[MemoryView]:
        """The prefix and these steps (None: all) as they stand now; later steps do not show in it."""
        steps = list(self._steps) if steps is None else steps
        return [*self.prefix(), *(self.view(run) for run in runs(steps))]

    def rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values [layers, kv_heads, capacity, head_dim] of all rows, and whether they are visual tokens, [capacity]."""
        return self._pool.key, self._pool.value, self._pool.visual

    def mean_key(self, step: HeldStep) -> torch.Tensor:
        """A step's keys before rotation, averaged over its tokens: [layers, kv_heads, head_dim] fp32. Kept once computed."""
        if step.mean is None:
            # Rotation would blur the mean: the tokens of a step stand at different places.
            keys = self._pool.key[:, :, step.row:step.row + step.record.tokens].float()
            step.mean = self._backbone.unrotated(keys, self._turned(step)).mean(dim=2)
        return step.mean

    def _turned(self, step: HeldStep) -> torch.Tensor:
        """Positions of a step's tokens as its keys are rotated."""
        inputs = TokenInputs(torch.empty(1, 0, 0), step.positions, 0, 0)
        return self._backbone.shifted(inputs, step.stretch.shift).positions

    def _leaves(self, step: StepPlace, stretch: Stretch) -> bool:
        """Whether a step stands too far behind the beginning of a stretch to be part of it."""
        return self._positions.passes_limit(step, stretch.shift) or \
            step.next_position - stretch.position > self._positions.stretch

    def _make_room(self, tokens: int) -> int:
        """First of `tokens` free rows. Grows while it may, then forgets the oldest steps, some more than need be."""
        if tokens > self._pool.most:
            raise FrameError(f'this step has {tokens} tokens, and the detailed cache has room for {self._pool.most}: raise the '
                             'parameter "max_detailed_mb", or lower "max_frame_pixels"')
        row = self._pool.find(tokens)
        if row is None and self._grow(tokens):
            row = self._pool.find(tokens)
        if row is None:
            batch, given = self._pool.capacity // _BATCH, 0
            while self._steps and (row is None or given < batch):
                given += self._forget_oldest()
                row = self._pool.find(tokens)
            if row is None and self._grow(tokens):
                row = self._pool.find(tokens)
        if row is None:
            raise FrameError(f'there is no memory left for a step of {tokens} tokens')
        self._overwrite(row, tokens)
        return row

    def _overwrite(self, row: int, tokens: int) -> None:
        hit = [number for number, (_, first, rows) in enumerate(self._leftovers) if first < row + tokens and row < first + rows]
        for _ in range(hit[-1] + 1 if hit else 0):
            self.overwritten = self._leftovers.popleft()[0]

    def _grow(self, tokens: int) -> bool:
        steps = list(self._steps)
        try:
            if not self._pool.grow(tokens, [(step.row, step.record.tokens) for step in steps],
                                   lambda number, row: setattr(steps[number], 'row', row)):
                return False
        except torch.OutOfMemoryError:
            self._pool.most = self._pool.capacity   # what there is must do: forgetting keeps the camera seeing
            return False
        self.pages.line_up()
        self._leftovers.clear()
        return True

    def _forget_oldest(self) -> int:
        step = self._steps.popleft()
        record = step.record
        self._pool.give_back(step.row, record.tokens)
        self._leftovers.append((record.first_ordinal + record.tokens, step.row, record.tokens))
        self.pages.forget(len(step.lengths))
        self.tokens -= record.tokens
        self.forgotten_frames += record.frames
        self.forgotten_first_ns = min(self.forgotten_first_ns or record.first_stamp_ns, record.first_stamp_ns)
        return record.tokens
