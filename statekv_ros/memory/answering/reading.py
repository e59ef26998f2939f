"""Attention of an answer over the memory: parts of it as they lie, pages that are chosen, and the answer's own tokens."""
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.backbones.upload import to_device
from statekv_ros.errors import Interrupted
from statekv_ros.kernels.paged_attention import paged_attention
from statekv_ros.memory.answering.choosing import Choice, FixedPages, PageChooser, turns_of
from statekv_ros.memory.answering.notes import Notes
from statekv_ros.memory.answering.snapshot import Snapshot
from statekv_ros.memory.detailed.cache import DetailedCache
from statekv_ros.memory.detailed.pages import HeldStep, MemoryView
from statekv_ros.memory.records import Evidence, StepRecord

_FIRST_CAPACITY = 64
MOST_SCORES = 2**25     # of one tensor of scores, in fp32: a long question is read in parts, whatever the memory holds


class Part:
    """A stretch of memory that an answer attends to as it lies.

    Attributes:
        turn: by how many positions a query has to be turned for it, to stand where the part's keys are read from.
        mass: attention noted for each of its tokens, shaped like `view.ordinal`, fp32.
    """

    def __init__(self, view: MemoryView, turn: int):
        self.view, self.turn = view, turn
        self.mass = torch.zeros(view.ordinal.shape, device=view.key.device)

    @property
    def tokens(self) -> int:
        return self.view.key.shape[2]

    def let_go(self, ordinal: int) -> None:
        """Read no tokens before `ordinal` any more."""
        view = self.view.newer(ordinal)
        if view is not self.view:
            self.view, self.mass = view, self.mass[self.tokens - view.key.shape[2]:]


class Chooser(Protocol):
    """Finds out what each layer reads once the question is known."""

    def choose(self, layer: int, query: torch.Tensor) -> tuple[list[Part], FixedPages | None]:
        """query: [q_heads, head_dim], the question's mean query before rotation."""


