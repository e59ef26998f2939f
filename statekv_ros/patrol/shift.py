"""A shift: a patrol of any length on which things are rare, so that what was seen long ago is still the truth at its end.

Every thing is passed once. Fourth roots of ages are spread evenly, whatever the length: about as many things were passed in
the last minute as in each of the next three, in ten minutes before that, and in the first half hour of an hour.
"""
import numpy as np

from statekv_ros.patrol.questions import Question, answer_at
from statekv_ros.patrol.world import COLOURS, SHAPES, Patrol, View, Walk

LEAST_STEPS = 40
KINDS = ('exist', 'where', 'before', 'after', 'when')      # what can be asked about one thing
_THINGS, _STEPS_EACH = 20, 8        # of 24 that there are, so that some were never seen; fewer where there is less time
_THINGS_PER_DOOR = 3
_YOUNGEST = 13      # steps before the end, so that the youngest fact is 10 s old or a little more
_APART = 3          # two steps of a thing that lingers, and an empty one
_POWER = 4


def make_shift(steps: int, random: np.random.Generator) -> Patrol:
    """A shift of that many steps. It begins at a door, and ends on ten seconds of empty corridor."""
    if steps < LEAST_STEPS:
        raise ValueError(f'a shift has at least {LEAST_STEPS} steps, got {steps}')
    things = min(_THINGS, steps // _STEPS_EACH)
    passed = iter(random.permutation(len(SHAPES) * len(COLOURS))[:things].tolist())
    views = random.permutation([View.OBJECT] * things + [View.DOOR] * (things // _THINGS_PER_DOOR))
    youngest, oldest = (age ** (1 / _POWER) for age in (_YOUNGEST, steps - _APART))
    spread = (np.arange(len(views)) + random.random(len(views))) / len(views)
    ages = ((youngest + (oldest - youngest) * spread) ** _POWER).astype(int).tolist()
    for index in range(1, len(ages)):
        ages[index] = max(ages[index], ages[index - 1] + _APART)
    walk = Walk(int(random.integers(len(COLOURS))), random)
    for view, age in zip(views, reversed(ages)):
        walk.go_on(steps - age - len(walk.steps))
        if view == View.DOOR:
            walk.pass_door(int(walk.room + random.integers(1, len(COLOURS))) % len(COLOURS))
        else:
            walk.pass_object(*divmod(next(passed), len(COLOURS)))
    walk.go_on(steps - len(walk.steps))
    return walk.patrol(steps)


def ask_shift(steps: int, random: np.random.Generator) -> tuple[Patrol, list[tuple[Question, int]]]:
    """A shift, and all that can be asked at its end about one thing, with the step it is asked at: every kind of KINDS about
    every thing that was seen (`where` but for those of the present room, which gives it away), `exist` about the others."""
    patrol, last, asked = make_shift(steps, random), steps - 1, []
    for thing in ((shape, colour) for shape in range(len(SHAPES)) for colour in range(len(COLOURS))):
        for kind in KINDS:
            answer = answer_at(patrol, question := Question(kind, thing), last)
            if answer is not None and not (kind == 'where' and answer == COLOURS[patrol.steps[last].room]):
                asked.append((question, last))
    return patrol, asked
