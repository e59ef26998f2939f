"""A patrol: a robot passes doors and objects on a mostly empty corridor. Only a door, seen once, says which room it enters."""
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

COLOURS = ('red', 'green', 'blue', 'yellow', 'purple', 'white')
SHAPES = ('ball', 'box', 'cone', 'ring')
PLURALS = ('balls', 'boxes', 'cones', 'rings')

# Empty steps between two sights: geometric with a mean drawn per patrol, so a model meets crowded and empty corridors.
_GAP_MEAN = (1.0, 5.0)
_LONGEST_GAP = 12
_LINGER = 0.3             # chance that a sight stays for a second step


class View(IntEnum):
    """What a step shows."""
    EMPTY = 0
    OBJECT = 1
    DOOR = 2


class Step(NamedTuple):
    """One step of one second.

    Attributes:
        view: what is in view; `shape` (objects only) and `colour` index SHAPES and COLOURS.
        sight: number of the sight in the patrol, doors included; -1 where nothing is in view.
        room: colour of the last door passed.
    """
    view: View
    shape: int
    colour: int
    sight: int
    room: int


class Sight(NamedTuple):
    """An object or a door that was passed, in view from step `first` to step `last`."""
    view: View
    shape: int
    colour: int
    room: int
    first: int
    last: int

    @property
    def thing(self) -> tuple[int, int]:
        return self.shape, self.colour


@dataclass(frozen=True)
class Patrol:
    """Steps, and the sights in them in time order."""
    steps: tuple[Step, ...]
    sights: tuple[Sight, ...]

    def objects(self, step: int) -> list[Sight]:
        """Objects passed until `step`, that step included."""
        return [sight for sight in self.sights if sight.view == View.OBJECT and sight.first <= step]


class Walk:
    """A patrol in the making, step by step.

    Attributes:
        steps, sights: so far; room: colour of the last door passed.
    """

    def __init__(self, room: int, random: np.random.Generator):
        """It begins at the door of `room`, so the first room is known."""
        self.steps: list[Step] = []
        self.sights: list[Sight] = []
        self.room, self._random = room, random
        self.pass_door(room)

    def go_on(self, steps: int) -> None:
        """Steps of empty corridor."""
        self.steps += [Step(View.EMPTY, 0, 0, -1, self.room)] * steps

    def pass_door(self, colour: int) -> None:
        """Into the room of that colour."""
        self.room = colour
        self._pass_by(View.DOOR, 0, colour)

    def pass_object(self, shape: int, colour: int) -> None:
        """One that stands beside the way."""
        self._pass_by(View.OBJECT, shape, colour)

    def patrol(self, steps: int) -> Patrol:
        """Its first `steps` steps."""
        sights = (sight._replace(last=min(sight.last, steps - 1)) for sight in self.sights if sight.first < steps)
        return Patrol(tuple(self.steps[:steps]), tuple(sights))

    def _pass_by(self, view: View, shape: int, colour: int) -> None:
        first = len(self.steps)
        for _ in range(1 + (self._random.random() < _LINGER)):
            self.steps.append(Step(view, shape, colour, len(self.sights), self.room))
        self.sights.append(Sight(view, shape, colour, self.room, first, len(self.steps) - 1))


def make_patrol(steps: int, random: np.random.Generator) -> Patrol:
    """A patrol of that many steps. It begins at a door, so the first room is known."""
    if steps < 1:
        raise ValueError(f'a patrol has at least one step, got {steps}')
    gap = 1 / (1 + random.uniform(*_GAP_MEAN))
    door_chance, repeat_chance = random.uniform(.15, .4), random.uniform(.1, .6)
    met: list[tuple[int, int]] = []
    walk = Walk(int(random.integers(len(COLOURS))), random)
    while len(walk.steps) < steps:
        walk.go_on(min(int(random.geometric(gap)) - 1, _LONGEST_GAP))
        if len(walk.steps) >= steps:
            break
        if random.random() < door_chance:
            walk.pass_door(int(walk.room + random.integers(1, len(COLOURS))) % len(COLOURS))
            continue
        if met and random.random() < repeat_chance:
            thing = met[int(random.integers(len(met)))]
        else:
            thing = int(random.integers(len(SHAPES))), int(random.integers(len(COLOURS)))
        met.append(thing)
        walk.pass_object(*thing)
    return walk.patrol(steps)


def name_of(shape: int, colour: int) -> str:
    """'red ball'."""
    return f'{COLOURS[colour]} {SHAPES[shape]}'


def words_in_view(step: Step) -> tuple[str, str]:
    """Colour and thing in view, ('red', 'ball') or ('red', 'door'); ('nothing', 'nothing') on an empty corridor."""
    if step.view == View.EMPTY:
        return 'nothing', 'nothing'
    return COLOURS[step.colour], SHAPES[step.shape] if step.view == View.OBJECT else 'door'


def name_in_view(step: Step) -> str:
    """'nothing', 'red ball' or 'red door'."""
    return 'nothing' if step.view == View.EMPTY else ' '.join(words_in_view(step))