class Reading:
    """What an answer's tokens attend to: parts of the memory, pages found anew in each pass, and, behind them, a private tail of
    the answer's own tokens.

    Each is read by itself and put together by the log-sum-exp of its scores, as in flash decoding. Where there are pages, parts
    are short and lie before the tail, to be read with it. No tensor of scores has more than `MOST_SCORES` elements, unless a
    single row has.

    Attributes:
        scoring: while true, the attention that single tokens pay is noted for `evidence`.
    """

    def __init__(self, backbone: Backbone, cancelled: Callable[[], bool], parts: Sequence[Part] = (), ordinal: int = 0,
                 detailed: DetailedCache | None = None, pages: PageChooser | FixedPages | None = None,
                 steps: Sequence[HeldStep] = ()):
        """
        Args:
            cancelled: looked at once per layer; when true, the pass ends with `Interrupted`.
            parts: what is read as it lies.
            ordinal: stream index that the first token of the tail would have.
            detailed: where parts and pages lie.
            pages: what says which pages of `steps` a pass reads; None where nothing is read by pages.
        """
        self.scoring = False
        self._backbone, self._layout, self._cancelled = backbone, backbone.layout, cancelled
        self._detailed = detailed
        self._pages = [pages] * self._layout.layers
        self._parts: dict[int, list[Part]] = {}             # by layer
        self._turns: dict[int, torch.Tensor | None] = {}    # None: nothing has to be turned
        before, parts = (parts, ()) if pages is not None else ((), parts)
        for layer in range(self._layout.layers):
            self._read_in(layer, parts)
        self._notes = Notes(self._layout.device, ordinal, steps)
        self._chooser: Chooser | None = None
        self._question = slice(0)
        self._positions = torch.zeros(0)
        self._tail_tokens = self._step_tokens = self._overwritten = 0
        self._before = sum(part.tokens for part in before)      # tokens that lie before the tail
        self._tail_key, self._tail_value = self._layout.empty(self._before), self._layout.empty(self._before)
        if before:      # turned once, rather than the queries in each pass
            torch.cat([backbone.rotate(part.view.key, -part.turn) for part in before], dim=2, out=self._tail_key)
            torch.cat([part.view.value for part in before], dim=2, out=self._tail_value)

    @property
    def tokens(self) -> int:
        """Tokens of the memory that a pass reads in a layer and KV head, at most."""
        return self._before + max(sum(part.tokens for part in parts) + (pages.tokens if pages else 0)
                                  for parts, pages in zip(self._parts.values(), self._pages))

    @property
    def most_tokens(self) -> int:
        """Tokens that may be read in one pass, so that what pages are scored by is no larger than `MOST_SCORES`."""
        widest = max((pages.scored for pages in self._pages if isinstance(pages, PageChooser)), default=0)
        return max(1, MOST_SCORES // max(1, widest * self._backbone.q_heads))

    def choose(self, chooser: Chooser, question: slice, positions: torch.Tensor) -> None:
        """Let the next forward pass choose what is read from then on, by its tokens `question` at `positions`."""
        self._chooser, self._question, self._positions = chooser, question, positions

    def begin(self, tokens: int) -> None:
        """Make room for `tokens` more tokens of the tail, and let go of what the memory has overwritten meanwhile."""
        self._notes.begin()
        if self._detailed is not None and self._detailed.overwritten > self._overwritten:
            self._overwritten = self._detailed.overwritten
            for layer, parts in self._parts.items():
                for part in parts:
                    part.let_go(self._overwritten)
                self._read_in(layer, parts)
        self._step_tokens = tokens
        held = self._before + self._tail_tokens
        needed = held + tokens
        if needed > self._tail_key.shape[2]:
            key, value = (self._layout.empty(max(2 * needed, _FIRST_CAPACITY)) for _ in range(2))
            key[:, :, :held], value[:, :, :held] = self._tail_key[:, :, :held], self._tail_value[:, :, :held]
            self._tail_key, self._tail_value = key, value
        self._notes.make_room(needed - self._before)

    def commit(self) -> None:
        """Keep the tokens of the forward pass that just ended."""
        self._tail_tokens += self._step_tokens
        self._chooser = None

    def drop(self) -> None:
        """Instead of `commit`: keep what the forward pass that just ended chose, and none of its tokens."""
        self._chooser = None

    @property
    def tail_mass(self) -> torch.Tensor:
        """Attention paid to each token of the tail while `scoring`, summed over layers and query heads, [tokens] fp32."""
        return self._notes.tail[:self._tail_tokens]

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float) -> torch.Tensor:
        """Prefix-causal attention over [parts ; chosen pages ; tail]; see `AttentionMemory`."""
        if self._cancelled():
            raise Interrupted('the answer was interrupted')
        if self._chooser is not None:
            asking = self._backbone.unrotated(query[0].float(), self._positions)[:, self._question].mean(dim=1)
            parts, self._pages[layer] = self._chooser.choose(layer, asking)
            self._read_in(layer, parts)
        tokens, kv_heads = query.shape[2], key.shape[1]
        held = self._before + self._tail_tokens
        end = held + tokens
        self._tail_key[layer, :, held:end] = key[0]
        self._tail_value[layer, :, held:end] = value[0]
        # [kv_heads, group x tokens, head_dim]: the query heads of a group share their keys.
        rows = (query[0].float() * scale).reshape(kv_heads, -1, query.shape[-1])
        noting = self.scoring and tokens == 1
        memory, turns = self._parts[layer], self._turns[layer]
        turned = [rows] * len(memory) if turns is None else self._backbone.rotate(rows[None], turns[:, None, None])
        read = [_read(part_rows, part.view.key[layer], part.view.value[layer], noting)
                for part_rows, part in zip(turned, memory)]
        read.append(_read(rows, self._tail_key[layer, :, :end], self._tail_value[layer, :, :end], noting, tokens))
        pages = []
        for choice in self._pages[layer].choose(layer, rows) if self._pages[layer] else ():
            arguments = layer, query[0].reshape(rows.shape), choice, scale, noting
            found = self._read_far(*arguments) if choice.far else [(choice.pages, *self._read_pages(*arguments))]
            for numbers, output, lse, page_lse in found:
                read.append(_Read(output, lse))
                pages.append((numbers, page_lse))
        whole = _together(read)
        if noting:
            for part, of_part in zip(memory, read):
                self._notes.add_part(part, layer, _share(of_part, whole))
            for numbers, page_lse in pages:
                self._notes.add_pages(numbers, torch.exp(page_lse - whole.lse[..., None]).sum(dim=1))
            self._notes.add_tail(_share(read[len(memory)], whole)[:, self._before:].sum(dim=0))
        return whole.output.reshape(query.shape).to(query.dtype)

    def evidence(self, records: Sequence[StepRecord], limit: int) -> tuple[Evidence, ...]:
        """The most attended steps among `records`, greatest share first; see `Notes`."""
        parts = {id(part): part for parts in self._parts.values() for part in parts}.values()    # layers may share them
        return self._notes.evidence(records, limit, list(parts), self._tail_tokens)

    def newest_evidence(self, records: Sequence[StepRecord], limit: int) -> tuple[Evidence, ...]:
        """As `evidence`, of the newest token alone."""
        return self._notes.newest_evidence(records, limit)

    def take_back(self) -> None:
        """Leave out of the evidence what the newest forward pass noted."""
        self._notes.take_back()

    def _read_pages(self, layer: int, query: torch.Tensor, choice: Choice, scale: float, noting: bool):
        """What `paged_attention` makes of rows [kv_heads, rows, head_dim] and a choice of pages on the device."""
        if choice.slots is None:
            (key, value, visual), rope = self._detailed.rows(), self._backbone.rope
            key, value = key[layer], value[layer]
        else:
            value, (key, rope, visual) = None, self._detailed.packed(layer)
        return paged_attention(query, key, value, choice.starts, choice.lengths, scale, moves=choice.moves,
                               noted=visual if noting else None, rope=rope, entries=choice.slots)

    def _read_far(self, layer: int, query: torch.Tensor, choice: Choice, scale: float, noting: bool) -> Iterator[tuple]:
        """As `_read_pages` for pages that have to be brought up: in each round, their numbers first."""
        for each in self._detailed.far.rounds(layer, choice.pages, choice.lengths):
            moves = None if choice.moves is None else choice.moves.gather(1, each.columns)
            key, value, visual, rope = self._detailed.staged(layer)
            yield choice.pages.gather(1, each.columns), *paged_attention(
                query, key, value, each.starts, each.lengths, scale, moves=moves, noted=visual if noting else None, rope=rope,
                entries=each.slots if value is None else None)

    def _read_in(self, layer: int, parts: Sequence[Part]) -> None:
        self._parts[layer] = parts = [part for part in parts if part.tokens]
        turns = [part.turn for part in parts]
        self._turns[layer] = to_device(torch.tensor(turns), self._layout.device) if any(turns) else None


