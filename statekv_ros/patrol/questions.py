"""Questions about a patrol: every kind, its true answer at any step, and how to ask one whose answer is well defined."""
from dataclasses import dataclass

import numpy as np

from statekv_ros.patrol.world import COLOURS, PLURALS, SHAPES, Patrol, Sight, View, name_in_view, name_of

# What is in view now; what was, which the detailed cache may hold; what only grows while watching.
PERCEPTION = ('now',)
RECALL = ('exist', 'first', 'last', 'where', 'here', 'before', 'after', 'when')
FORMED = ('count', 'again')
KINDS = PERCEPTION + RECALL + FORMED

LARGEST_COUNT = 5
_HARD_NEGATIVE = .6
_OTHER_ROOM = .7


@dataclass(frozen=True)
class Question:
    """A question about a patrol, independent of when it is asked.

    Attributes:
        kind: one of KINDS.
        thing: (shape, colour) that it names; shape alone for `first`, `last` and `count` (colour -1).
    """
    kind: str
    thing: tuple[int, int] = (-1, -1)

    @property
    def text(self) -> str:
        shape, colour = self.thing
        if self.kind in _ABOUT_THING:
            return _ABOUT_THING[self.kind].format(name_of(shape, colour))
        if self.kind == 'count':
            return f'how many {PLURALS[shape]} did you see?'
        if self.kind in ('first', 'last'):
            return f'what colour was the {self.kind} {SHAPES[shape]}?'
        return _PLAIN[self.kind]


_PLAIN = {'now': 'what is in view?', 'here': 'which room are you in?', 'again': 'was this object seen before?'}
_ABOUT_THING = {'exist': 'did you see a {}?', 'where': 'in which room was the {}?', 'when': 'when did you see the {}?',
                'before': 'what came just before the {}?', 'after': 'what came just after the {}?'}


def answer_at(patrol: Patrol, question: Question, step: int, seconds: list[int] | None = None) -> str | None:
    """The true answer when asked right after `step`, or None where there is none then.

    seconds: whole second that each step shows; the step's number when None.
    """
    kind, shape = question.kind, question.thing[0]
    now = patrol.steps[step]
    if kind == 'now':
        return name_in_view(now)
    if kind == 'here':
        return COLOURS[now.room]
    objects = patrol.objects(step)
    if kind == 'again':
        if now.view != View.OBJECT:
            return None
        return 'yes' if any(sight.thing == objects[-1].thing for sight in objects[:-1]) else 'no'
    if kind == 'exist':
        return 'yes' if any(sight.thing == question.thing for sight in objects) else 'no'
    alike = [sight for sight in objects if sight.shape == shape]
    if kind == 'count':
        return str(len(alike))
    if kind in ('first', 'last'):
        return COLOURS[alike[0 if kind == 'first' else -1].colour] if alike else None
    index = [i for i, sight in enumerate(objects) if sight.thing == question.thing]
    if len(index) != 1:     # seen twice: "the" red ball is not well defined
        return None
    sight = objects[index[0]]
    if kind == 'where':
        return COLOURS[sight.room]
    if kind == 'when':
        return str(seconds[sight.first] if seconds else sight.first)
    beside = index[0] + (1 if kind == 'after' else -1)
    return name_of(*objects[beside].thing) if 0 <= beside < len(objects) else None


def holds_during(patrol: Patrol, question: Question, step: int) -> tuple[int, int]:
    """First and last step around `step` between which the answer stays the same."""
    answer = answer_at(patrol, question, step)
    first = last = step
    while first > 0 and answer_at(patrol, question, first - 1) == answer:
        first -= 1
    while last + 1 < len(patrol.steps) and answer_at(patrol, question, last + 1) == answer:
        last += 1
    return first, last


def evidence_steps(patrol: Patrol, question: Question, step: int) -> tuple[int, ...]:
    """Steps that hold the answer to a question about one sight (`now`, `first`, `last`, `when`, `exist` with a yes,
    and the named thing's neighbour for `before` and `after`); empty for other kinds."""
    objects = patrol.objects(step)
    sight: Sight | None = None
    if question.kind == 'now':
        return step,
    if question.kind in ('first', 'last'):
        alike = [s for s in objects if s.shape == question.thing[0]]
        sight = alike[0 if question.kind == 'first' else -1] if alike else None
    elif question.kind in ('when', 'exist', 'before', 'after'):
        index = [i for i, s in enumerate(objects) if s.thing == question.thing]
        if index:
            beside = index[-1] + {'before': -1, 'after': 1}.get(question.kind, 0)
            sight = objects[beside] if 0 <= beside < len(objects) else None
    return tuple(range(sight.first, min(sight.last, step) + 1)) if sight else ()


