"""Poses in plain numbers: what is taken, what lies between two, what a step keeps, and a question cut by place."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from statekv_ros.errors import Code, PoseError, QuestionError
from statekv_ros.memory import VideoStream
from statekv_ros.memory.late_poses import _MOST
from statekv_ros.memory.pose import Found, Place, Pose
from statekv_ros.node.poses.buffer import KEPT_NS, PoseBuffer, leap, make_pose
from statekv_ros.node.poses.source import PoseSource

MS, SECOND = 10**6, 10**9
QUESTION = 'where is the door?'
NO_TURN = (0.0, 0.0, 0.0, 1.0)
NAN = float('nan')


def turned(radians: float) -> tuple[float, float, float, float]:
    """About z."""
    return 0.0, 0.0, math.sin(radians / 2), math.cos(radians / 2)


def on_path(stamp_ns: int, frame: str = 'map') -> Pose:
    """A robot on a circle of 2 m, half a metre a second, looking along it."""
    angle = stamp_ns / SECOND / 4
    return make_pose(stamp_ns, frame, (2 * math.cos(angle), 2 * math.sin(angle), 0.1), turned(angle + math.pi / 2))


def filled(times_ns, tolerance_s: float = 0.5) -> PoseBuffer:
    buffer = PoseBuffer(tolerance_s)
    for time_ns in times_ns:
        buffer.add(on_path(time_ns))
    return buffer


def yaw(pose: Pose) -> float:
    return 2 * math.atan2(pose.orientation[2], pose.orientation[3])


@pytest.mark.parametrize('period_ms', [5, 20, 100])
def test_pose_between_two_is_where_the_robot_was(period_ms):
    buffer = filled(range(SECOND, 6 * SECOND, period_ms * MS))
    for stamp_ns in np.random.default_rng(0).integers(SECOND, 5 * SECOND + 900 * MS, 200).tolist():
        found, true = buffer.at(stamp_ns), on_path(stamp_ns)
        # A chord instead of an arc: at most (step / 2)^2 / 2r away from it.
        assert math.dist(found.position, true.position) <= (period_ms / 1000 / 4) ** 2 / 4 + 1e-9
        assert abs(math.remainder(yaw(found) - yaw(true), math.tau)) < 1e-3
        assert (found.stamp_ns, found.frame_id) == (stamp_ns, 'map') and math.hypot(*found.orientation) == pytest.approx(1)


def test_orientation_goes_the_shorter_way_whatever_sign_its_quaternion_has():
    before = Pose(SECOND, 'map', (0.0, 0.0, 0.0), turned(0.1))
    for sign in (1, -1):
        buffer = PoseBuffer(1.0)
        for pose in (before, Pose(SECOND + 100 * MS, 'map', (0.0, 0.0, 0.0), tuple(sign * q for q in turned(0.5)))):
            buffer.add(pose)
        assert abs(math.remainder(yaw(buffer.at(SECOND + 25 * MS)) - 0.2, math.tau)) < 1e-9


def test_stamp_outside_gets_the_nearest_pose_within_the_tolerance_and_else_none():
    buffer = filled(range(SECOND, 2 * SECOND + 1, 20 * MS), tolerance_s=0.1)
    assert buffer.at(2 * SECOND + 100 * MS) == replace(on_path(2 * SECOND), stamp_ns=2 * SECOND + 100 * MS)
    assert buffer.at(SECOND - 100 * MS).position == on_path(SECOND).position
    assert buffer.at(2 * SECOND + 101 * MS) is None and buffer.at(SECOND - 101 * MS) is None
    buffer.add(on_path(4 * SECOND))     # between two that are far apart, only near to one of them
    assert buffer.at(3 * SECOND) is None and buffer.at(2 * SECOND + 50 * MS) is not None
    assert PoseBuffer(9.0).at(SECOND) is None


def test_jump_is_counted_kept_as_it_is_and_never_interpolated():
    buffer = filled(range(SECOND, 2 * SECOND, 20 * MS))
    assert buffer.jumps == 0
    last = buffer.newest
    beyond = replace(last, stamp_ns=last.stamp_ns + 20 * MS, position=(9.0, 0.0, 0.0))
    buffer.add(beyond)
    assert buffer.jumps == 1 and ' m and ' in buffer.newest_jump
    assert buffer.at(last.stamp_ns + 9 * MS).position == last.position
    assert buffer.at(last.stamp_ns + 11 * MS).position == beyond.position
    buffer.add(replace(beyond, stamp_ns=beyond.stamp_ns + 20 * MS, frame_id='odom'))
    assert buffer.jumps == 2 and "'map' to frame 'odom'" in buffer.newest_jump
    turn = replace(last, orientation=turned(yaw(last) + 1.0), stamp_ns=last.stamp_ns + 20 * MS)
    assert '57 degrees' in leap(last, turn) and not leap(last, replace(turn, stamp_ns=last.stamp_ns + SECOND))


def test_buffer_is_bounded_in_time_and_begins_anew_where_the_clock_goes_back():
    buffer = filled(range(SECOND, 100 * SECOND, SECOND))
    assert len(buffer._poses) == KEPT_NS // SECOND + 1
    for stamp_ns in (99 * SECOND, 98 * SECOND + 500 * MS):
        with pytest.raises(PoseError, match='two nodes'):
            buffer.add(on_path(stamp_ns))
    assert buffer.at(99 * SECOND) == on_path(99 * SECOND)
    buffer.add(on_path(5 * SECOND))
    assert len(buffer._poses) == 1 and buffer.jumps == 0 and buffer.at(99 * SECOND) is None


@pytest.mark.parametrize('stamp_ns, frame, position, orientation, words', [
    (0, 'map', (0, 0, 0), NO_TURN, 'header stamp 0 ns'), (-1, 'map', (0, 0, 0), NO_TURN, 'header stamp -1 ns'),
    (1, '', (0, 0, 0), NO_TURN, 'empty header.frame_id'), (1, 'map', (0, NAN, 0), NO_TURN, 'not finite'),
    (1, 'map', (0, 0, math.inf), NO_TURN, 'not finite'), (1, 'map', (0, 0, 0), (0, 0, NAN, 1), 'not finite'),
    (1, 'map', (0, 0, 0), (0, 0, 0, 0), 'no orientation')])
def test_pose_that_is_none_is_refused_with_a_sentence(stamp_ns, frame, position, orientation, words):
    with pytest.raises(PoseError, match=words):
        make_pose(stamp_ns, frame, position, orientation)


def test_covariance_is_known_or_not():
    known = [0.1] * 36
    pose = make_pose(1, 'map', (0, 0, 0), (0, 0, 0, 2), known)
    assert pose.covariance == tuple(known) and pose.orientation == NO_TURN
    assert make_pose(2, 'map', (0, 0, 0), NO_TURN, list(known)).covariance is pose.covariance
    assert make_pose(1, 'map', (0, 0, 0), NO_TURN, [0.0] * 36).covariance is None
    assert make_pose(1, 'map', (0, 0, 0), NO_TURN, [NAN] * 36).covariance is None


@pytest.mark.parametrize('covariance', [None, (0.5,) * 36])
def test_pose_comes_back_from_json_equal(covariance):
    pose = replace(on_path(7 * SECOND), covariance=covariance)
    assert Pose.restored(json.loads(json.dumps(pose.saved()))) == pose and Pose.restored(None) is None


# --- in the memory ----------------------------------------------------------------------------------------------------

def on_line(stamp_ns: int, x: float | None = None) -> Pose:
    """A metre a second."""
    return Pose(stamp_ns, 'map', (stamp_ns / SECOND if x is None else x, 0.0, 0.0), NO_TURN)


def walked(backbone, frames, known=lambda stamp_ns: True, **options) -> VideoStream:
    """A stream of frames, one a second, of which some have a pose: on a line, a metre a second."""
    stream = VideoStream(backbone, 'statekv(96)', **options)
    stream.locate = lambda stamps, again: Found(next((on_line(s) for s in stamps if known(s)), None), True)
    for index, frame in enumerate(frames):
        stream.step(frame, (index + 1) * SECOND)
    return stream


def at(x: float, radius_m: float, frame: str = 'map') -> Place:
    return Place(frame, (x, 0.0, 0.0), radius_m)


def poses(answer) -> list[float]:
    return sorted(step.pose.position[0] for step in answer.evidence)


def test_each_step_keeps_the_pose_of_its_newest_frame_that_has_one(backbone, frames):
    stream = walked(backbone, frames[:7], known=lambda stamp_ns: stamp_ns not in (4 * SECOND, 5 * SECOND, 6 * SECOND))
    kept = [record.pose and record.pose.stamp_ns // SECOND for record in stream.detailed.records()]
    assert kept == [2, 3, None]     # 5 and 6 are unknown, 7 waits for its partner
    evidence = {step.first_stamp_ns // SECOND: step.pose for step in stream.answer(QUESTION, evidence=99).evidence}
    assert evidence[1].position == (2.0, 0.0, 0.0) and evidence[5] is None and evidence[7].position == (7.0, 0.0, 0.0)


def test_frame_step_is_the_same_with_and_without_poses(backbone, frames):
    with_poses, without = walked(backbone, frames[:8]), walked(backbone, frames[:8], known=lambda stamp_ns: False)
    ours, right = (stream.answer(QUESTION, max_tokens=5, evidence=99) for stream in (with_poses, without))
    assert ours.token_ids == right.token_ids and [step.share for step in ours.evidence] == [step.share for step in right.evidence]


@pytest.mark.parametrize('policy', ['all', 'sparse(48)', 'retrieve(2)', 'last(4)'])
@pytest.mark.parametrize('detailed_format', ['bf16', 'int8'])
def test_cut_by_place_is_the_cut_by_time_where_the_path_is_a_line(backbone, frames, policy, detailed_format):
    stream = walked(backbone, frames[:17], detailed_format=detailed_format)
    by_place = stream.answer(QUESTION, answer_policy=policy, place=at(8.0, 2.5), max_tokens=5, evidence=99)
    # Steps at 6, 8 and 10 m; the one at 10 has the stamps 9 and 10.
    by_time = stream.answer(QUESTION, answer_policy=policy, span=(5 * SECOND, 10 * SECOND), max_tokens=5, evidence=99)
    assert by_place == replace(by_time, prefill_ms=by_place.prefill_ms, decode_ms=by_place.decode_ms,
                               first_token_ms=by_place.first_token_ms)
    assert set(poses(by_place)) <= {6.0, 8.0, 10.0} and by_place.frames_covered == (4 if policy == 'last(4)' else 6)


@pytest.mark.parametrize('policy', ['all', 'sparse(48)', 'sparse(4096)', 'retrieve(2)', 'last(6)'])
def test_place_that_was_passed_twice_is_read_with_a_gap_and_nothing_between(backbone, frames, policy):
    there_and_back = {2: 1.0, 4: 2.0, 6: 3.0, 8: 9.0, 10: 9.0, 12: 9.0, 14: 9.0, 16: 3.0, 18: 2.0, 20: 1.0, 22: 0.0, 24: 0.0}
    stream = VideoStream(backbone, 'statekv(96)')
    stream.locate = lambda stamps, again: Found(on_line(stamps[0], there_and_back.get(stamps[0] // SECOND, 50.0)), True)
    for index, frame in enumerate(frames[:24]):
        stream.step(frame, (index + 1) * SECOND)
    answer = stream.answer(QUESTION, answer_policy=policy, place=at(2.0, 1.0), max_tokens=5, evidence=99)
    assert set(poses(answer)) <= {1.0, 2.0, 3.0}
    if policy in ('all', 'sparse(48)', 'sparse(4096)'):
        stamps = [step.last_stamp_ns // SECOND for step in answer.evidence]
        assert sorted(stamps) == [2, 4, 6, 16, 18, 20] and answer.frames_covered == 12
    assert answer.first_stamp_ns >= SECOND and answer.last_stamp_ns == 20 * SECOND


def test_place_and_time_are_cut_together_and_the_waiting_frame_counts(backbone, frames):
    stream = walked(backbone, frames[:7])
    assert stream.answer(QUESTION, place=at(7.0, 1.5), max_tokens=2).frames_covered == 3      # 6 m and the one that waits, at 7 m
    assert stream.answer(QUESTION, place=at(7.0, 0.5), max_tokens=2).frames_covered == 1
    cut = stream.answer(QUESTION, place=at(4.0, 2.5), span=(5 * SECOND, None), max_tokens=2)
    assert (cut.first_stamp_ns, cut.last_stamp_ns) == (5 * SECOND, 6 * SECOND)


@pytest.mark.parametrize('place, span, code, words', [
    (at(3.0, 1.0, 'odom'), (None, None), Code.UNKNOWN_FRAME, "no step has a pose in frame 'odom': there are poses in map"),
    (at(50.0, 2.0), (None, None), Code.NOTHING_SEEN, 'the nearest was seen 44.00 m away'),
    (at(2.0, 0.5), (5 * SECOND, None), Code.NOTHING_SEEN, 'but at other times')])
def test_place_without_a_frame_is_an_error_that_says_why(backbone, frames, place, span, code, words):
    stream = walked(backbone, frames[:6])
    with pytest.raises(QuestionError, match=words) as error:
        stream.answer(QUESTION, place=place, span=span)
    assert error.value.code == code


def test_place_in_a_memory_without_poses_is_an_error_that_names_the_parameters(backbone, frames):
    with pytest.raises(QuestionError, match='pose.topic') as error:
        walked(backbone, frames[:7], known=lambda stamp_ns: False).answer(QUESTION, place=at(3.0, 1.0))
    assert error.value.code == Code.UNKNOWN_FRAME


def test_state_cannot_be_cut_by_place(backbone, frames):
    with pytest.raises(QuestionError, match='place'):
        walked(backbone, frames[:4]).answer(QUESTION, answer_policy='state', place=at(2.0, 1.0))


# --- told after the step -----------------------------------------------------------------------------------------------

class Robot(PoseSource):
    """Tells its poses when a test wants it to; they are looked up as those of a topic are."""

    def __init__(self, tolerance_s: float = 0.5):
        super().__init__()
        self.buffer, self.asked = PoseBuffer(tolerance_s), 0

    def tell(self, *seconds: float) -> None:
        for second in seconds:
            self.buffer.add(on_line(round(second * SECOND)))

    def at(self, stamp_ns, camera_frame, again):
        self.asked += 1
        settled = self.buffer.has_passed(stamp_ns)
        return Found(self.buffer.at(stamp_ns), settled)

    def open(self): ...

    def close(self): ...

    def obstacle(self):
        return ''


def watched(backbone, frames, robot: Robot, **options) -> VideoStream:
    """A stream of frames, one a second."""
    stream = VideoStream(backbone, 'statekv(96)', **options)
    stream.locate = robot.locate(lambda: 'camera')
    for index, frame in enumerate(frames):
        stream.step(frame, (index + 1) * SECOND)
    return stream


def places(stream) -> list[float | None]:
    return [record.pose and record.pose.position[0] for record in stream.detailed.records()]


@pytest.mark.parametrize('options', [{}, {'detailed_format': 'int8'}, {'host_cache_bytes': 2**24, 'device_cache_bytes': 150_000}])
def test_step_takes_a_pose_that_is_told_later_wherever_it_lies_by_then(backbone, frames, options):
    robot = Robot()
    stream = watched(backbone, frames[:15], robot, **options)
    assert places(stream) == [None] * 7 and stream.late.unplaced == 7
    assert options.get('host_cache_bytes') is None or stream.detailed.steps_below
    robot.tell(*np.arange(1, 11.6, 0.5))
    assert set(poses(stream.answer(QUESTION, place=at(6.0, 2.5), evidence=99))) == {4.0, 6.0, 8.0}, 'a question looks by itself'
    assert places(stream) == [2.0, 4.0, 6.0, 8.0, 10.0, 11.5, None], 'the sixth has its last one but the nearest so far'
    robot.tell(11.9, 12.3, 14.1, 15.2)
    stream.locate_again()
    assert places(stream) == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0] and stream.late.unplaced == 0
    assert stream.pending.pose.position == (15.0, 0.0, 0.0), 'and the frame that waits'
    assert not stream.late.wants(stream.pending)


def test_settled_pose_is_not_asked_about_again_and_one_that_cannot_come_is_given_up(backbone, frames):
    robot = Robot()
    robot.tell(*range(1, 4), 9)     # a gap around 6, and all is told before the first frame
    stream = watched(backbone, frames[:8], robot)
    assert places(stream) == [2.0, 3.0, None, None] and not stream.late.wants(stream.pending)
    asked = robot.asked
    stream.locate_again()
    assert robot.asked == asked and stream.late.unplaced == 2


def test_silent_source_costs_one_look_a_time_and_steps_wait_for_it_in_bounded_number(backbone, frames, monkeypatch):
    monkeypatch.setattr('statekv_ros.memory.late_poses._MOST', 3)
    robot = Robot()
    stream = watched(backbone, frames[:10], robot)
    asked = robot.asked
    stream.locate_again()
    assert robot.asked == asked + 2, 'the stamps of its oldest step'
    robot.tell(*range(1, 12))
    stream.locate_again()
    assert places(stream) == [None, None, 6.0, 8.0, 10.0] and _MOST > 100


def test_steps_of_a_bags_first_run_take_no_pose_of_its_second(backbone, frames):
    robot = Robot()
    stream = watched(backbone, frames[:4], robot)
    for index, frame in enumerate(frames[4:8]):
        stream.step(frame, (index + 1) * SECOND)        # the bag begins again
    robot.tell(*range(1, 6))
    stream.locate_again()
    assert places(stream) == [None, None, 2.0, 4.0]
