"""Attention of an answer over the memory: parts of it as they lie, pages that are chosen, and the answer's own tokens."""
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.backbones.upload import to_device
from statekv_ros.errors import Interrupted
from statekv_ros.kernels import fitness
from statekv_ros.kernels.page_votes import Places
from statekv_ros.kernels.paged_attention import OPERATION, PoolPages, Read, Span, masses, read_span, span_and_pages, together
from statekv_ros.memory.answering.choosing import FixedPages, PageChooser, turns_of
from statekv_ros.memory.answering.notes import Noted, Notes
from statekv_ros.memory.answering.snapshot import Snapshot
from statekv_ros.memory.answering.tail import Tail
from statekv_ros.memory.detailed.cache import DetailedCache
from statekv_ros.memory.detailed.held import HeldSteps, Records
from statekv_ros.memory.detailed.pages import MemoryView
from statekv_ros.memory.records import Evidence

# Tokens that a recorded pass reads as they lie, at most. Each layer makes them fp32, in memory that stays with the recording; of
# more of them the host has queued the next layer long before the device is done with one.
MOST_IN_PARTS = 2**13
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

    What is read in parts is put together by the log-sum-exp of its scores, as in flash decoding. Where there are pages, parts are
    short and lie before the tail, to be read with it. No tensor of scores has more than `MOST_SCORES` elements, unless a
    single row has.

    Attributes:
        scoring: while true, the attention that single tokens pay is noted for `evidence`.
        tail: the answer's own tokens.
    """

    def __init__(self, backbone: Backbone, cancelled: Callable[[], bool], parts: Sequence[Part] = (), ordinal: int = 0,
                 detailed: DetailedCache | None = None, pages: PageChooser | FixedPages | None = None,
                 steps: HeldSteps = HeldSteps()):
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
        self._overwritten = 0
        # Turned once, rather than the queries in each pass.
        self.tail = Tail(self._layout, [(backbone.rotate(part.view.key, -part.turn), part.view.value) for part in before])

    @property
    def tokens(self) -> int:
        """Tokens of the memory that a pass reads in a layer and KV head, at most."""
        return self.tail.before + max(sum(part.tokens for part in parts) + (pages.tokens if pages else 0)
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
        self.tail.begin(tokens)
        self._notes.make_room(self.tail.capacity)

    def place(self) -> tuple | None:
        """What a pass of one token depends on that the host knows, but for the token and its place: while this stays the same,
        all of them are the same work on the same memory. None where the host has to look in mid pass, or little would be gained.
        """
        if self._chooser is not None or max(sum(part.tokens for part in parts) for parts in self._parts.values()) > MOST_IN_PARTS:
            return None
        pages = [each.place() for each in {id(each): each for each in self._pages if each is not None}.values()]
        if None in pages or pages and fitness.problem(OPERATION, self._layout.device):      # the naive twin looks at lengths
            return None
        rows = self._detailed.place() if pages else ()
        return *self.tail.place(), self._overwritten, *rows, *pages

    def noted(self) -> Noted:
        """What the pass that just ended noted, which is forgotten here; see `note`."""
        return self._notes.newest()

    def note(self, noted: Noted) -> None:
        """Have this noted by the pass that just ended, and nothing else."""
        self._notes.put(noted)

    def commit(self) -> None:
        """Keep the tokens of the forward pass that just ended."""
        self.tail.commit()
        self._chooser = None

    def drop(self) -> None:
        """Instead of `commit`: keep what the forward pass that just ended chose, and none of its tokens."""
        self._chooser = None

    @property
    def tail_mass(self) -> torch.Tensor:
        """Attention paid to each token of the tail while `scoring`, summed over layers and query heads, [tokens] fp32."""
        return self._notes.tail(self.tail.tokens)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float) -> torch.Tensor:
        """Prefix-causal attention over [parts ; chosen pages ; tail]; see `AttentionMemory`."""
        self.check_cancelled()
        if self._chooser is not None:
            asking = self._backbone.unrotated(query[0].float(), self._positions)[:, self._question].mean(dim=1)
            parts, self._pages[layer] = self._chooser.choose(layer, asking)
            self._read_in(layer, parts)
        tokens, kv_heads = query.shape[2], key.shape[1]
        span = self.tail.put(layer, key[0], value[0])
        # [kv_heads, group x tokens, head_dim]: the query heads of a group share their keys.
        rows = (query[0].float() * scale).reshape(kv_heads, -1, query.shape[-1])
        noting = self.scoring and tokens == 1
        chosen = self._pages[layer].choose(layer, rows) if self._pages[layer] else ()
        whole, numbers = self._read(layer, query[0].reshape(rows.shape), span, chosen, scale, noting)
        noted, memory = whole.noted, self._parts[layer]
        of_parts = self._read_parts(layer, rows, noting)
        if of_parts:
            whole = together([*of_parts, whole])
        if noting:
            for part, of_part in zip(memory, of_parts):
                self._notes.add_part(part, layer, *masses(of_part.noted, whole.lse))
            tail, *of_pages = masses(noted, whole.lse)
            self._notes.add_tail(tail[:, self.tail.before:])
            for pages, mass in zip(numbers, of_pages, strict=True):
                self._notes.add_pages(pages, mass)
        return whole.output.reshape(query.shape).to(query.dtype)

    def check_cancelled(self) -> None:
        """Raise Interrupted when `cancelled` says so."""
        if self._cancelled():
            raise Interrupted('the answer was interrupted')

    def evidence(self, records: Records, limit: int) -> tuple[Evidence, ...]:
        """The most attended steps among `records`, greatest share first; see `Notes`."""
        parts = {id(part): part for parts in self._parts.values() for part in parts}.values()    # layers may share them
        return self._notes.evidence(records, limit, list(parts), self.tail.tokens)

    def newest_evidence(self, records: Records, limit: int) -> tuple[Evidence, ...]:
        """As `evidence`, of the newest token alone."""
        return self._notes.newest_evidence(records, limit)

    def take_back(self) -> None:
        """Leave out of the evidence what the newest forward pass noted."""
        self._notes.take_back()

    def _read_parts(self, layer: int, rows: torch.Tensor, noting: bool) -> list[Read]:
        """What rows [kv_heads, rows, head_dim] read of the parts."""
        memory, turns = self._parts[layer], self._turns[layer]
        turned = [rows] * len(memory) if turns is None else self._backbone.rotate(rows[None], turns[:, None, None])
        return [read_span(part_rows, Span(part.view.key[layer], part.view.value[layer]), noting, MOST_SCORES)
                for part_rows, part in zip(turned, memory)]

    def _read(self, layer: int, query: torch.Tensor, span: Span, chosen: Sequence[Places], scale: float,
              noting: bool) -> tuple[Read, list[torch.Tensor]]:
        """What rows read of the tail and of pages, and the numbers of these, in the order of what is noted of them."""
        near = [each for each in chosen if not each.far]
        numbers = [each.pages for each in near]

        def brought_up() -> Iterator[PoolPages]:
            del numbers[len(near):]
            for each in chosen:
                for staged in self._detailed.far.rounds(layer, each.pages, each.lengths) if each.far else ():
                    numbers.append(each.pages.gather(1, staged.columns))
                    moves = None if each.moves is None else each.moves.gather(1, staged.columns)
                    key, value, visual, rope = self._detailed.staged(layer)
                    yield PoolPages(key, value, staged.starts, staged.lengths, moves, visual if noting else None, rope,
                                    staged.slots if value is None else None)

        pools = [self._pool(layer, each, noting) for each in near]
        return span_and_pages(query, span, pools, scale, noting, brought_up), numbers

    def _pool(self, layer: int, each: Places, noting: bool) -> PoolPages:
        """Pages on the device."""
        if each.slots is None:
            (key, value, visual), rope = self._detailed.rows(), self._backbone.rope
            key, value = key[layer], value[layer]
        else:
            value, (key, rope, visual) = None, self._detailed.packed(layer)
        return PoolPages(key, value, each.starts, each.lengths, each.moves, visual if noting else None, rope, each.slots)

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
                   steps if pages or seen.detailed.by_pages else HeldSteps())
