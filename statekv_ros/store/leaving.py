"""The steps of a store that may have to leave, in the order in which they came, three numbers each."""
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from heapq import merge
from typing import NamedTuple

Name = tuple[str, int | None]   # camera and step; None: its state


class Held(NamedTuple):
    """One step or state: its place in the order of first arrival, and the bytes of the file that it takes."""
    age: int
    cost: int


class _OfCamera:
    """By age. Steps of a camera come in the order of their numbers; where they do not, finding one takes longer."""

    def __init__(self):
        self.steps, self.ages, self.costs = array('q'), array('q'), array('q')
        self._in_order = True

    def find(self, step: int) -> int | None:
        at = bisect_left(self.steps, step)
        if at < len(self.steps) and self.steps[at] == step:
            return at
        return None if self._in_order or step not in self.steps else self.steps.index(step)

    def append(self, step: int, held: Held) -> None:
        self._in_order &= not self.steps or self.steps[-1] < step
        for column, value in zip((self.steps, self.ages, self.costs), (step, *held)):
            column.append(value)

    def remove(self, at: int) -> None:
        for column in (self.steps, self.ages, self.costs):
            del column[at]


class Leaving:
    """By name, as a dict in the order of age: a new version of a step stays at its place, new ages come last."""

    def __init__(self):
        self._cameras: dict[str, _OfCamera] = {}

    def __iter__(self) -> Iterator[Name]:
        return (name for name, _ in self.items())

    def __getitem__(self, name: Name) -> Held:
        held = self.get(name)
        if held is None:
            raise KeyError(name)
        return held

    def __setitem__(self, name: Name, held: Held) -> None:
        camera, step = name
        of_camera = self._cameras.setdefault(camera, _OfCamera())
        at = of_camera.find(step)
        if at is None:
            of_camera.append(step, held)
        else:
            of_camera.ages[at], of_camera.costs[at] = held

    def get(self, name: Name) -> Held | None:
        camera, step = name
        of_camera = self._cameras.get(camera)
        at = of_camera.find(step) if of_camera else None
        return None if at is None else Held(of_camera.ages[at], of_camera.costs[at])

    def pop(self, name: Name) -> Held:
        held, of_camera = self[name], self._cameras[name[0]]
        of_camera.remove(of_camera.find(name[1]))
        return held

    def items(self) -> Iterator[tuple[Name, Held]]:
        """The oldest first, as they are gone through."""
        def rows(camera: str, of: _OfCamera) -> Iterator[tuple[int, Name, int]]:
            return (((age, (camera, step), cost)) for age, step, cost in zip(of.ages, of.steps, of.costs))

        return ((name, Held(age, cost)) for age, name, cost in merge(*(rows(*each) for each in self._cameras.items())))
