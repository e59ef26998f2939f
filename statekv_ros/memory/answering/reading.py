"""Attention of an answer over the memory: parts of it as they lie, pages that are chosen, and the answer's own tokens."""
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from statekv_ros.backbones.base import Backbone
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

    Each is read by itself and put together by the log-sum-exp of its scores, as in flash decoding. No tensor of scores has more
    than `MOST_SCORES` elements, unless a single row has.

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
        for layer in range(self._layout.layers):
            self._read_in(layer, parts)
        self._notes = Notes(self._layout.device, ordinal, steps)
        self._chooser: Chooser | None = None
        self._question = slice(0)
        self._positions = torch.zeros(0)
        self._tail_tokens = self._step_tokens = self._overwritten = 0
        self._tail_key, self._tail_value = self._layout.empty(0), self._layout.empty(0)

    @property
    def tokens(self) -> int:
        """Tokens of the memory that a pass reads in a layer and KV head, at most."""
        return max(sum(part.tokens for part in parts) + (pages.tokens if pages else 0)
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
        needed, held = self._tail_tokens + tokens, self._tail_tokens
        if needed > self._tail_key.shape[2]:
            key, value = (self._layout.empty(max(2 * needed, _FIRST_CAPACITY)) for _ in range(2))
            key[:, :, :held], value[:, :, :held] = self._tail_key[:, :, :held], self._tail_value[:, :, :held]
            self._tail_key, self._tail_value = key, value
        self._notes.make_room(needed)

    def commit(self) -> None:
        """Keep the tokens of the forward pass that just ended."""
        self._tail_tokens += self._step_tokens
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
        held, end = self._tail_tokens, self._tail_tokens + tokens
        self._tail_key[layer, :, held:end] = key[0]
        self._tail_value[layer, :, held:end] = value[0]
        # [kv_heads, group x tokens, head_dim]: the query heads of a group share their keys.
        rows = (query[0].float() * scale).reshape(kv_heads, -1, query.shape[-1])
        noting = self.scoring and tokens == 1
        whole = _Whole(rows)
        memory, turns = self._parts[layer], self._turns[layer]
        turned = [rows] * len(memory) if turns is None else self._backbone.rotate(rows[None], turns[:, None, None])
        dense = []
        for part_rows, part in zip(turned, memory):
            part_key, part_value = part.view.key[layer].float().transpose(1, 2), part.view.value[layer]
            for some in _portions(rows, part.tokens):
                scored = whole.add_scores(part_rows[:, some] @ part_key, part_value, some)
            dense.append(scored)    # of one row, where it is noted
        pages = []
        for choice in self._pages[layer].choose(layer, rows) if self._pages[layer] else ():
            arguments = layer, query[0].reshape(rows.shape), choice, scale, noting
            read = self._read_far(*arguments) if choice.far else [(choice.pages, *self._read_pages(*arguments))]
            for numbers, output, lse, page_lse in read:
                whole.add(output, lse)
                pages.append((numbers, page_lse))
        tail_key, tail_value = self._tail_key[layer, :, :end].float().transpose(1, 2), self._tail_value[layer, :, :end]
        for some in _portions(rows, end):
            scores = rows[:, some] @ tail_key
            if tokens > 1:
                row, column = torch.arange(some.start, some.stop, device=query.device), torch.arange(tokens, device=query.device)
                scores[..., held:].masked_fill_(column > row[:, None] % tokens, float('-inf'))
            tail = whole.add_scores(scores, tail_value, some)
        if noting:
            lse = whole.lse
            for part, (mass, top) in zip(memory, dense):
                self._notes.add_part(part, layer, whole.share(mass, top))
            for numbers, page_lse in pages:
                self._notes.add_pages(numbers, torch.exp(page_lse - lse).sum(dim=1))
            self._notes.add_tail(whole.share(*tail).sum(dim=0))
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
        self._turns[layer] = torch.tensor(turns, device=self._layout.device) if any(turns) else None


def read_snapshot(snapshot: Snapshot) -> Reading:
    """What an answer's tokens attend to, by the snapshot's policy; with `retrieve`, the prefix until there is a choice."""
    seen = snapshot.seen
    parts = [Part(view, snapshot.turn(view.position, view.shift)) for view in snapshot.views]
    pages, steps = None, snapshot.steps
    if snapshot.chooses_pages:
        pages = PageChooser(snapshot)
    elif steps and snapshot.policy.kind != 'retrieve':
        layout = seen.backbone.layout
        pages = FixedPages(seen.detailed.pages, steps, turns_of(snapshot, steps), layout.kv_heads, layout.device)
    return Reading(seen.backbone, seen.cancelled, parts, seen.ordinal, seen.detailed, pages,
                   steps if pages or seen.detailed.by_pages else ())


def _portions(rows: torch.Tensor, width: int) -> Iterator[slice]:
    """Rows [kv_heads, rows, ...] in turn, as many as `MOST_SCORES` allow of scores with `width` tokens each."""
    count = max(1, MOST_SCORES // (rows.shape[0] * max(1, width)))
    return (slice(begin, min(begin + count, rows.shape[1])) for begin in range(0, rows.shape[1], count))


class _Whole:
    """Softmax attention put together from parts by a running maximum and sum.

    Attributes: see the properties; all [kv_heads, rows, ...] fp32.
    """

    def __init__(self, rows: torch.Tensor):
        self._top = rows.new_full((*rows.shape[:2], 1), float('-inf'))
        self._total, self._sum = torch.zeros_like(self._top), torch.zeros_like(rows)

    def add_scores(self, scores: torch.Tensor, value: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Read values [kv_heads, tokens, head_dim] by scores [kv_heads, rows, tokens] of some rows; their exponentials, and what
        was taken off the scores before."""
        before, total, read = self._top[:, rows], self._total[:, rows], self._sum[:, rows]
        top = torch.maximum(before, scores.amax(dim=-1, keepdim=True))
        mass, shrink = torch.exp(scores - top), torch.exp(before - top)
        total.mul_(shrink).add_(mass.sum(dim=-1, keepdim=True))
        read.mul_(shrink).add_(mass @ value.float())
        before.copy_(top)
        return mass, top

    def add(self, output: torch.Tensor, lse: torch.Tensor) -> None:
        """Add what was read elsewhere: its output [kv_heads, rows, head_dim] and log-sum-exp [kv_heads, rows]."""
        lse = lse[..., None]
        top = torch.maximum(self._top, lse).clamp_min(-1e30)    # finite, where nothing was read so far
        ours, theirs = torch.exp(self._top - top), torch.exp(lse - top)
        self._total = self._total * ours + theirs
        self._sum = self._sum * ours + output * theirs
        self._top = top

    @property
    def output(self) -> torch.Tensor:
        """[kv_heads, rows, head_dim]."""
        return self._sum / self._total

    @property
    def lse(self) -> torch.Tensor:
        """Log-sum-exp of all scores, [kv_heads, rows, 1]."""
        return self._top + self._total.log()

    def share(self, mass: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        """A part's exponentials as shares of the whole, added up over the rows: [kv_heads, tokens]."""
        return (mass * torch.exp(top - self._top) / self._total).sum(dim=1)
