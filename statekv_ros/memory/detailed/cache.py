"""The detailed cache: keys and values of every token that was seen, appended once in pages and read only to answer."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

import torch

from statekv_ros.backbones.base import Backbone, TokenInputs
from statekv_ros.errors import FrameError, ParameterError
from statekv_ros.kernels.paged_attention import PackedPool, Rope
from statekv_ros.memory.carried.positions import PositionPolicy, StepPlace
from statekv_ros.memory.detailed.exact import ExactSteps
from statekv_ros.memory.detailed.formats import RAW, find_format
from statekv_ros.memory.detailed.index import DEFAULT_INDEX, INDEXES
from statekv_ros.memory.detailed.packed import PackedSteps
from statekv_ros.memory.detailed.pages import HeldStep, MemoryView, Stretch, page_lengths, runs
from statekv_ros.memory.detailed.rows import TokenRows
from statekv_ros.memory.detailed.table import PageTable
from statekv_ros.memory.records import StepRecord

PAGE_TOKENS = 64
EXACT_STEPS = 4     # the newest ones, which stay in the model's own dtype whatever the format
_BATCH = 8      # of a full pool this part is given back at once, so that what an answer reads is not overwritten at once


class DetailedCache:
    """Append-only, with an optional bound on its bytes: past it, the oldest steps are forgotten.

    Rows are in a pool, a step in one piece; the prefix has a place of its own and is never forgotten. `begin`, one `write` per
    layer, `commit`: a step that fails before `commit` leaves no trace. A machine whose memory is full counts as a bound.

    With a format of few bits the newest `EXACT_STEPS` steps are there as they came (fewer where the bound leaves no room for
    them); a step that leaves them is quantised, once, into a pool of its own.

    Attributes:
        pages: the pages held and their index entries; the prefix is not among them.
        tokens: tokens held.
        forgotten_frames, forgotten_first_ns: camera frames that were forgotten, and the oldest header stamp among them.
    """

    def __init__(self, backbone: Backbone, max_bytes: int, positions: PositionPolicy, page_tokens: int = PAGE_TOKENS,
                 index: str = DEFAULT_INDEX, detailed_format: str = RAW.name):
        """
        Args:
            max_bytes: bound on the bytes of keys and values, exact or in few bits, without the prefix's; 0 for none.
            page_tokens: a step is cut into pages of at most so many tokens.
            index: what describes a page; one of `INDEXES`.
            detailed_format: how pages are stored; one of `FORMATS`.

        Raises:
            ParameterError: a size is not positive, the index or format is unknown, or the format cannot hold such heads.
        """
        if page_tokens <= 0:
            raise ParameterError(f'page_tokens must be a positive number of tokens, got {page_tokens}')
        if index not in INDEXES:
            raise ParameterError(f'index must be one of {", ".join(INDEXES)}, got {index!r}')
        self.layout = backbone.layout
        self.tokens = 0
        self.forgotten_frames = 0
        self.forgotten_first_ns: int | None = None
        self.pages = PageTable(backbone.layout, INDEXES[index])
        self._form = form = find_format(detailed_format)
        self._packed = None if form.rotated else PackedSteps(self.layout, self.pages, form, backbone.position_axes)
        self._bias = backbone.key_bias if self._packed else None
        self._exact = ExactSteps(self.layout, self.pages, EXACT_STEPS if self._packed else 0)
        self._backbone, self._positions, self._page_tokens, self._max_bytes = backbone, positions, page_tokens, max_bytes
        if max_bytes:
            shares = 2 if self._packed else 1       # with few bits, one half is for these at least
            self._exact.most = max_bytes // shares // self._exact.row_bytes
            if self._exact.most < page_tokens:
                raise ParameterError(f'the detailed cache needs room for at least {shares} page(s) of {page_tokens} tokens, '
                                     f'{shares * page_tokens * self._exact.row_bytes} bytes, got '
                                     f'{max_bytes} bytes: raise max_detailed_mb')
        self._prefix: tuple[MemoryView, StepRecord] | None = None
        self._stretch: Stretch | None = None
        # Of the step that was begun: where it goes, the stretch, and how far its keys are turned on the way.
        self._key, self._value, _ = self._exact.rows
        self._row = self._turn = 0

    @property
    def bytes(self) -> int:
        """Bytes that the cache takes: rows that are not in use, the prefix, index and page table included."""
        prefix = self._prefix[1].tokens if self._prefix else 0
        packed = self._packed.bytes if self._packed else 0
        return self._exact.bytes + packed + prefix * self.layout.bytes_per_token + self.pages.bytes

    @property
    def overwritten(self) -> int:
        """Ordinals below this one may have been overwritten by newer steps."""
        return self._exact.overwritten

    @property
    def packs(self) -> bool:
        """Whether steps are put into few bits; then they are read by pages, for they move while an answer is decoded."""
        return self._packed is not None

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
        self._key, self._value, _ = self._exact.rows
        if self._stretch is None or self._leaves(step, self._stretch):
            # A shift that stays leaves the keys as they come, not rounded once more. One that changes with every step has them
            # turned anyhow: then the stretch begins at position 0 and has all positions before it.
            stays = self._positions.lazy or not shift
            self._stretch = Stretch(step.position, shift if stays else step.start)
        self._turn = shift - self._stretch.shift

    @property
    def stretch(self) -> Stretch | None:
        """The one that the newest step stands in."""
        return self._stretch

    def resume(self, stretch: Stretch) -> None:
        """The step that comes next stood in this stretch before: `begin`, `write_all` and `commit` then make it what it was."""
        if stretch != self._stretch:    # steps of one stretch share the object, by which runs are found
            self._stretch = stretch

    def room(self) -> int:
        """Tokens that may be held at once, about."""
        if not self._packed or not self._max_bytes:
            return self._exact.most
        return int(self._max_bytes / self._form.bytes_per_token(self.layout, self._page_tokens))

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
        if record.step < 0:
            ordinals = torch.arange(record.tokens, device=self.layout.device) + record.first_ordinal
            self._prefix = MemoryView(self._key, self._value, ordinals, record.position, 0), record
            self.tokens += record.tokens
            return
        while self._packed and len(self._exact.steps) >= EXACT_STEPS:   # first, for it may find that memory is full
            self._pack_oldest()
        stretch, rows = self._stretch, slice(self._row, self._row + record.tokens)
        # A copy: where a recorded graph has its positions, the next step's will be.
        positions = self._backbone.shifted(inputs, stretch.shift).positions.to(torch.int32, copy=True)
        lengths = page_lengths(record.tokens, self._page_tokens)
        step = HeldStep(record, self._row, stretch, self.pages.stop, lengths, positions)
        self._exact.append(step)
        self.tokens += record.tokens
        # The index knows keys as if their stretch began at position 0: a query then stands alike before all that is far.
        keys = self._backbone.rotate(self._exact.rows.key[:, :, rows].float(), stretch.shift - stretch.position)
        self.pages.append(self.pages.index.entries(keys, len(lengths)), step.row, record.tokens)

    def of_heads(self, backbone: Backbone, heads: slice) -> DetailedCache:
        """What is held now of some KV heads, for reading: it shares its storage with this one. `backbone` has those heads."""
        part = copy.copy(self)
        part.layout, part._backbone = backbone.layout, backbone
        part.pages = self.pages.of_heads(backbone.layout, heads)
        part._exact = self._exact.of_heads(heads)
        if self._packed:
            part._packed, part._bias = self._packed.of_heads(heads), backbone.key_bias
        if self._prefix is not None:
            view, record = self._prefix
            part._prefix = replace(view, key=view.key[:, heads], value=view.value[:, heads]), record
        return part

    def records(self) -> Iterator[StepRecord]:
        """Every step held, oldest first, without the prefix."""
        return (step.record for step in self._held())

    def steps(self, wanted: Callable[[StepRecord], bool] | None = None) -> list[HeldStep]:
        """All wanted steps (None: all), oldest first, without the prefix."""
        return list(self._held()) if wanted is None else [step for step in self._held() if wanted(step.record)]

    def prefix(self) -> list[MemoryView]:
        """The prefix, once it was seen."""
        return [self._prefix[0]] if self._prefix else []

    def view(self, steps: list[HeldStep]) -> MemoryView:
        """Exact steps that lie side by side, as `runs` finds them, where they lie."""
        return self._exact.view(steps)

    def views(self, steps: list[HeldStep] | None = None, near: int = 0) -> list[MemoryView]:
        """The prefix and these exact steps (None: all) as they stand now; later steps do not show in it. `near`: as of `runs`."""
        steps = list(self._exact.steps) if steps is None else steps
        return [*self.prefix(), *(self.view(run) for run in runs(steps, near=near))]

    def rows(self) -> TokenRows:
        """All rows of exact steps."""
        return self._exact.rows

    def packed(self, layer: int) -> tuple[PackedPool, Rope, torch.Tensor]:
        """All rows of one layer of the steps in few bits, how they turn, and whether they are visual tokens, [capacity]."""
        rows, bias = self._packed.rows, None if self._bias is None else self._bias[layer]
        rope = replace(self._backbone.rope, positions=rows.positions, bias=bias)
        return self._packed.layer(layer), rope, rows.visual

    def mean_key(self, step: HeldStep) -> torch.Tensor:
        """A step's keys before rotation, averaged over its tokens: [layers, kv_heads, head_dim] fp32. Kept once computed."""
        if step.mean is None:
            # Rotation would blur the mean: the tokens of a step stand at different places.
            if step.slot is None:
                step.mean = self._unrotated(step).mean(dim=2)
            else:
                step.mean = self._packed.decoded(step)[0].mean(dim=2)
                step.mean += 0 if self._bias is None else self._bias
        return step.mean

    def _held(self) -> Iterator[HeldStep]:
        return chain(self._packed.steps if self._packed else (), self._exact.steps)

    def _unrotated(self, step: HeldStep) -> torch.Tensor:
        """Keys of an exact step before rotation, fp32."""
        rows = slice(step.row, step.row + step.record.tokens)
        return self._backbone.unrotated(self._exact.rows.key[:, :, rows].float(), step.positions)

    def _leaves(self, step: StepPlace, stretch: Stretch) -> bool:
        """Whether a step stands too far behind the beginning of a stretch to be part of it."""
        return self._positions.passes_limit(step, stretch.shift) or \
            step.next_position - stretch.position > self._positions.stretch

    def _make_room(self, tokens: int) -> int:
        """First of `tokens` free rows. Grows while it may, then packs the oldest steps, or forgets them, more than need be."""
        exact = self._exact
        if tokens > exact.most:
            raise FrameError(f'this step has {tokens} tokens, and the detailed cache has room for {exact.most}: raise the '
                             'parameter "max_detailed_mb", or lower "max_frame_pixels"')
        row = exact.find(tokens, self._make_way)
        batch, given = 0 if self._packed else exact.capacity // _BATCH, 0
        while exact.steps and (row is None or 0 < given < batch):
            given += self._pack_oldest() if self._packed else self._forget_oldest()
            row = exact.find(tokens, self._make_way)
        if row is None:
            raise FrameError(f'there is no memory left for a step of {tokens} tokens')
        exact.use(row, tokens)
        return row

    def _make_way(self, exact_bytes: int) -> None:
        """Exact steps will take so many bytes."""
        if self._packed and self._max_bytes:
            self._packed.most = min(self._packed.most, self._max_bytes - exact_bytes)
            while not self._packed.fits() and self._packed.steps:
                self._forget_oldest()

    def _pack_oldest(self) -> int:
        """Put the oldest exact step into few bits; forgets older ones, or it, where there is no room. Returns its tokens."""
        step = self._exact.steps[0]
        tokens, rows = step.record.tokens, slice(step.row, step.row + step.record.tokens)
        while not self._packed.has_room(step):
            if self._forget_oldest() and not (self._exact.steps and self._exact.steps[0] is step):
                return tokens
        key = self._unrotated(step)
        if self._bias is not None:
            key -= self._bias[:, :, None]
        _, value, visual = self._exact.rows
        encoded = self._packed.encode(step, key, value[:, :, rows].float())
        self._exact.pop(readable=False)
        self._packed.put(step, encoded, visual[rows])
        return tokens

    def _forget_oldest(self) -> int:
        if self._packed and self._packed.steps:
            step = self._packed.pop()
        else:
            step = self._exact.pop(readable=not self._packed)
        record = step.record
        if self._packed:    # they are read by pages, and those that are forgotten not any more
            self._exact.overwritten = record.first_ordinal + record.tokens
        self.pages.forget(len(step.lengths))
        self.tokens -= record.tokens
        self.forgotten_frames += record.frames
        self.forgotten_first_ns = min(self.forgotten_first_ns or record.first_stamp_ns, record.first_stamp_ns)
        return record.tokens
