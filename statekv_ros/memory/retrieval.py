"""Answer policy `retrieve(k)`: in every layer, the question reads the k frame steps that are nearest to it (in-context
retrieval of ReKV, ICLR 2025).

A step's key is the mean of its keys, the question's query the mean over its tokens, both before rotation as in ReKV:
rotated vectors of tokens at different places would cancel out in a mean. Heads are concatenated, a KV head once for each
query head that shares it, and the score is the dot product in fp32. The best k steps, ties to the earlier, are read in
stream order as if they stood one behind the other between the prefix and the question.

Means are kept as steps are seen, so a selection costs one dot product per step and layer, whatever the frames' size.
"""
from collections.abc import Sequence
from itertools import groupby

import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.memory.chunks import Block, runs
from statekv_ros.memory.reading import Part


class Retrieval:
    """The blocks that an answer may choose from, and its choice in each layer.

    Attributes:
        chosen: step numbers per layer, in stream order; empty before `choose`.
    """

    def __init__(self, backbone: Backbone, blocks: Sequence[Block], count: int, position: int, limit: int):
        """
        Args:
            blocks: the prefix, where there is one, and the steps to choose from.
            count: k.
            position: where the first token behind the memory stands, as the model is given it.
            limit: nothing is read at a greater distance than this many positions.
        """
        self.chosen: dict[int, list[int]] = {}
        self._backbone = backbone
        self._prefix = [block for block in blocks if block.record.step < 0]
        self._steps = [block for block in blocks if block.record.step >= 0]
        self._count, self._position, self._limit = count, position, limit
        # Means lie chunk by chunk.
        self._means = [(chunk[0].chunk.means, torch.tensor([block.number for block in chunk], device=backbone.device))
                       for _, group in groupby(self._steps, key=lambda block: id(block.chunk)) if (chunk := list(group))]

    def prefix(self) -> list[Part]:
        """What is read before there is a choice."""
        return self._placed(self._prefix)

    def choose(self, layer: int, query: torch.Tensor) -> list[Part]:
        """The prefix and this layer's k steps, placed right before the question.

        Args:
            query: [q_heads, head_dim], the question's mean query before rotation.
        """
        scores = self.scores(layer, query)
        best = scores.argsort(descending=True, stable=True)[:self._count].sort().values.tolist()
        steps = [self._steps[index] for index in best]
        self.chosen[layer] = [block.record.step for block in steps]
        return self._placed([*self._prefix, *steps])

    def scores(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Dot product of the query with each step's mean key, [steps] fp32."""
        if not self._means:
            return query.new_zeros(0)
        # Adding up the query heads that share a KV head first gives the same sum.
        per_kv_head = query.float().reshape(self._backbone.layout.kv_heads, -1, query.shape[-1]).sum(dim=1)
        # Not as a matrix product, which may round equal rows differently: ties would then be no ties.
        return torch.cat([(means[numbers, layer] * per_kv_head).flatten(1).sum(dim=1) for means, numbers in self._means])

    def _placed(self, blocks: list[Block]) -> list[Part]:
        parts, distance = [], 0
        for run in reversed(runs(blocks, seamless=True)):
            distance += run.last.record.next_position - run.first.record.position
            view = run.view()
            turn = min(distance, self._limit) + view.position - view.shift - self._position
            parts.append(Part(view, turn))
        return parts[::-1]
