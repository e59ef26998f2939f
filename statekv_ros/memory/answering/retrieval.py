"""Answer policy `retrieve(k)`: in every layer, the question reads the k frame steps that are nearest to it (in-context
retrieval of ReKV, ICLR 2025).

A step's key is the mean of its keys, the question's query the mean over its tokens, both before rotation as in ReKV:
rotated vectors of tokens at different places would cancel out in a mean. Heads are concatenated, a KV head once for each
query head that shares it, and the score is the dot product in fp32. The best k steps, ties to the earlier, are read in
stream order as if they stood one behind the other between the prefix and the question.
"""
import torch

from statekv_ros.memory.answering.choosing import FixedPages
from statekv_ros.memory.answering.reading import Part
from statekv_ros.memory.answering.snapshot import Snapshot
from statekv_ros.memory.detailed.pages import runs


class Retrieval:
    """The steps that an answer may choose from, and its choice in each layer.

    Attributes:
        visual: whether a step's key is the mean of its visual tokens' keys alone.
        chosen: step numbers per layer, in stream order; empty before `choose`.
    """

    visual = False

    def __init__(self, snapshot: Snapshot):
        self.chosen: dict[int, list[int]] = {}
        self._snapshot, self._steps = snapshot, snapshot.steps
        self._detailed = snapshot.seen.detailed
        # [steps, layers, kv_heads, head_dim]; kept by the cache, so a selection costs one dot product per step and layer.
        self._means = torch.stack([self._detailed.mean_key(step, self.visual) for step in self._steps]) if self._steps else None

    def choose(self, layer: int, query: torch.Tensor) -> tuple[list[Part], FixedPages | None]:
        """The prefix and this layer's k steps, placed right before the question; by pages where the cache is in few bits.

        Args:
            query: [q_heads, head_dim], the question's mean query before rotation.
        """
        scores = self.scores(layer, query)
        best = scores.argsort(descending=True, stable=True)[:self._snapshot.policy.retrieved_steps].sort().values.tolist()
        # What the memory overwrote since the question was asked is not there any more.
        steps = [step for index in best if (step := self._steps[index]).record.first_ordinal >= self._detailed.overwritten]
        self.chosen[layer] = [step.record.step for step in steps]
        return self._placed(steps)

    def scores(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Dot product of the query with each step's mean key, [steps] fp32."""
        if self._means is None:
            return query.new_zeros(0)
        means = self._means[:, layer]
        # Adding up the query heads that share a KV head first gives the same sum.
        per_kv_head = query.float().reshape(means.shape[1], -1, query.shape[-1]).sum(dim=1)
        # Not as a matrix product, which may round equal rows differently: ties would then be no ties.
        return (means * per_kv_head).flatten(1).sum(dim=1)

    def _placed(self, steps: list) -> tuple[list[Part], FixedPages | None]:
        detailed, parts, turns, distance = self._detailed, [], [], 0
        limit, position = self._snapshot.seen.positions.limit, self._snapshot.position
        for run in reversed(runs(steps, seamless=True, anywhere=detailed.by_pages)):
            distance += run[-1].record.next_position - run[0].record.position
            turn = min(distance, limit) + run[0].record.position - run[0].stretch.shift - position
            turns[:0] = [turn] * len(run)
            if not detailed.by_pages:
                parts.append(Part(detailed.view(run), turn))
        for view in detailed.prefix():
            distance += view.ordinal.numel()    # text: a position a token
            parts.append(Part(view, min(distance, limit) - position))
        layout = detailed.layout
        pages = FixedPages(detailed.pages, steps, turns, layout.kv_heads, layout.device) if detailed.by_pages else None
        return parts[::-1], pages
