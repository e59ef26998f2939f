"""What training shows when: short videos first, longer ones later, the kinds of questions by what is still answered wrongly."""
from dataclasses import dataclass

import numpy as np

from statekv_ros.patrol.questions import KINDS


@dataclass(frozen=True)
class Stage:
    """Until this share of training: batches of `rows` videos of one of these lengths in steps, with so many questions each.

    Attributes:
        floor: how often a kind is asked that is hardly ever answered wrongly.
        urgency: how much more often for its share of wrong answers.
    """
    until: float
    rows: int
    steps: tuple[int, ...]
    questions: int
    floor: float = .3
    urgency: float = 1.3


STAGES = (Stage(.03, 48, (3, 4, 5), 10), Stage(.10, 36, (6, 8, 10), 12), Stage(.30, 24, (12, 16, 20), 16),
          Stage(.60, 16, (24, 32, 36), 18), Stage(1., 9, (32, 48, 64), 22))
# After them, once all kinds are understood: long videos, and mostly the kinds that still need it.
POLISH = Stage(1., 9, (32, 48, 64, 64), 22, floor=.15, urgency=4.)
_EASY = .97


def stage_at(done: float) -> Stage:
    """The stage after this share of training."""
    return next(stage for stage in STAGES if done < stage.until or stage is STAGES[-1])


class KindScores:
    """Running share of right answers per kind, and how often each should be asked."""

    def __init__(self, scores: dict[str, float] | None = None, memory: float = .95):
        self.scores = dict(scores or {})
        self._memory = memory

    def add(self, kind: str, right: float) -> None:
        self.scores[kind] = right + self._memory * (self.scores.get(kind, right) - right)

    def weights(self, stage: Stage) -> np.ndarray:
        """Of each of KINDS; in proportion to how often it is to be asked."""
        scores = [self.scores.get(kind, 0.) for kind in KINDS]
        return np.array([stage.floor + (0. if score >= _EASY else .05 + stage.urgency * (1 - score)) for score in scores])
