"""What training shows when: short videos first, longer ones later, the kinds of questions by what is still answered wrongly."""
from dataclasses import dataclass

import numpy as np

from statekv_ros.patrol.questions import KINDS


@dataclass(frozen=True)
class Stage:
    """Until this share of training: batches of `rows` videos of one of these lengths in steps, with so many questions each."""
    until: float
    rows: int
    steps: tuple[int, ...]
    questions: int


STAGES = (Stage(.03, 48, (3, 4, 5), 10), Stage(.10, 36, (6, 8, 10), 12), Stage(.30, 24, (12, 16, 20), 16),
          Stage(.60, 16, (24, 32, 36), 18), Stage(1., 9, (32, 48, 64), 22))
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

    def weights(self) -> np.ndarray:
        scores = [self.scores.get(kind, 0.) for kind in KINDS]
        return np.array([.3 if score >= _EASY else .35 + 1.3 * (1 - score) for score in scores])
