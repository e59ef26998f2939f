"""The commit of a step as recorded work: a score of small kernels that the host would launch one by one, each time the same."""
import warnings
from collections import OrderedDict
from collections.abc import Callable

import torch

from statekv_ros.memory.carried.state import CompressedState
from statekv_ros.memory.recorded import Recorder


class CommitGraphs:
    """Commits the steps of one state. Once it is full, what comes twice in a row at the same place is recorded and from then on
    replayed; however a step was computed, alone or in a batch, what is kept of it depends on that place alone.

    What is selected is compared with the eager selection before anything moves by it. When that differs, or nothing can be
    recorded, a warning says why and commits stay eager: frame steps do not depend on these recordings.

    Attributes:
        replays: commits that were replayed.
        off: why none is recorded any more; '' while some are.
    """

    def __init__(self, make_recorder: Callable[[], Recorder], most: int = 4):
        """As `StepGraphs`; a recorder of its own, so that neither fails for the other."""
        self._make_recorder, self._most = make_recorder, most
        self.replays, self.off = 0, ''
        self.clear()

    def clear(self) -> None:
        """Forget all recordings."""
        self._recorder: Recorder | None = None
        self._recorded: OrderedDict[tuple, tuple[Callable[[], None], Callable[[], None]]] = OrderedDict()
        self._last: tuple | None = None

    def commit(self, state: CompressedState) -> None:
        """As `CompressedState.commit`."""
        place = state.place()
        last, self._last = self._last, place
        if place in self._recorded:
            self._recorded.move_to_end(place)
            for replay in self._recorded[place]:
                replay()
            self.replays += 1
        elif place is not None and place == last and not self.off:
            self._record(state, place)
        else:
            state.commit()

    def _record(self, state: CompressedState, place: tuple) -> None:
        """Commit a step and record how."""
        right = state.select()
        try:
            self._recorder = self._recorder or self._make_recorder()
            select, moves = self._recorder(state.select)
            select()
            if not all(map(torch.equal, moves, right)):
                raise ArithmeticError('a replayed selection differs from the eager one')
            move, _ = self._recorder(lambda: state.move(*moves))
            move()
        except Exception as error:  # CUDA and the library raise many kinds
            self.clear()
            self.off = f'{type(error).__name__}: {error}'
            warnings.warn(self.problem, RuntimeWarning, stacklevel=3)
            state.move(*right)
            return
        self._recorded[place] = select, move
        if len(self._recorded) > self._most:
            self._recorded.popitem(last=False)

    @property
    def problem(self) -> str:
        """`off` as a sentence."""
        return self.off and f'the selection after frame steps is not replayed as a CUDA graph but runs eagerly: {self.off}'

