"""The detailed cache: keys and values of every token that was seen, appended once in pages and read only to answer."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch

from statekv_ros.backbones.base import Backbone, TokenInputs
from statekv_ros.errors import FrameError, ParameterError
from statekv_ros.kernels.paged_attention import PackedPool, Rope
from statekv_ros.memory.carried.positions import PositionPolicy, StepPlace
from statekv_ros.memory.detailed.exact import ExactSteps
from statekv_ros.memory.detailed.far import FarSteps
from statekv_ros.memory.detailed.formats import RAW, find_format
from statekv_ros.memory.detailed.held import HeldSteps
from statekv_ros.memory.detailed.index import DEFAULT_INDEX, INDEXES
from statekv_ros.memory.detailed.packed import PackedSteps
from statekv_ros.memory.detailed.pages import HeldStep, MemoryView, Stretch, page_lengths, runs
from statekv_ros.memory.detailed.rows import TokenRows
from statekv_ros.memory.detailed.shares import is_main_memory, share_out
from statekv_ros.memory.detailed.table import PageTable
from statekv_ros.memory.detailed.tiers import Tier
from statekv_ros.memory.pose import Pose
from statekv_ros.memory.records import StepRecord

PAGE_TOKENS = 64
EXACT_STEPS = 4     # the newest ones, which stay in the model's own dtype whatever the format
_BATCH = 8      # of a full pool this part is given back at once, so that what an answer reads is not overwritten at once


class DetailedCache:
    """Append-only, with an optional bound on its bytes on the device: past it, the oldest steps leave for the tiers below, where
    there are any, and are forgotten where there are none, or once the last one has let them go.

    Rows are in a pool, a step in one piece; the prefix has a place of its own and is never forgotten. `begin`, one `write` per
    layer, `commit`: a step that fails before `commit` leaves no trace. A machine whose memory is full counts as a bound.

    With a format of few bits the newest `EXACT_STEPS` steps are there as they came (fewer where the bound leaves no room for
    them); a step that leaves them is quantised, once, into a pool of its own.

    Attributes:
        far: the steps that have left the device; None where there is no tier below it.
        pages: the pages held and their index entries; the prefix is not among them.
        tokens: tokens held.
        forgotten_frames, forgotten_first_ns: camera frames that were forgotten, and the oldest header stamp among them.
    """

    def __init__(self, backbone: Backbone, max_bytes: int, positions: PositionPolicy, page_tokens: int = PAGE_TOKENS,
                 index: str = DEFAULT_INDEX, detailed_format: str = RAW.name, host_cache_bytes: int = 0,
                 below: Sequence[Tier] = (), on_packed: Callable[[int, Callable[[], torch.Tensor]], None] | None = None):
        """
        Args:
            max_bytes: bound on the bytes of keys and values on the device, exact or in few bits, without the prefix's; 0 for
                none. Where there are tiers below, what is read from them is staged in a part of it: see `share_out`.
            host_cache_bytes: bound on main memory for steps that have left the device; 0 for no such tier.
            below: tiers further down, the nearer ones first.
            on_packed: called with the number of each step that is put into few bits, and what gives its part `packed`, as tiers
                have it.
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
        self.pages = PageTable(backbone.layout, INDEXES[index], backbone.query_squares)
        self._form = form = find_format(detailed_format)
        self._packed = None if form.rotated else PackedSteps(self.layout, self.pages, form, backbone.position_axes)
        self._bias = backbone.key_bias if self._packed else None
        self._exact = ExactSteps(self.layout, self.pages, EXACT_STEPS if self._packed else 0)
        self.far: FarSteps | None = None
        if host_cache_bytes or below:
            shares = share_out(max_bytes, host_cache_bytes, bool(below), is_main_memory(backbone.device))
            max_bytes = shares.rows
            self.far = FarSteps(backbone, form, below, shares, page_tokens)
        self._on_packed = on_packed
        self._backbone, self._positions, self._page_tokens, self._max_bytes = backbone, positions, page_tokens, max_bytes
        if max_bytes:
            shares = 2 if self._packed else 1       # with few bits, one half is for these at least
            self._exact.most = max_bytes // shares // self._exact.row_bytes
            if self._exact.most < page_tokens:
                raise ParameterError(f'the detailed cache needs room for at least {shares} page(s) of {page_tokens} tokens, '
                                     f'{shares * page_tokens * self._exact.row_bytes} bytes, got '
                                     f'{max_bytes} bytes: raise device_cache_mb')
        self._prefix: tuple[MemoryView, StepRecord] | None = None
        self._stretch: Stretch | None = None
        # Of the step that was begun: where it goes, the stretch, and how far its keys are turned on the way.
        self._key, self._value, _ = self._exact.rows
        self._row = self._turn = 0

    @property
    def bytes(self) -> int:
        """Bytes that the cache takes on the device: rows that are not in use, the prefix, index and page table included."""
        prefix, tiers = self._prefix[1].tokens if self._prefix else 0, self.tier_bytes
        return tiers['device'] + tiers['index'] + prefix * self.layout.bytes_per_token

    @property
    def tier_bytes(self) -> dict[str, int]:
        """Bytes of keys and values on the `device`, rows that are not in use and staging included, and in main memory (`host`),
        what it lends for staging included; and of the `index`, page table included, which is on the device beside them. Without
        the prefix."""
        index, far = self.pages.bytes, self.far
        device = self._exact.bytes + (self._packed.bytes if self._packed else 0) + (far.bytes if far else 0)
        return {'device': device, 'host': far.host_bytes if far else 0, 'index': index}

    @property
    def steps_below(self) -> int:
        """Steps that are held, but not on the device."""
        return len(self.far.steps) if self.far else 0

    @property
    def overwritten(self) -> int:
        """Ordinals below this one may have been overwritten by newer steps."""
        return self._exact.overwritten

    @property
    def by_pages(self) -> bool:
        """Whether steps move while an answer is decoded, into few bits or to another tier; then they are read by pages."""
        return self._packed is not None or self.far is not None

    def begin(self, step: StepPlace, shift: int, prefix: bool = False) -> None:
        """Make room for a step that the model is given `shift` left of its true positions.

        Raises:
            FrameError: the step alone is larger than the bound.
        """
        if prefix:
            self._key, self._value = self.layout.empty(step.tokens), self.layout.empty(step.tokens)
            self._row = self._turn = 0
            return
        self.forget_lost()
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
        self._same(stretch)

    def _same(self, stretch: Stretch) -> Stretch:
        """The stretch that steps stand in from now on: those of one stretch share the object, by which runs are found."""
        if stretch != self._stretch:
            self._stretch = stretch
        return self._stretch

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
        step = HeldStep(record, self._row, stretch, self.pages.stop, lengths, positions, turn=self._turn)
        self._exact.append(step)
        self.tokens += record.tokens
        # The index knows keys as if their stretch began at position 0: a query then stands alike before all that is far.
        keys = self._backbone.rotate(self._exact.rows.key[:, :, rows].float(), stretch.shift - stretch.position)
        self.pages.append(self.pages.index.entries(keys, len(lengths)), step.row, record.tokens, stretch)

    @property
    def newest(self) -> HeldStep:
        """The step that was committed last."""
        return self._exact.steps[-1]

    def newest_parts(self) -> dict[str, torch.Tensor]:
        """What tiers have of the step that was committed last besides its keys and values: `key_positions`, and its pages' entries
        `index` [layers, kv_heads, pages, entry_width]."""
        step = self.newest
        return {'key_positions': step.positions.reshape(-1, step.record.tokens),
                'index': self.pages.newest_entries(slice(step.page, self.pages.stop))}

    def index_shape(self, record: StepRecord) -> tuple[int, ...]:
        """Of the part `index` of a step."""
        layout, pages = self.layout, len(page_lengths(record.tokens, self._page_tokens))
        return layout.layers, layout.kv_heads, pages, self.pages.index.entry_width(layout.head_dim)

    def take_packed(self, record: StepRecord, stretch: Stretch, parts: dict[str, torch.Tensor]) -> None:
        """Hold a step in few bits again, newer than all that are held; `parts` as tiers have them, with `index`."""
        while self._exact.steps:    # these are older
            self._pack_oldest()
        device, lengths = self.layout.device, page_lengths(record.tokens, self._page_tokens)
        positions = parts['key_positions'].to(device)
        step = HeldStep(record, 0, self._same(stretch), self.pages.stop, lengths, positions)
        self.pages.append(parts['index'].to(device), 0, record.tokens, step.stretch)
        self.tokens += record.tokens
        while not self._packed.has_room(step):
            if not self._packed.steps:
                self._leave(step, lambda: parts)
                return
            self._let_go()
        token = torch.arange(record.tokens, device=device) - record.visual_start
        self._packed.put(step, self._packed.from_blob(step, parts['packed'].to(device)),
                         (token >= 0) & (token < record.visual_tokens))

    def take_far(self, record: StepRecord, stretch: Stretch, turn: int, index: torch.Tensor) -> None:
        """Hold a step that a tier below has, newer than all that are held, none of which is on the device.

        Args:
            turn: by how many positions its keys are turned, from how the model computed them.
            index: as `newest_parts` gave it.
        """
        lengths = page_lengths(record.tokens, self._page_tokens)
        step = HeldStep(record, -1, self._same(stretch), self.pages.stop, lengths, None, turn=turn)
        self.pages.append(index.to(self.layout.device), 0, record.tokens, step.stretch)
        self.pages.leave(len(lengths))
        self.tokens += record.tokens
        self.far.adopt(step)

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

    def steps(self, wanted: Callable[[StepRecord], bool] | None = None) -> HeldSteps:
        """All wanted steps (None: all) of this moment, oldest first, without the prefix."""
        if wanted is not None:
            return HeldSteps(near=[step for step in self._held() if wanted(step.record)])
        near = list(self._near())
        return HeldSteps(self.far.steps[:], near) if self.far else HeldSteps(near=near)

    def place_step(self, number: int, pose: Pose) -> None:
        """Where a step was seen is known now, by its number; nothing where it is not held any more."""
        for step in chain(reversed(self._exact.steps), reversed(self._packed.steps) if self._packed else ()):
            if step.record.step <= number:
                if step.record.step == number:
                    step.record = replace(step.record, pose=pose)
                return
        if self.far:
            self.far.place(number, pose)

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
        """All rows of exact steps on the device."""
        return self._exact.rows

    def place(self) -> tuple[int, ...]:
        """Where the rows of steps on the device lie."""
        pools = [self._exact.rows, *((self._packed.rows, self._packed.scales) if self._packed else ())]
        return tuple(number for rows in pools for each in rows for number in (each.data_ptr(), each.numel()))

    def packed(self, layer: int) -> tuple[PackedPool, Rope, torch.Tensor]:
        """All rows of one layer of the steps in few bits, how they turn, and whether they are visual tokens, [capacity]."""
        rows, bias = self._packed.rows, None if self._bias is None else self._bias[layer]
        rope = replace(self._backbone.rope, positions=rows.positions, bias=bias)
        return self._packed.layer(layer), rope, rows.visual

    def staged(self, layer: int) -> tuple[torch.Tensor | PackedPool, torch.Tensor | None, torch.Tensor, Rope]:
        """All rows of one layer that are staged from tiers below: keys and values, or the pool in few bits and None; whether they
        are visual tokens; and how they turn."""
        staging, bias = self.far.staging, None if self._bias is None else self._bias[layer]
        positions, visual = staging.tokens[layer, :-1], staging.tokens[layer, -1].bool()
        if self._packed is None:
            return *staging.raw(layer), visual, self._backbone.rope
        return staging.packed(layer), None, visual, replace(self._backbone.rope, positions=positions, bias=bias)

    def mean_key(self, step: HeldStep, visual: bool = False) -> torch.Tensor:
        """A step's keys before rotation, averaged over its tokens or `visual` ones: [layers, kv_heads, head_dim] fp32. Kept."""
        if step.page < self.pages.near:
            mean = self.far.mean_key(step, self._bias, visual)
            if mean is None:        # it is asked for again
                mean = torch.zeros(self.layout.layers, self.layout.kv_heads, self.layout.head_dim, device=self.layout.device)
            return mean
        name, tokens = ('visual_mean', step.record.visual) if visual else ('mean', slice(None))
        if getattr(step, name) is None:
            # Rotation would blur the mean: the tokens of a step stand at different places.
            if step.slot is None:
                mean = self._unrotated(step)[:, :, tokens].mean(dim=2)
            else:
                mean = self._packed.decoded(step)[0][:, :, tokens].mean(dim=2) + (0 if self._bias is None else self._bias)
            setattr(step, name, mean)
        return getattr(step, name)

    def _held(self) -> Iterator[HeldStep]:
        return chain(self.far.steps if self.far else (), self._near())

    def _near(self) -> Iterator[HeldStep]:
        """Steps on the device."""
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
                             'parameter "device_cache_mb", or lower "max_frame_pixels"')
        row = exact.find(tokens, self._make_way)
        batch, given = 0 if self.by_pages else exact.capacity // _BATCH, 0
        while exact.steps and (row is None or 0 < given < batch):
            given += self._pack_oldest() if self._packed else self._let_go()
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
                self._let_go()

    def _pack_oldest(self) -> int:
        """Put the oldest exact step into few bits; lets go of older ones, or of it, where there is no room. Returns its tokens."""
        step = self._exact.steps[0]
        tokens, rows = step.record.tokens, slice(step.row, step.row + step.record.tokens)
        key = self._unrotated(step)
        if self._bias is not None:
            key -= self._bias[:, :, None]
        _, value, visual = self._exact.rows
        encoded = self._packed.encode(step, key, value[:, :, rows].float())
        if self._on_packed is not None:
            self._on_packed(step.record.step, lambda: self._packed.blob(step, encoded))
        while not self._packed.has_room(step):
            if not self._packed.steps:
                self._leave(self._exact.pop(readable=False), lambda: {
                    'packed': self._packed.blob(step, encoded), 'key_positions': step.positions.reshape(-1, tokens)})
                return tokens
            self._let_go()
        self._exact.pop(readable=False)
        self._packed.put(step, encoded, visual[rows])
        return tokens

    def _let_go(self) -> int:
        """Of the oldest step on the device. Returns its tokens."""
        if self._packed and self._packed.steps:
            step = self._packed.pop()
            return self._leave(step, lambda: self._packed.parts(step))
        step = self._exact.pop(readable=not self.by_pages)
        key, value, _ = self._exact.rows
        rows = slice(step.row, step.row + step.record.tokens)
        return self._leave(step, lambda: {'key': key[:, :, rows], 'value': value[:, :, rows],
                                          'key_positions': step.positions.reshape(-1, step.record.tokens)})

    def _leave(self, step: HeldStep, parts: Callable[[], dict[str, torch.Tensor]]) -> int:
        """The oldest step on the device is no longer held there; its parts, as tiers have them, still lie in its rows."""
        self.pages.leave(len(step.lengths))
        if self.far is None:
            self._forgotten(step)
        else:
            self.far.append(step, parts)
            self.forget_lost()
        return step.record.tokens

    def forget_lost(self) -> None:
        """Forget the steps that no tier has any more; called with each step, too."""
        for step in self.far.pop_lost() if self.far else ():
            self._forgotten(step)

    def _forgotten(self, step: HeldStep) -> None:
        record, oldest = step.record, next(self._held(), None)
        first = oldest.page if oldest else max(self.pages.near, step.page + len(step.lengths))
        if step.page < first:
            self.pages.forget(first - self.pages.first)
            if self.by_pages:       # those that are forgotten are read no more
                self._exact.overwritten = record.first_ordinal + record.tokens
        else:
            self.pages.hide(step.page, len(step.lengths))
        self.tokens -= record.tokens
        self.forgotten_frames += record.frames
        self.forgotten_first_ns = min(self.forgotten_first_ns or record.first_stamp_ns, record.first_stamp_ns)
