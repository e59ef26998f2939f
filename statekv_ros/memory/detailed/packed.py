"""Steps in few bits: codes of their tokens in one ring, scales and zeros of their pages in another."""
import copy
from collections import deque
from typing import NamedTuple

import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.kernels.paged_attention import PackedPool
from statekv_ros.memory.detailed.blobs import Encoded, from_blobs, page_cuts, to_blob
from statekv_ros.memory.detailed.formats import Packed, Stored
from statekv_ros.memory.detailed.pages import HeldStep
from statekv_ros.memory.detailed.rows import RowPool
from statekv_ros.memory.detailed.table import PageTable

_NEARLY = 1.125     # what a resize changes by less than this is not worth it
_MUCH = 2.5         # so far from the bound it grows to twice what is needed, else to the bound


class CodeRows(NamedTuple):
    """A row for each token.

    Attributes:
        key, value: codes [layers, kv_heads, capacity, head_dim * bits / 8] uint8; keys before RoPE and without bias.
        visual: whether it is a visual token, [capacity] bool.
        positions: where its key stands, [axes, capacity] int32.
    """
    key: torch.Tensor
    value: torch.Tensor
    visual: torch.Tensor
    positions: torch.Tensor

    @staticmethod
    def empty(layout: KVLayout, bits: int, axes: int, capacity: int) -> 'CodeRows':
        shape, device = (layout.layers, layout.kv_heads, capacity, layout.head_dim * bits // 8), layout.device
        key, value = (torch.empty(shape, dtype=torch.uint8, device=device) for _ in range(2))
        return CodeRows(key, value, torch.zeros(capacity, dtype=torch.bool, device=device),
                        torch.zeros(axes, capacity, dtype=torch.int32, device=device))


class ScaleRows(NamedTuple):
    """A row for each page: [layers, kv_heads, capacity, head_dim] fp16."""
    key_scale: torch.Tensor
    key_zero: torch.Tensor
    value_scale: torch.Tensor
    value_zero: torch.Tensor

    @staticmethod
    def empty(layout: KVLayout, capacity: int) -> 'ScaleRows':
        shape = layout.layers, layout.kv_heads, capacity, layout.head_dim
        return ScaleRows(*(torch.empty(shape, dtype=torch.float16, device=layout.device) for _ in range(4)))


class PackedSteps:
    """The oldest steps of a detailed cache, each quantised once, when it was put in here.

    Attributes:
        steps: oldest first.
        most: bytes that all rows may take.
    """

    def __init__(self, layout: KVLayout, table: PageTable, form: Packed, axes: int):
        """
        Args:
            table: of the pages of all steps; those in here are its oldest.
            axes: of a token's position.

        Raises:
            ParameterError: the format cannot hold such heads.
        """
        form.check(layout.head_dim)
        self.steps: deque[HeldStep] = deque()
        self.most = 2**62
        self._layout, self._table, self._form = layout, table, form
        self._codes = RowPool(lambda capacity: CodeRows.empty(layout, form.bits, axes, capacity))
        self._scales = RowPool(lambda capacity: ScaleRows.empty(layout, capacity))
        self._tokens = self._pages = 0

    @property
    def rows(self) -> CodeRows:
        return self._codes.rows

    @property
    def scales(self) -> ScaleRows:
        return self._scales.rows

    @property
    def bytes(self) -> int:
        """Bytes of all rows, those in use and those that are not."""
        return self._codes.bytes + self._scales.bytes

    def needed(self, tokens: int, pages: int) -> int:
        """Bytes of the rows of so many tokens and pages."""
        return tokens * self._codes.row_bytes + pages * self._scales.row_bytes

    def has_room(self, step: HeldStep) -> bool:
        """Whether a step can be put in; grows for it where it may."""
        tokens, pages = step.record.tokens, len(step.lengths)
        return self._codes.find(tokens) is not None and self._scales.find(pages) is not None or self._resized(tokens, pages)

    def fits(self) -> bool:
        """Whether all is within `most`; lets go of rows that are not in use."""
        return self.bytes <= self.most or self._resized(0, 0)

    def encode(self, step: HeldStep, key: torch.Tensor, value: torch.Tensor) -> list[Encoded]:
        """A step's pages in few bits, for `put`.

        Args:
            key, value: [layers, kv_heads, tokens, head_dim] fp32, keys before RoPE and without bias.
        """
        encoded = []
        for length in sorted(set(step.lengths)):    # two at most: pages of one length are quantised side by side
            alike = [page for page, tokens in enumerate(step.lengths) if tokens == length]
            begins = [sum(step.lengths[:page]) for page in alike]
            parts = [torch.stack([numbers.narrow(2, begin, length) for begin in begins], dim=2) for numbers in (key, value)]
            encoded.append(Encoded(alike, begins, length, *self._form.encode(*parts)))
        return encoded

    def put(self, step: HeldStep, encoded: list[Encoded], visual: torch.Tensor) -> None:
        """Hold a step for which there is room; it then says where it lies in here.

        Args:
            visual: [tokens] bool.
        """
        tokens, pages = step.record.tokens, len(step.lengths)
        row, slot = self._codes.find(tokens), self._scales.find(pages)
        codes, scales = self._codes.rows, self._scales.rows
        for part in encoded:
            for number, (page, begin) in enumerate(zip(part.pages, part.begins)):
                to = slice(row + begin, row + begin + part.length)
                codes.key[:, :, to], codes.value[:, :, to] = part.key.codes[:, :, number], part.value.codes[:, :, number]
                for rows, scale in zip(scales, (*part.key[1:], *part.value[1:])):
                    rows[:, :, slot + page] = scale[:, :, number]
        rows = slice(row, row + tokens)
        codes.visual[rows], codes.positions[:, rows] = visual, step.positions.reshape(-1, tokens)
        self._codes.take(row, tokens)
        self._scales.take(slot, pages)
        self._tokens += tokens
        self._pages += pages
        self._table.pack(pages, row - step.row, slot)
        step.row, step.slot, step.positions = row, slot, None
        self.steps.append(step)

    def parts(self, step: HeldStep) -> dict[str, torch.Tensor]:
        """A step of those in here, as tiers have it."""
        codes, scales = self._codes.rows, self._scales.rows

        def stored(rows: torch.Tensor, row: int, length: int, slot: int, scale: torch.Tensor, zero: torch.Tensor) -> Stored:
            return Stored(rows[:, :, None, row:row + length], scale[:, :, slot, None], zero[:, :, slot, None])

        encoded = [
            Encoded([page], [start - step.row], length,
                    stored(codes.key, start, length, step.slot + page, scales.key_scale, scales.key_zero),
                    stored(codes.value, start, length, step.slot + page, scales.value_scale, scales.value_zero))
            for page, (start, length) in enumerate(zip(step.starts, step.lengths))]
        rows = slice(step.row, step.row + step.record.tokens)
        return {'packed': self.blob(step, encoded), 'key_positions': codes.positions[:, rows]}

    def from_blob(self, step: HeldStep, blob: torch.Tensor) -> list[Encoded]:
        """The inverse of `blob`, for `put`."""
        cuts, begin, encoded = page_cuts(self._layout, self._form.bits, step.lengths), 0, []
        for page, length in enumerate(step.lengths):
            key, value = (Stored(*(part.unsqueeze(2) for part in stored)) for stored in from_blobs(
                self._layout, self._form.bits, length, blob[:, cuts[page]:cuts[page + 1]]))
            encoded.append(Encoded([page], [begin], length, key, value))
            begin += length
        return encoded

    def blob(self, step: HeldStep, encoded: list[Encoded]) -> torch.Tensor:
        """What `encode` gave, as tiers have it."""
        return to_blob(self._layout, self._form.bits, step.lengths, encoded)

    def pop(self) -> HeldStep:
        """Let go of the oldest step."""
        step = self.steps.popleft()
        tokens, pages = step.record.tokens, len(step.lengths)
        self._codes.give_back(step.row, tokens)
        self._scales.give_back(step.slot, pages)
        self._tokens -= tokens
        self._pages -= pages
        return step

    def layer(self, layer: int) -> PackedPool:
        """One layer, for attention."""
        codes, scales = self._codes.rows, self._scales.rows
        return PackedPool(codes.key[layer], codes.value[layer], *(rows[layer] for rows in scales), self._form.bits)

    def decoded(self, step: HeldStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (before RoPE, without bias) and values of a step, [layers, kv_heads, tokens, head_dim] fp32."""
        codes, scales = self._codes.rows, self._scales.rows

        def decoded(rows: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
            return torch.cat([self._form.decode(Stored(rows.narrow(2, start, length), scale[:, :, slot], zero[:, :, slot]))
                              for slot, (start, length) in enumerate(zip(step.starts, step.lengths), step.slot)], dim=2)

        return (decoded(codes.key, scales.key_scale, scales.key_zero),
                decoded(codes.value, scales.value_scale, scales.value_zero))

    def of_heads(self, heads: slice) -> 'PackedSteps':
        """The same of some KV heads, for reading."""
        part = copy.copy(self)
        part.steps = deque(step.of_heads(heads) for step in self.steps)
        part._codes, part._scales = self._codes.of_heads(heads), self._scales.of_heads(heads)
        return part

    def _resized(self, tokens: int, pages: int) -> bool:
        """Have room for what is here and so much more, twice that where the bound allows it; false where it does not, or where
        that would be hardly another size than now."""
        tokens, pages = self._tokens + tokens, self._pages + pages
        needed = self.needed(tokens, pages)
        factor = 2.0 if self.most > _MUCH * needed else self.most / needed
        rows, scales = int(tokens * factor), int(pages * factor)
        if factor < 1 or self.bytes <= self.most and rows < _NEARLY * self._codes.capacity and \
                scales < _NEARLY * self._scales.capacity:
            return False
        try:
            moved = self._codes.resize(rows, [(step.row, step.record.tokens) for step in self.steps])
            for step, row in zip(self.steps, moved):
                step.row = row
            self._table.line_up_rows(*self._numbers())
            moved = self._scales.resize(scales, [(step.slot, len(step.lengths)) for step in self.steps])
            for step, slot in zip(self.steps, moved):
                step.slot = slot
            self._table.line_up_slots(*self._numbers())
        except torch.OutOfMemoryError:
            self.most = min(self.most, self.bytes)  # what there is must do: forgetting keeps the camera seeing
            return False
        return True

    def _numbers(self) -> tuple[int, int]:
        """Numbers of the first page here and of that behind the last."""
        return (self.steps[0].page, self.steps[-1].page + len(self.steps[-1].lengths)) if self.steps else (0, 0)
