"""statekv-eval --online: a bag through real DDS into a real node gives the answers of the offline run."""
import os
from dataclasses import replace

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

import rclpy

from live import new_domain
from statekv_ros.errors import EvaluationError
from statekv_ros.evaluation.footage import PatrolFootage
from statekv_ros.evaluation.online import online, require_bag
from statekv_ros.evaluation.plan import Job, Policy, Settings
from statekv_ros.evaluation.run import run_job
from statekv_ros.evaluation.schema import Question, Video
from statekv_ros.replay.bag_writer import BagOptions, write_bag
from statekv_ros.transport import use_shipped_profile

STEPS = 4


@pytest.fixture
def ros(monkeypatch):
    monkeypatch.setenv('ROS_DOMAIN_ID', str(new_domain()))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    use_shipped_profile()
    rclpy.init(args=[], domain_id=int(os.environ['ROS_DOMAIN_ID']))
    yield
    rclpy.try_shutdown()


def test_online_sees_and_says_what_offline_does(ros, backbone, tiny_model_dir, tmp_path):
    write_bag(tmp_path / 'bag', ((stamp_ns - BagOptions.start_ns, frame) for stamp_ns, frame in
                                 PatrolFootage(3, STEPS, 64, 64).frames()))
    asked = (Question('is the door open?', 'door', 'recall', ('yes',), STEPS - .25, (0, STEPS), ((1, 2),)),
             Question('and now?', 'door', 'recall', ('yes',), 1.5, (1, 1.6)))
    job = Job(('x',), (Video(str(tmp_path / 'bag'), asked),), Policy('statekv(24)', ('all', 'last(2)')))
    settings = Settings(tiny_model_dir, mode='online', rate=2.0, max_tokens=4)
    (live,), = online(settings, {'x': backbone.size(64, 64)}, tmp_path / 'logs', [job])
    offline = run_job(backbone, job, max_tokens=4)
    assert live['mode'] == 'online' and live.keys() >= offline.keys()
    assert (live['frames'] + live['dropped'] + live['lost'], live['rejected']) == (2 * STEPS, 0)
    assert [answer['result'] for answer in live['answers']] == ['succeeded'] * 4
    assert [answer['question'] for answer in live['answers']] == [0, 0, 1, 1]
    assert all(answer['asked_s'] >= answer['ask_at'] for answer in live['answers'])
    assert live['answers'][0].keys() >= offline['answers'][0].keys()
    if live['frames'] == 2 * STEPS:     # a busy machine may drop some: then they saw different videos
        same = ('step_tokens', 'step_flops', 'state_tokens', 'detailed_bytes', 'token_bytes')
        assert [live[name] for name in same] == [offline[name] for name in same]
        assert [(a['answer'], a['context_tokens'], a['evidence_hit']) for a in live['answers'][:2]] == [
            (a['answer'], a['context_tokens'], a['evidence_hit']) for a in offline['answers'][:2]]


def test_what_cannot_run_online_is_refused():
    video = Video('patrol:seed=1,steps=3', (), place='questions.yaml:3: videos[0].source')
    with pytest.raises(EvaluationError, match=r'questions.yaml:3: .*online plays bags only'):
        require_bag(Job(('x',), (video,), Policy('full', ('all',))))
    with pytest.raises(EvaluationError, match='does not run rlivs'):
        require_bag(Job(('x',), (video,), Policy('rlivs', ('captions',))))
    with pytest.raises(EvaluationError, match=r'the node does not watch by rekv\(60\), of which nothing could be kept on disk'):
        require_bag(Job(('x',), (video,), Policy('rekv(60)', ('all',))))
    video = replace(video, questions=(Question('a?', 'k', 'recall', ('b',), 1., (1., 1.), retrieve_by='b?'),))
    with pytest.raises(EvaluationError, match=r'questions.yaml:3: .*rekv\(k\) cannot retrieve by "retrieve_by" there'):
        require_bag(Job(('x',), (video,), Policy('full', ('all', 'rekv(2)'))))
