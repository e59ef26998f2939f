"""What a frame step cannot beat on a device: its operations at the device's matmul rate, its bytes at its copy rate."""
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from statekv_ros.backbones.base import StagedStep
from statekv_ros.backbones.family import Family
from statekv_ros.backbones.size import ModelSize
from statekv_ros.evaluation.flops import step_flops


class Work(NamedTuple):
    """Of one frame step."""

    flops: float
    bytes: float

    def floor_ms(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Milliseconds, were all of it to run at the slower of the two rates and nothing else to cost anything."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s) * 1e3


@torch.inference_mode()
def vision_flops(backbone: Family, step: StagedStep) -> int:
    """Operations of the vision tower and projector for a step on the device, counted while they run."""
    # The counter knows matrix products, and not every fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone.embed_step(step)
    return counter.get_total_flops()


def step_work(size: ModelSize, tied: bool, seen_flops: int, tokens: int, carried: int, scored: bool) -> Work:
    """Count a step of `tokens` tokens behind `carried` ones.

    Operations as in `step_flops`, and the vision tower's. Weights are read once, keys and values of the past once; the step's
    own are written to the state and to the detailed cache.

    Args:
        tied: whether the model reads and writes tokens with one table (`vocabulary` x `hidden`), which a step does not touch.
        seen_flops: of the vision tower.
        scored: whether importance is computed too.
    """
    tables = (1 if tied else 2) * size.vocabulary * size.hidden * size.value_bytes
    kv_tokens = carried + tokens + (2 if scored else 1) * tokens
    return Work(seen_flops + step_flops(size, tokens, carried, scored),
                size.weights_bytes - tables + kv_tokens * size.kv_bytes_per_token)
