"""How far back saved steps must be followed for a carried context to be again what it is after the newest one."""
from collections import deque

import numpy as np


class Needs:
    """Follows what was saved of the carried context with each step.

    A slot of the compressed state is known from the step on in which it was saved last; of frames that are carried whole, the
    steps themselves must be there.

    Attributes:
        first: the step to begin with.
    """

    def __init__(self):
        self.first = 0
        self._since = np.zeros(0, np.int64)                 # by slot
        self._steps: deque[tuple[int, int]] = deque()       # step and first ordinal, where frames are carried

    def note(self, step: int, first_ordinal: int, change: dict, share: dict | None) -> None:
        """A step was saved with these headers of `change` and `share` of the carried context."""
        tokens = change['tokens']
        begin, end = share['share'] if share else (0, 0)
        new = np.full(max(0, tokens - len(self._since)), step)
        self._since = np.concatenate([self._since, new])[:tokens]
        self._since[begin:end] = step
        self.first = int(self._since.min(initial=step))
        if 'first_ordinal' in change:
            if end - begin == tokens:
                self._steps.clear()
            self._steps.append((step, first_ordinal))
            while len(self._steps) > 1 and self._steps[1][1] <= change['first_ordinal']:
                self._steps.popleft()
            self.first = self._steps[0][0] if tokens else step

    def begin_at(self, step: int, first_ordinal: int, tokens: int) -> None:
        """All that is carried before `step` was saved apart from the steps."""
        self.first = step
        self._since = np.full(tokens, step)
        self._steps = deque([(step, first_ordinal)])
