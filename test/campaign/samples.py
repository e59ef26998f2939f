"""What a node holds and how long it takes, minute by minute, and how fast that changes."""
import statistics
import time
from collections.abc import Iterable

import numpy as np

from campaign.resources import usage

# Of a sample: what is said to grow or not, with its unit.
SLOPES = {'rss_mb': 'MB', 'fds': 'open files', 'threads': 'threads', 'step_ms_p50': 'ms', 'answer_ms_p50': 'ms'}


class Samples:
    """One for each span of time.

    Attributes:
        each_s: seconds between two.
        rows: so far; each with `minute` (minutes since the begin), what `resources.usage` tells, and p50 and p95 of frame steps
            and answers of its span (None without any).
    """

    def __init__(self, each_s: float):
        self.each_s, self.rows = each_s, []
        self._begun = self._due = time.monotonic()
        self._step_ms: list[float] = []
        self._answer_ms: list[float] = []
        self._due += each_s

    def note_steps(self, times_ms: Iterable[float]) -> None:
        """Frame steps, in ms."""
        self._step_ms += times_ms

    def note_answer(self, time_ms: float) -> None:
        """From question to reply, in ms."""
        self._answer_ms.append(time_ms)

    def tick(self, pid: int) -> None:
        """Take a sample of that process when it is time."""
        if (now := time.monotonic()) < self._due:
            return
        self._due = now + self.each_s
        held = usage(pid)
        row = {'minute': round((now - self._begun) / 60, 2), 'rss_mb': held.rss_mb, 'fds': held.fds, 'threads': held.threads,
               'shm_mb': held.shm_mb, 'steps': len(self._step_ms), 'answers': len(self._answer_ms)}
        for name, values in (('step', self._step_ms), ('answer', self._answer_ms)):
            for percent in (50, 95):
                row[f'{name}_ms_p{percent}'] = round(float(np.percentile(values, percent)), 2) if values else None
            values.clear()
        self.rows.append(row)

    def slopes(self, warm_up_s: float) -> dict[str, float]:
        """Change per hour of each of SLOPES over the samples after the warm-up; those with fewer than two are left out."""
        found = {}
        for name in SLOPES:
            points = [(row['minute'], row[name]) for row in self.rows
                      if row['minute'] * 60 > warm_up_s and row[name] is not None]
            if len(points) > 1:
                found[f'{name}_slope_per_hour'] = round(statistics.linear_regression(*zip(*points)).slope * 60, 2)
        return found
