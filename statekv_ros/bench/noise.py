"""Frame steps of noise: hours of memory in minutes, for measuring what answers over it cost. What they say means nothing."""
from collections.abc import Sequence

import numpy as np
import torch

from statekv_ros.backbones.base import TokenInputs
from statekv_ros.backbones.family import Family

_DRAWN = 4096   # tokens, of which each step takes some


class NoiseSteps:
    """Stands where a stream of prefill policy `none` has its recorded graphs. Text, positions and shapes of a step are true; its
    keys and values are drawn rather than computed: those of a step lie around a mean of their own, as those of one picture do.
    """

    def __init__(self, backbone: Family, seed: int):
        layout = backbone.layout
        self._backbone, self._random = backbone, torch.Generator(layout.device).manual_seed(seed)
        self._noise = torch.randn(2, layout.kv_heads, _DRAWN, layout.head_dim, generator=self._random, dtype=layout.dtype,
                                  device=layout.device)
        self._at = np.random.default_rng(seed)

    def encode(self, frames: Sequence[np.ndarray], seconds: Sequence[float], position: int, first_frame: int) -> TokenInputs:
        """As `Backbone.encode`, without embeddings."""
        step = self._backbone.stage(frames, seconds, position, first_frame).on(self._backbone.device)
        return TokenInputs(torch.empty(1, step.tokens, 0), step.positions, step.next_position, step.start, step.visual_start,
                           step.visual_tokens)

    def forward(self, inputs: TokenInputs, memory) -> None:
        """Give the memory (a `VideoStream`) its keys and values."""
        begin = self._at.integers(_DRAWN - inputs.tokens + 1)
        mean = torch.randn(self._backbone.layout.layers, self._noise.shape[1], 1, self._noise.shape[3], generator=self._random,
                           dtype=self._noise.dtype, device=self._noise.device)
        for row, noise in zip(memory.carried.frame(), self._noise[:, None, :, begin:begin + inputs.tokens]):
            row.copy_(mean + noise)
        memory.replayed()

    def clear(self) -> None:
        """There is nothing that a reset would make wrong."""
