"""statekv-patrol: bags and questions that belong together, and whose answers are true."""
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from statekv_ros.evaluation.footage import PatrolFootage, check_video, open_footage
from statekv_ros.evaluation.schema import load_questions
from statekv_ros.patrol.cli import main
from statekv_ros.patrol.make import make_patrols
from statekv_ros.patrol.path import ODOMETRY_NS, ODOMETRY_PHASE_NS, STEP_M, pose_at
from statekv_ros.patrol.questions import KINDS, Question, answer_at
from statekv_ros.patrol.world import COLOURS, SHAPES, make_patrol
from statekv_ros.replay.bag_reader import bag_info, iterate_images, pose_topics, read_images

SECOND = 10**9
STEPS, SEED = 24, 7


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('patrols') / 'made'
    assert main(['make', str(out), '--videos', '2', '--steps', str(STEPS), '--seed', str(SEED), '--size', '48x32']) == 0
    return out


def test_bags_have_the_size_and_the_stamps_asked_for(folder):
    assert sorted(entry.name for entry in folder.iterdir()) == [f'patrol_{SEED}', f'patrol_{SEED + 1}', 'questions.yaml']
    images = list(read_images(folder / f'patrol_{SEED}'))
    assert [image.stamp_ns for image in images] == [SECOND + index * SECOND // 2 for index in range(2 * STEPS)]
    message = images[0].message()
    assert (message.width, message.height) == (48, 32)


def test_bags_tell_where_the_robot_was_on_the_known_path(folder):
    info = bag_info(folder / f'patrol_{SEED}')
    assert pose_topics(info) == {'/odom': 'nav_msgs/msg/Odometry'}
    told = [(message.stamp_ns, message.message()) for message in iterate_images(info, pose_topics(info))]
    assert [stamp_ns for stamp_ns, _ in told] == list(range(SECOND + ODOMETRY_PHASE_NS, told[-1][0] + 1, ODOMETRY_NS))
    assert told[-1][0] >= list(read_images(folder / f'patrol_{SEED}'))[-1].stamp_ns, 'a pose behind the last image'
    for stamp_ns, message in told[::20]:
        true, pose = pose_at(stamp_ns - SECOND), message.pose.pose
        assert message.header.frame_id == true.frame_id and tuple(message.pose.covariance) == true.covariance
        assert (pose.position.x, pose.position.y, pose.position.z) == true.position
        assert (pose.orientation.x, pose.orientation.y, pose.orientation.z, pose.orientation.w) == true.orientation


def test_path_goes_on_smoothly_and_no_place_is_passed_twice():
    places = [pose_at(index * ODOMETRY_NS).position for index in range(50 * 300)]
    apart = [math.dist(a, b) for a, b in zip(places, places[50:])]
    assert max(apart) <= STEP_M and min(apart) > STEP_M / 2
    assert all(a[0] < b[0] for a, b in zip(places, places[1:]))


def test_questions_fit_their_bags_and_their_answers_hold_through_the_window_and_no_longer(folder):
    videos = load_questions(folder / 'questions.yaml')
    named = {Question(kind, thing).text: Question(kind, thing) for kind in KINDS for thing in
             [(shape, colour) for shape in range(len(SHAPES)) for colour in range(-1, len(COLOURS))]}
    for number, video in enumerate(videos):
        extent, mistakes = check_video(video)
        assert not mistakes and extent.frames == 2 * STEPS and extent.duration_s == STEPS
        patrol = make_patrol(STEPS, np.random.default_rng(SEED + number))
        assert {'now', 'here'} <= {asked.kind for asked in video.questions} <= set(KINDS)
        for asked in video.questions:
            question, step = named[asked.text], int(asked.ask_at)
            first, end = map(int, asked.valid)
            answers = [answer_at(patrol, question, step) for step in range(first, end)]
            assert answers == [asked.accepted[0]] * (end - first) and first <= step < end
            assert first == 0 or answer_at(patrol, question, first - 1) != asked.accepted[0]
            assert end == STEPS or answer_at(patrol, question, end) != asked.accepted[0]
            assert asked.kind in ('now', 'again') or step == STEPS - 1
            assert 0 < asked.chance <= .5


def test_sources_made_on_the_fly_are_the_same_videos(folder, tmp_path):
    make_patrols(tmp_path / 'virtual', 2, STEPS, SEED, (48, 32), bags=False)
    assert [entry.name for entry in (tmp_path / 'virtual').iterdir()] == ['questions.yaml']
    bags, virtual = (load_questions(path / 'questions.yaml') for path in (folder, tmp_path / 'virtual'))
    for bag, video in zip(bags, virtual, strict=True):
        assert bag.questions == video.questions
        assert isinstance(open_footage(video), PatrolFootage)
        pairs = zip(open_footage(bag).frames(), open_footage(video).frames(), strict=True)
        assert all(a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in pairs)


@pytest.mark.parametrize('arguments, told', [
    (['--videos', '0'], 'videos must be at least 1, got 0'), (['--steps', '0'], 'steps must be at least 1, got 0'),
    (['--seed', '-1'], 'seed must be at least 0, got -1'), (['--size', '0x9'], 'got 0x9'),
    (['--size', '100000x100000'], 'got 100000x100000')])
def test_bad_numbers_make_nothing(tmp_path, capsys, arguments, told):
    assert main(['make', str(tmp_path / 'made'), *arguments]) == 2
    assert told in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_sigterm_half_way_leaves_nothing(tmp_path):
    maker = subprocess.Popen([sys.executable, '-m', 'statekv_ros.patrol.cli', 'make', str(tmp_path / 'made'), '--videos', '99'],
                             stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob('.made.partial-*/made/patrol_0')):
            assert maker.poll() is None and time.monotonic() < deadline, 'writing did not begin'
            time.sleep(0.01)
        maker.send_signal(signal.SIGTERM)
        _, error = maker.communicate(timeout=60)
    finally:
        maker.kill()
    assert maker.returncode == 130 and error.splitlines()[-1] == 'statekv-patrol make: interrupted'
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(folder, capsys):
    before = (folder / 'questions.yaml').read_bytes()
    assert main(['make', str(folder)]) == 2
    assert 'exists: choose another folder' in capsys.readouterr().err
    assert (folder / 'questions.yaml').read_bytes() == before
