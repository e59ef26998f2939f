"""Attention of an answer over the memory, chunk by chunk, without joining the chunks and without touching the stream."""
from collections.abc import Callable

import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.errors import Interrupted
from statekv_ros.memory.detailed import MemoryView
from statekv_ros.memory.records import Evidence, StepRecord

_FIRST_CAPACITY = 64


class Reading:
    """What an answer's tokens attend to: the snapshot's views and, behind them, a private tail of the answer's own tokens.

    Scores of each part are combined with a running maximum and sum, as in flash decoding, so the largest temporary is one
    part's [kv_heads, group x queries, tokens] in fp32.

    Attributes:
        scoring: while true, the attention that single tokens pay is noted for `evidence`.
    """

    def __init__(self, backbone: Backbone, views: list[MemoryView], turns: list[int], ordinal: int,
                 cancelled: Callable[[], bool]):
        """
        Args:
            turns: by how many positions a query has to be turned for each view, to stand where that view's keys are read.
            ordinal: stream index that the first token of the tail would have.
        """
        self.scoring = False
        self._layout = layout = backbone.layout
        self._rotate = backbone.rotate
        self._views = [view for view in views if view.key.shape[2]]
        self._turns = torch.tensor([t for view, t in zip(views, turns) if view.key.shape[2]], device=layout.device)
        self._turned = any(turns)
        self._ordinal = ordinal
        self._cancelled = cancelled
        self._mass = [torch.zeros(view.ordinal.shape, device=layout.device) for view in self._views]
        self._tail_tokens = 0
        self._step_tokens = 0
        self._tail_key, self._tail_value = layout.empty(0), layout.empty(0)
        self._tail_mass = torch.zeros(0, device=layout.device)

    def begin(self, tokens: int) -> None:
        """Make room for `tokens` more tokens of the tail."""
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

    @property
    def tail_mass(self) -> torch.Tensor:
        """Attention paid to each token of the tail while `scoring`, summed over layers and query heads, [tokens] fp32."""
        return self._tail_mass[:self._tail_tokens]

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float) -> torch.Tensor:
        """Prefix-causal attention over [views ; tail]; see `AttentionMemory`."""
        if self._cancelled():
            raise Interrupted('the answer was interrupted')
        tokens, kv_heads = query.shape[2], key.shape[1]
        held, end = self._tail_tokens, self._tail_tokens + tokens
        self._tail_key[layer, :, held:end] = key[0]
        self._tail_value[layer, :, held:end] = value[0]
        # [kv_heads, group x tokens, head_dim]: the query heads of a group share their keys.
        rows = (query[0].float() * scale).reshape(kv_heads, -1, query.shape[-1])
        views_rows = self._rotate(rows[None], self._turns[:, None, None]) if self._turned else [rows] * len(self._views)
        parts = [(view_rows, view.key[layer], view.value[layer]) for view_rows, view in zip(views_rows, self._views)]
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
        for ordinal, mass in [*zip((view.ordinal for view in self._views), self._mass),
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

    def _note(self, layer: int, noted: list[tuple[torch.Tensor, torch.Tensor]], top: torch.Tensor,
              total: torch.Tensor) -> None:
        """Bring each part's masses to the common maximum, and add them up over the heads."""
        masses = [(mass * torch.exp(part_top - top) / total).sum(dim=1) for mass, part_top in noted]
        for view_mass, mass in zip(self._mass, masses):
            if view_mass.ndim == 1:
                view_mass += mass.sum(dim=0)
            else:
                view_mass[layer] += mass
        self._tail_mass[:masses[-1].shape[-1]] += masses[-1].sum(dim=0)
