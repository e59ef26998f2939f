"""Full attention as a step pays for it at some frame: every frame so far in the cache, attention by torch's fastest kernel."""
import torch

from statekv_ros.backbones.base import KVLayout
from statekv_ros.bench.hardware import median_ms
from statekv_ros.bench.output_only import output_only


class GrownCache:
    """Keys and values of a long stream, filled with noise; a step writes its own behind the first `tokens` and attends to all.

    An `AttentionMemory`. One cache serves every length up to its capacity.

    Attributes:
        tokens: how many are in the past of the next step.
    """

    def __init__(self, layout: KVLayout, capacity: int):
        self.tokens = 0
        self._layout = layout
        self._key, self._value = layout.empty(capacity).normal_(), layout.empty(capacity).normal_()
        self._kinds: dict[tuple[int, int], tuple] = {}

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float) -> torch.Tensor:
        """See `AttentionMemory`; `scale` must be torch's own, 1 / sqrt(head_dim)."""
        end = self.tokens + key.shape[2]
        self._key[layer, :, self.tokens:end] = key[0]
        self._value[layer, :, self.tokens:end] = value[0]
        tensors = query, self._key[layer, None, :, :end], self._value[layer, None, :, :end]
        if (query.shape[2], end) not in self._kinds:
            self._kinds[query.shape[2], end] = self._fastest(tensors)
        return self._kinds[query.shape[2], end][0](tensors)

    def kind(self, step_tokens: int) -> str:
        """Name of the kernel that a step of so many tokens attends with; known once it has run."""
        return self._kinds[step_tokens, self.tokens + step_tokens][1]

    def _fastest(self, tensors: tuple) -> tuple:
        kinds = output_only(tensors)
        if len(kinds) > 1:
            kinds.pop('math', None)  # it writes all scores to memory
        return min(((attend, kind) for kind, attend in kinds.items()),
                   key=lambda pair: median_ms(pair[0], [tensors], self._layout.device))