def newest_fact_step(patrol: Patrol, question: Question, step: int) -> int | None:
    """The newest step that shows what the answer rests on: the named thing, and its neighbour for `before` and `after`, the
    last door for `here`, the last that was counted for `count`. None where nothing that was seen shows it (an `exist` with a
    no, a `count` of 0)."""
    if question.kind in ('now', 'again'):
        return step
    if question.kind == 'here':
        shown = [sight for sight in patrol.sights if sight.view == View.DOOR and sight.first <= step][-1:]
    elif question.kind == 'count':
        shown = [sight for sight in patrol.objects(step) if sight.shape == question.thing[0]]
    else:
        shown = [sight for sight in patrol.objects(step) if sight.thing == question.thing][-1:]
    return max([*(min(sight.last, step) for sight in shown), *evidence_steps(patrol, question, step)], default=None)


def ask(patrol: Patrol, kind: str, step: int, random: np.random.Generator, hard: bool = False) -> Question | None:
    """A question of a kind with a well-defined answer right after `step`, or None when there is none.

    hard: leave out questions that a shortcut answers, as the only object's colour for `first`, or the present room for `where`.
    """
    if kind in _PLAIN:
        question = Question(kind)
        if kind == 'again' and len(patrol.objects(step)) < 2:
            return None
        return question if answer_at(patrol, question, step) is not None else None
    objects = patrol.objects(step)
    if not objects:
        return None
    if kind == 'exist':
        return _ask_exist(objects, random)
    if kind in ('first', 'last'):
        shapes = [shape for shape in range(len(SHAPES)) if len({o.colour for o in objects if o.shape == shape}) > 1]
        if not shapes and not hard:
            shapes = sorted({o.shape for o in objects})
        return Question(kind, (_pick(shapes, random), -1)) if shapes else None
    if kind == 'count':
        counts = [sum(o.shape == shape for o in objects) for shape in range(len(SHAPES))]
        wanted = int(random.integers(LARGEST_COUNT + 1))  # else nearly every answer is 1 or 2
        shapes = ([s for s, n in enumerate(counts) if n == wanted]
                  or [s for s, n in enumerate(counts) if n <= LARGEST_COUNT])
        return Question(kind, (_pick(shapes, random), -1)) if shapes else None
    return _ask_about_one(kind, objects, patrol.steps[step].room, random, hard)


def pick_step(patrol: Patrol, kind: str, random: np.random.Generator, late: bool) -> int:
    """When to ask: at the end for `late`, else in the second half; `now` and `again` choose moments with something to see."""
    steps = patrol.steps
    if kind == 'now':
        shown = [i for i, s in enumerate(steps) if s.view != View.EMPTY]
        return _pick(shown, random) if shown and random.random() < .65 else int(random.integers(len(steps)))
    if kind == 'again':
        known, new, seen = [], [], set()
        for sight in patrol.objects(len(steps) - 1):
            (known if sight.thing in seen else new).extend(range(sight.first, sight.last + 1))
            seen.add(sight.thing)
        steps_of = (known if random.random() < .5 else new) or known or new
        return _pick(steps_of, random) if steps_of else len(steps) - 1
    return len(steps) - 1 if late else int(random.integers(len(steps) // 2, len(steps)))


def _ask_exist(objects: list[Sight], random: np.random.Generator) -> Question | None:
    seen = {o.thing for o in objects}
    if random.random() < .5:
        return Question('exist', objects[int(random.integers(len(objects)))].thing)
    unseen = [(s, c) for s in range(len(SHAPES)) for c in range(len(COLOURS)) if (s, c) not in seen]
    # A shape and a colour that were both seen, but never together.
    hard = [(s, c) for s, c in unseen if any(o.shape == s for o in objects) and any(o.colour == c for o in objects)]
    if hard and random.random() < _HARD_NEGATIVE:
        unseen = hard
    return Question('exist', _pick(unseen, random)) if unseen else None


def _ask_about_one(kind: str, objects: list[Sight], room: int, random: np.random.Generator,
                   hard: bool) -> Question | None:
    things = [o.thing for o in objects]
    once = [i for i, thing in enumerate(things) if things.count(thing) == 1]
    if kind == 'before':
        once = [i for i in once if i > 0]
    elif kind == 'after':
        once = [i for i in once if i + 1 < len(objects)]
    elif kind == 'where':
        elsewhere = [i for i in once if objects[i].room != room]
        if hard or (elsewhere and random.random() < _OTHER_ROOM):
            once = elsewhere
    return Question(kind, things[_pick(once, random)]) if once else None


def _pick(choices, random: np.random.Generator):
    return choices[int(random.integers(len(choices)))]
