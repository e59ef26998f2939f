"""What is known of steps that have left the device: rows of numbers that give back the objects that they were made of."""
from dataclasses import replace

import numpy as np
import pytest

from statekv_ros.memory.cut import Cut
from statekv_ros.memory.detailed.held import HeldSteps, Records
from statekv_ros.memory.detailed.pages import HeldStep, Stretch, by_stretch, page_lengths
from statekv_ros.memory.detailed.step_rows import StepRows
from statekv_ros.memory.pose import Place, Pose
from statekv_ros.memory.records import StepRecord

PAGE = 7
STRETCHES = Stretch(0, 0), Stretch(1000, 900), Stretch(2000, 2**40)


def pose_of(number: int) -> Pose | None:
    """Some have none, some a covariance, in two coordinate frames."""
    if number % 3 == 0:
        return None
    covariance = tuple(number + cell / 7 for cell in range(36)) if number % 5 == 0 else None
    return Pose(10**18 + number, f'{"map" if number % 2 else "odom"}', (number / 3, -0.0, float(number % 4)), (0.0, 0.6, 0.0, 0.8),
                covariance)


def step_of(number: int) -> HeldStep:
    tokens, turn = 5 + number % 9, -(number % 4)
    record = StepRecord(number, number // 40, 10**18 + 10 * number, 10**18 + 10 * number + 7, 1 + number % 2, 2**40 + 20 * number,
                        tokens, 2, tokens - 3, 30 * number, 30 * number + 11, pose_of(number))
    return HeldStep(record, -1, STRETCHES[min(2, number // 100)], 3 * number, page_lengths(tokens, PAGE), None, turn=turn)


@pytest.fixture
def rows() -> StepRows:
    rows = StepRows(PAGE)
    for number in range(300):
        rows.append(step_of(number))
    return rows


def test_a_step_comes_back_as_it_was_also_when_others_are_gone(rows):
    assert list(rows) == [step_of(number) for number in range(300)]
    assert rows[-1].stretch is STRETCHES[2], 'runs are found by the object'
    kept = list(range(300))
    for index in (0, 0, 5, 296, 0, 100):
        assert rows.pop(index) == step_of(kept.pop(index))
    for number in range(300, 600):
        rows.append(replace(step_of(number % 300), record=replace(step_of(number % 300).record, step=number)))
    assert [step.record.step for step in rows] == kept + list(range(300, 600))
    assert list(rows[:len(kept)]) == [step_of(number) for number in kept]
    assert [rows.find(number) for number in (2, 0, 3, 599, 600)] == [None, None, 0, len(rows) - 1, None]


def test_numbers_of_some_steps_are_those_of_the_steps(rows):
    rows.pop(0)
    names = 'page', 'step', 'turn', 'visual_tokens'
    indices = np.array([0, 7, 7, 298])
    assert rows.numbers(indices, names) == [rows.column(name)[indices].tolist() for name in names]
    assert rows.numbers(indices, names)[3] == [rows[index].record.visual_tokens for index in indices]


def test_what_an_answer_was_given_stays_whatever_comes_and_goes(rows):
    given, right = rows[:], list(rows)
    for number in range(300, 500):
        rows.append(replace(step_of(0), record=replace(step_of(0).record, step=number)))
        rows.pop(number % 2)
    assert list(given) == right and len(rows) == 300
    assert list(given[10:20]) == right[10:20] and not given[20:10]


def test_pose_that_is_told_late_is_the_steps(rows):
    for index, pose in ((0, pose_of(5)), (3, pose_of(7)), (299, pose_of(10))):
        rows.place(index, pose)
        assert rows[index] == replace(step_of(index), record=replace(step_of(index).record, pose=pose))
    assert [step.record.pose for step in rows[1:3]] == [pose_of(1), pose_of(2)]


@pytest.mark.parametrize('cut', [
    Cut(), Cut(10**18 + 107), Cut(10**18 + 108, 10**18 + 1000), Cut(None, 10**18 + 99), Cut(5, 6),
    Cut(place=Place('map', (40.0, 0.0, 1.0), 3.0)), Cut(10**18 + 1210, None, Place('odom', (40.0, 0.0, 2.0), 2.5)),
    Cut(place=Place('map', (1 / 3, 0.0, 1.0), 0.0)), Cut(place=Place('elsewhere', (0.0, 0.0, 0.0), 1e9))])
@pytest.mark.parametrize('far', [0, 250, 300])
def test_cut_takes_those_that_it_takes_one_by_one(rows, cut, far):
    steps = HeldSteps(rows[:far], [step_of(number) for number in range(far, 300)])
    right = [step for step in map(step_of, range(300)) if cut.takes(
        step.record.first_stamp_ns, step.record.last_stamp_ns, step.record.pose)]
    assert list(steps.within(cut)) == right
    assert steps.within(cut).column('page').tolist() == [step.page for step in right]


def test_steps_below_the_device_and_on_it_are_one_sequence(rows):
    right = [step_of(number) for number in range(300)]
    steps = HeldSteps(rows[:220], right[220:])
    assert list(steps) == right and (steps[219], steps[220], steps[-1]) == (right[219], right[220], right[299])
    for part in (slice(0, 300), slice(200, 240), slice(5, 9), slice(230, None), slice(-3, None), slice(4, 2)):
        assert list(steps[part]) == right[part]
    assert list(by_stretch(steps)) == [(0, 100), (100, 200), (200, 300)]
    assert list(steps.poses()) == [step.record.pose for step in right if step.record.pose is not None]
    records = Records(steps).and_one(step_of(300).record)
    assert list(records) == [*(step.record for step in right), step_of(300).record] and records[300] == step_of(300).record
    assert list(records[298:]) == [step_of(number).record for number in (298, 299, 300)]
    assert records.column('tokens').tolist() == [record.tokens for record in records]


def test_a_slice_that_leaves_steps_out_is_refused(rows):
    for steps in (rows, HeldSteps(rows), Records(HeldSteps(rows))):
        with pytest.raises(ValueError, match='stride'):
            steps[::2]