class Rows:
    """Several readings, of which each attends to the one token in its row of a batch, as it would alone."""

    def __init__(self, readings: Sequence[Reading]):
        self._readings = tuple(readings)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float) -> torch.Tensor:
        """See `AttentionMemory`."""
        return torch.cat([reading.attend(layer, *(part[row, None] for part in (query, key, value)), scale)
                          for row, reading in enumerate(self._readings)])


def read_snapshot(snapshot: Snapshot) -> Reading:
    """What an answer's tokens attend to, by the snapshot's policy; with `retrieve` and `rekv`, the prefix until there is a choice."""
    seen = snapshot.seen
    parts = [Part(view, snapshot.turn(view.position, view.shift)) for view in snapshot.views]
    pages, steps = None, snapshot.steps
    if snapshot.chooses_pages:
        pages = PageChooser(snapshot)
    elif steps and not snapshot.policy.retrieves:
        layout = seen.backbone.layout
        pages = FixedPages(seen.detailed.pages, steps, turns_of(snapshot, steps), layout.kv_heads, layout.device)
    return Reading(seen.backbone, seen.cancelled, parts, seen.ordinal, seen.detailed, pages,
                   steps if pages or seen.detailed.by_pages else ())


class _Read(NamedTuple):
    """What rows read of some tokens.

    Attributes:
        output: [kv_heads, rows, head_dim] fp32; lse: log-sum-exp of their scores, [kv_heads, rows] fp32.
        weights: softmax over these tokens alone, [kv_heads, rows, tokens] fp32; None where that has not been kept.
    """
    output: torch.Tensor
    lse: torch.Tensor
    weights: torch.Tensor | None = None


def _read(rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor, noting: bool, new: int = 1) -> _Read:
    """Softmax attention of rows [kv_heads, group x new, head_dim] to keys and values [kv_heads, tokens, head_dim], of which the
    last `new` tokens are those that ask: none of them sees what comes after it. `noting`: keep the weights."""
    kv_heads, count, tokens = *rows.shape[:2], key.shape[1]
    key, value = key.float().transpose(1, 2), value.float()
    most = max(1, MOST_SCORES // (kv_heads * max(1, tokens)))
    if count <= most:
        return _read_at_once(rows, key, value, new, 0)
    read = [_read_at_once(rows[:, begin:begin + most], key, value, new, begin) for begin in range(0, count, most)]
    return _Read(*(torch.cat(parts, dim=1) for parts in zip(*(each if noting else each[:2] for each in read))))


def _read_at_once(rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor, new: int, first: int) -> _Read:
    """As `_read`; `first`: number of the first of these rows, keys [kv_heads, head_dim, tokens], all in fp32."""
    scores = rows @ key
    if new > 1:
        row, column = torch.arange(first, first + rows.shape[1], device=rows.device), torch.arange(new, device=rows.device)
        scores[..., -new:].masked_fill_(column > row[:, None] % new, float('-inf'))
    weights = torch.log_softmax(scores, dim=-1)
    lse = scores[..., 0] - weights[..., 0]     # every row sees the first token
    weights.exp_()
    return _Read(weights @ value, lse, weights)


def _together(read: Sequence[_Read]) -> _Read:
    """What was read in parts, as if at once."""
    if len(read) == 1:
        return read[0]
    lse = torch.stack([part.lse for part in read])
    outputs = torch.stack([part.output for part in read])
    return _Read((outputs * torch.softmax(lse, dim=0)[..., None]).sum(dim=0), lse.logsumexp(dim=0))


def _share(part: _Read, whole: _Read) -> torch.Tensor:
    """Attention to each token of a part, added up over the rows: [kv_heads, tokens]."""
    return (torch.exp(part.lse - whole.lse)[:, None] @ part.weights).squeeze(1)
