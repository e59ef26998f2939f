"""Patrols as bags, with the robot's odometry and a questions file whose right answers are known."""
from pathlib import Path

import numpy as np
import yaml
from tqdm import tqdm

from statekv_ros.errors import BagError
from statekv_ros.patrol.heldout import ask_all
from statekv_ros.patrol.path import odometry
from statekv_ros.patrol.questions import (FORMED, LARGEST_COUNT, PERCEPTION, Question, answer_at, evidence_steps,
                                          holds_during, newest_fact_step)
from statekv_ros.patrol.shift import LEAST_STEPS, ask_shift
from statekv_ros.patrol.video import FRAME_NS, patrol_frames
from statekv_ros.patrol.world import COLOURS, SHAPES, Patrol
from statekv_ros.replay.bag_writer import write_bag
from statekv_ros.replay.new_folder import new_folder
from statekv_ros.replay.sources import check_size

# Asked when both frames of a step were shown and the next step's were not: frames stand at 0.0 and 0.5 s of a step.
_ASKED_AFTER_S = .75
_THINGS = len(SHAPES) * len(COLOURS)
# How many different answers each kind can have, but for `when`, which has one for each second.
_POSSIBLE = {'now': 1 + _THINGS + len(COLOURS), 'exist': 2, 'again': 2, 'count': LARGEST_COUNT + 1, 'before': _THINGS,
             'after': _THINGS, **dict.fromkeys(('first', 'last', 'where', 'here'), len(COLOURS))}


def make_patrols(folder: Path, videos: int, steps: int, seed: int, size: tuple[int, int], bags: bool = True,
                 shift: bool = False) -> None:
    """Write a folder with a bag patrol_<seed> for each video, and questions.yaml: all of it, or nothing. A bag tells where the
    robot was, too, as odometry at 50 Hz (see the module `path`).

    Args:
        steps: of each video, one second each.
        seed: of the first video; each further one counts on.
        size: (width, height) in pixels.
        bags: without them the sources are `patrol:seed=...`, the same frames made on the fly.
        shift: shifts instead (see the module `shift`): bags shift_<seed>, or sources `shift:seed=...`.

    Raises:
        BagError: a number that is not positive, or something that is there already or cannot be written.
    """
    for name, value, least in (('videos', videos, 1), ('steps', steps, LEAST_STEPS if shift else 1), ('seed', seed, 0)):
        if value < least:
            raise BagError(f'{name} must be at least {least}, got {value}')
    check_size(*size)
    if folder.exists():
        raise BagError(f'{folder} exists: choose another folder')
    kind, make, entries = ('shift', ask_shift, []) if shift else ('patrol', ask_all, [])
    with new_folder(folder, overwrite=False) as made:
        made.mkdir()
        for number in tqdm(range(seed, seed + videos), unit='video', disable=None):
            # The frames and questions of a video depend on its own number alone.
            patrol, asked = make(steps, np.random.default_rng(number))
            source = f'{kind}:seed={number},steps={steps},size={size[0]}x{size[1]}'
            if bags:
                source = f'{kind}_{number}'
                write_bag(made / source, patrol_frames(patrol, number, *size), poses=odometry(steps * 10**9 - FRAME_NS))
            entries.append({'source': source, 'questions': [_entry(patrol, *pair) for pair in asked if pair is not None]})
        try:
            (made / 'questions.yaml').write_text(yaml.safe_dump(
                {'version': 1, 'videos': entries}, sort_keys=False, default_flow_style=None, width=120))
        except OSError as error:
            raise BagError(f'{folder} cannot be written: {error}') from error


def _entry(patrol: Patrol, question: Question, step: int) -> dict:
    """A question asked right after a step, as in docs/questions.md."""
    first, last = holds_during(patrol, question, step)
    held, newest = evidence_steps(patrol, question, step), newest_fact_step(patrol, question, step)
    group = 'perception' if question.kind in PERCEPTION else 'formed' if question.kind in FORMED else 'recall'
    return {'text': question.text, 'kind': question.kind, 'group': group,
            'accepted': [answer_at(patrol, question, step)], 'ask_at': step + _ASKED_AFTER_S,
            'valid': [float(first), float(last + 1)],
            **({'evidence': [[float(held[0]), float(held[-1] + 1)]]} if held else {}),
            **({} if newest is None else {'age': max(0., step + _ASKED_AFTER_S - (newest + 1))}),
            'chance': round(1 / (step + 1 if question.kind == 'when' else _POSSIBLE[question.kind]), 6)}
