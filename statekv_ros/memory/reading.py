"""Attention of an answer over the memory, chunk by chunk, without joining the chunks and without touching the stream."""
from collections.abc import Callable
from typing import Protocol

import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.errors import Interrupted
from statekv_ros.memory.chunks import MemoryView
from statekv_ros.memory.records import Evidence, StepRecord

_FIRST_CAPACITY = 64


class Part:
    """A stretch of memory that an answer attends to.

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


class Chooser(Protocol):
    """Finds out what each layer reads once the question is known."""

    def choose(self, layer: int, query: torch.Tensor) -> list[Part]:
        """query: [q_heads, head_dim], the question's mean query before rotation."""


class Reading:
    """What an answer's tokens attend to: parts of the memory and, behind them, a private tail of the answer's own tokens.

    Scores of each part are combined with a running maximum and sum, as in flash decoding, so the largest temporary is one
    part's [kv_heads, group x queries, tokens] in fp32.

    Attributes:
        scoring: while true, the attention that single tokens pay is noted for `evidence`.
    """

    def __init__(self, backbone: Backbone, parts: list[Part], ordinal: int, cancelled: Callable[[], bool]):
        """ordinal: stream index that the first token of the tail would have."""
        self.scoring = False
        self._backbone, self._layout = backbone, backbone.layout
        self._ordinal = ordinal
        self._cancelled = cancelled
        self._parts: dict[int, list[Part]] = {}             # by layer
        self._turns: dict[int, torch.Tensor | None] = {}    # None: nothing has to be turned
        for layer in range(self._layout.layers):
            self._read_in(layer, parts)
        self._chooser: Chooser | None = None
        self._question = slice(0)
        self._positions = torch.zeros(0)
        self._tail_tokens = 0
        self._step_tokens = 0
        self._tail_key, self._tail_value = self._layout.empty(0), self._layout.empty(0)
        self._tail_mass = torch.zeros(0, device=self._layout.device)
        self._newest: list[tuple[torch.Tensor, torch.Tensor]] = []      # what the newest pass added to which masses

    @property
    def tokens(self) -> int:
        """Tokens of the memory that a layer reads, in the layer that reads most."""
        return max(sum(part.tokens for part in parts) for parts in self._parts.values())

    def choose(self, chooser: Chooser, question: slice, positions: torch.Tensor) -> None:
        """Let the next forward pass choose what is read from then on, by its tokens `question` at `positions`."""
        self._chooser, self._question, self._positions = chooser, question, positions

    def begin(self, tokens: int) -> None:
        """Make room for `tokens` more tokens of the tail."""
        self._newest.clear()
        self._step_tokens = tokens
        needed, held = self._tail_tokens + tokens, self._tail_tokens
        if needed > self._tail_key.shape[2]:
            key, value = (self._layout.empty(max(2 * needed, _FIRST_CAPACITY)) for _ in range(2))
            key[:, :, :held], value[:, :, :held] = self._tail_key[:, :, :held], self._tail_value[:, :, :held]
            mass = torch.zeros(key.shape[2], device=self._layout.device)
            mass[:held] = self._tail_mass[:held]
            self._tail_key, self._tail_value, self._tail_mass = key, value, mass

    def commit(self) -> None:
        """Keep the tokens of the forward pass that just ended."""
        self._tail_tokens += self._step_tokens
        self._chooser = None

    @property
    def tail_mass(self) -> torch.Tensor:
        """Attention paid to each token of the tail while `scoring`, summed over layers and query heads, [tokens] fp32."""
        return self._tail_mass[:self._tail_tokens]

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float) -> torch.Tensor:
        """Prefix-causal attention over [parts ; tail]; see `AttentionMemory`."""
        if self._cancelled():
            raise Interrupted('the answer was interrupted')
        if self._chooser is not None:
            asking = self._backbone.unrotated(query[0].float(), self._positions)[:, self._question].mean(dim=1)
            self._read_in(layer, self._chooser.choose(layer, asking))
        tokens, kv_heads = query.shape[2], key.shape[1]
        held, end = self._tail_tokens, self._tail_tokens + tokens
        self._tail_key[layer, :, held:end] = key[0]
        self._tail_value[layer, :, held:end] = value[0]
        # [kv_heads, group x tokens, head_dim]: the query heads of a group share their keys.
        rows = (query[0].float() * scale).reshape(kv_heads, -1, query.shape[-1])
        memory, turns = self._parts[layer], self._turns[layer]
        turned = [rows] * len(memory) if turns is None else self._backbone.rotate(rows[None], turns[:, None, None])
        parts = [(part_rows, part.view.key[layer], part.view.value[layer]) for part_rows, part in zip(turned, memory)]
        parts.append((rows, self._tail_key[layer, :, :end], self._tail_value[layer, :, :end]))
        future = None
        if tokens > 1:
            future = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu_(1)
            future = future.repeat(rows.shape[1] // tokens, 1)

        top = rows.new_full((*rows.shape[:2], 1), float('-inf'))
        total, output = torch.zeros_like(top), torch.zeros_like(rows)
        noted = []
        for index, (part_rows, part_key, part_value) in enumerate(parts):
            scores = part_rows @ part_key.float().transpose(1, 2)
            if future is not None and index == len(parts) - 1:
                scores[..., held:].masked_fill_(future, float('-inf'))
            new_top = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
            mass, shrink = torch.exp(scores - new_top), torch.exp(top - new_top)
            total = total * shrink + mass.sum(dim=-1, keepdim=True)
            output = output * shrink + mass @ part_value.float()
            if self.scoring and tokens == 1:
                noted.append((mass, new_top))
            top = new_top
        if noted:
            self._note(layer, noted, top, total)
        return (output / total).reshape(query.shape).to(query.dtype)

    def evidence(self, records: list[StepRecord], limit: int) -> tuple[Evidence, ...]:
        """The most attended steps among `records`, greatest share first.

        Only visual tokens count: the prefix, timestamps and delimiters draw attention whatever they stand beside.
        """
        if not records or limit <= 0:
            return ()
        starts = torch.tensor([r.first_ordinal + r.visual_start for r in records], device=self._layout.device)
        ends = starts + torch.tensor([r.visual_tokens for r in records], device=self._layout.device)
        per_step = torch.zeros(len(records), dtype=torch.float64, device=self._layout.device)
        tail = torch.arange(self._ordinal, self._ordinal + self._tail_tokens, device=self._layout.device)
        parts = {id(part): part for parts in self._parts.values() for part in parts}.values()    # layers may share them
        for ordinal, mass in [*((part.view.ordinal, part.mass) for part in parts),
                              (tail, self._tail_mass[:self._tail_tokens])]:
            ordinal, mass = ordinal.reshape(-1), mass.reshape(-1).double()
            step = torch.searchsorted(starts, ordinal, right=True) - 1
            visual = (step >= 0) & (ordinal < ends[step.clamp_min(0)])
            per_step.index_add_(0, step[visual], mass[visual])
        total = per_step.sum()
        if total <= 0:
            return ()
        shares = per_step / total
        best = [i for i in shares.argsort(descending=True, stable=True)[:limit].tolist() if shares[i] > 0]
        return tuple(Evidence(records[i].first_stamp_ns, records[i].last_stamp_ns, shares[i].item()) for i in best)

    def take_back(self) -> None:
        """Leave out of the evidence what the newest forward pass noted."""
        for noted, mass in self._newest:
            noted -= mass
        self._newest.clear()

    def _read_in(self, layer: int, parts: list[Part]) -> None:
        self._parts[layer] = parts = [part for part in parts if part.tokens]
        turns = [part.turn for part in parts]
        self._turns[layer] = torch.tensor(turns, device=self._layout.device) if any(turns) else None

    def _note(self, layer: int, noted: list[tuple[torch.Tensor, torch.Tensor]], top: torch.Tensor,
              total: torch.Tensor) -> None:
        """Bring each part's masses to the common maximum, and add them up over the heads."""
        masses = [(mass * torch.exp(part_top - top) / total).sum(dim=1) for mass, part_top in noted]
        for part, mass in zip(self._parts[layer], masses):
            self._newest.append((part.mass, mass.sum(dim=0)) if part.mass.ndim == 1 else (part.mass[layer], mass))
        self._newest.append((self._tail_mass[:masses[-1].shape[-1]], masses[-1].sum(dim=0)))
        for noted_so_far, mass in self._newest[-len(masses):]:
            noted_so_far += mass
