"""`statekv-eval --formats`: a format is kept or refused by a checkpoint's own answers over footage of which nothing is known."""
import json

import pytest
import torch

from statekv_ros.evaluation import cli, gate
from statekv_ros.memory.detailed import formats
from statekv_ros.patrol.video import patrol_frames
from statekv_ros.patrol.world import make_patrol
from statekv_ros.replay.bag_writer import write_bag

POLICIES = ['statekv(72) x all', 'statekv(72) x sparse(72)']
QUESTIONS = ['what is in view?', 'what colour was the first ball?']


@pytest.fixture(scope='module')
def bag(tmp_path_factory):
    import numpy as np
    folder = tmp_path_factory.mktemp('bags') / 'patrol'
    write_bag(folder, patrol_frames(make_patrol(40, np.random.default_rng(1)), 1, 64, 64))
    return folder


def run(bag, out, *options, policies=POLICIES):
    return cli.main([str(bag), '--out', str(out), '--policies', *policies, '--max-tokens', '4', '--every', '5', '--questions',
                     *QUESTIONS, *options])


def test_formats_that_change_no_answer_are_kept_or_need_more_questions(bag, tmp_path, capsys):
    assert run(bag, tmp_path / 'out', '--formats') == 0
    found = json.loads((tmp_path / 'out' / 'formats.json').read_text())
    assert set(found) == {'int8', 'int4'}
    told = capsys.readouterr().out
    for form, row in found.items():
        assert row['questions'] >= 2 * len(POLICIES) * len(QUESTIONS) and row['tokens'] >= row['questions']
        assert row['verdict'] != gate.REFUSE and row['same'] > 0.95 and row['low'] <= row['same'] <= row['high']
        assert f'{form}: {row["verdict"]}' in told
    assert found['int8']['kl'] <= found['int4']['kl'] < gate.MOST_KL


def test_a_format_that_spoils_the_memory_is_refused(bag, tmp_path, monkeypatch, capsys):
    decode = formats.Packed._encode

    def spoilt(self, numbers):      # all tokens of a page become its first one
        return decode(self, numbers[..., :1, :].expand_as(numbers))

    monkeypatch.setattr(formats.Packed, '_encode', spoilt)
    assert run(bag, tmp_path / 'out', '--formats', 'int8', '--json') == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found['int8']['verdict'] == gate.REFUSE and found['int8']['kl'] > gate.MOST_KL


def test_a_format_is_led_along_the_exact_answer(patrol_stream, monkeypatch):
    policy = patrol_stream.answer_policy
    own = gate.Led(patrol_stream, policy, QUESTIONS[0], 4, None).finished()
    led = gate.Led(patrol_stream, policy, QUESTIONS[0], 4, own.token_ids).finished()
    assert led.token_ids == own.token_ids and len(led.log_probabilities) == len(own.token_ids)
    for one, other in zip(own.log_probabilities, led.log_probabilities):
        assert torch.equal(one, other)


@pytest.fixture
def patrol_stream():
    import numpy as np
    from statekv_ros.backbones import load_backbone
    from statekv_ros.memory import VideoStream
    stream = VideoStream(load_backbone('patrol', device='cpu'), 'statekv(72)')
    for time_ns, frame in patrol_frames(make_patrol(12, np.random.default_rng(1)), 1, 64, 64):
        stream.step(frame, time_ns + 10**9)
    return stream


@pytest.mark.parametrize('options, policies, words', [
    (['--formats', 'int3'], POLICIES, 'int3'), (['--formats', '--every', '0'], POLICIES, '--every'),
    (['--formats', '--max-tokens', '0'], POLICIES, '--max-tokens'), (['--formats'], ['rlivs'], 'rlivs'),
    (['--formats'], ['statekv(72)/int4 x all'], 'int4'), (['--formats'], ['statekv(0) x all'], 'statekv(0)')])
def test_bad_arguments_are_named(options, policies, words, bag, tmp_path, capsys):
    assert run(bag, tmp_path / 'out', *options, policies=policies) == 2
    assert words in capsys.readouterr().err
