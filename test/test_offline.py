"""Options of runs over videos of known length: layout, the length that RoPE is scaled for, positions, size of frames."""
import json
from pathlib import Path

import pytest

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import EvaluationError, ModelError, ParameterError
from statekv_ros.evaluation.cli import main
from statekv_ros.evaluation.footage import open_footage
from statekv_ros.evaluation.offline import Offline
from statekv_ros.evaluation.plan import Settings, describe, make_jobs, parse_policies
from statekv_ros.evaluation.pool import Worker
from statekv_ros.evaluation.schema import Video, load_questions
from statekv_ros.memory import VideoStream

STEPS, FRAME = 8, 19        # seconds of a patrol at 2 frames/s; tokens of a frame
QUESTION = """\
      - text: {text}
        kind: door
        group: recall
        accepted: [yes]
        ask_at: {at}
        valid: [0.0, 8.0]
"""
ASKED = [('is the door open?', 7.75), ('where did you last see the red toolbox?', 3.75)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> str:
    """A checkpoint that was trained for fewer positions than a patrol of 8 s takes."""
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp('offline') / 'internvl', family='internvl', max_position=200))


def questions_file(folder: Path, steps: tuple[int, ...] = (STEPS,)) -> Path:
    file = folder / 'questions.yaml'
    file.write_text('version: 1\nvideos:\n' + ''.join(
        f'  - source: patrol:seed={seed},steps={count},size=64x64\n    questions:\n'
        + ''.join(QUESTION.format(text=text, at=at) for text, at in ASKED) for seed, count in enumerate(steps)))
    return file


def command(file: Path, model: str, run: Path, *more: str) -> list[str]:
    return [str(file), '--model', model, '--out', str(run), '--max-tokens', '4', '--dtype', 'float32', *more]


def answers_in(run: Path) -> dict[str, list[str]]:
    """By prefill policy, of all videos."""
    told: dict[str, list[str]] = {}
    for file in sorted((run / 'jobs').glob('*.json')):
        result = json.loads(file.read_text())
        told.setdefault(result['prefill_policy'], []).extend(answer['answer'] for answer in result['answers'])
    return told


@pytest.mark.parametrize('frames', [1, 6, 16])
def test_auto_is_video_prompt_answer_and_128_more(frames, folder):
    watching = Offline('released')
    backbone = watching.load(folder, device='cpu')
    questions = [text for text, _ in ASKED]
    fitted = watching.fitted(backbone, [index / 2 for index in range(frames)], 64, 64, questions, 10)
    asked = max(len(backbone.tokenize_question(question)) for question in questions)
    assert fitted.max_position == max(200, frames * FRAME + asked + 10 + 128) and backbone.max_position == 200
    assert watching.position_policy() == 'native' and watching.position_policy('contiguous') == 'contiguous'


@pytest.mark.parametrize('family', ['qwen3_vl', 'qwen2_5_vl', 'internvl', 'llava_onevision', 'eagle2_5'])
@pytest.mark.parametrize('count', [1, 7, 12])
def test_positions_of_a_video_are_those_that_a_stream_takes(family, count, tmp_path, frames):
    backbone = load_backbone(str(write_tiny_checkpoint(tmp_path / family, family=family)), device='cpu')
    stream, seconds = VideoStream(backbone, 'none'), [index * 3.7 for index in range(count)]
    for frame, second in zip(frames, seconds):
        stream.step(frame, SECOND + round(second * SECOND))
    stream.flush()
    assert backbone.video_positions(seconds, 64, 64) == stream.next_position


def test_an_extent_knows_when_its_frames_are():
    video = Video('patrol:seed=1,steps=3,size=64x64', (), rate_hz=1.0)
    footage = open_footage(video)
    stamps = [stamp_ns for stamp_ns, _ in footage.frames()]
    assert footage.extent().seconds == tuple((stamp - stamps[0]) / SECOND for stamp in stamps) == (0.0, 1.0, 2.0)


def test_a_run_in_the_released_layout_answers_as_a_stream_set_up_by_hand(tmp_path, folder):
    """Past the trained context: all policies have one RoPE, and with nothing evicted StateKV is full attention."""
    file, run = questions_file(tmp_path), tmp_path / 'run'
    policies = ['full', 'statekv(unlimited)', 'statekv(20)', 'statekv(20)/contiguous']
    assert main(command(file, folder, run, '--layout', 'released', '--policies', *policies)) == 0
    told = answers_in(run)
    assert told['full'] == told['statekv(unlimited)'] != told['statekv(20)']
    released = load_backbone(folder, device='cpu', dtype='float32', layout='released')
    asked = max(len(released.tokenize_question(text)) for text, _ in ASKED)
    scaled = released.for_length(2 * STEPS * FRAME + asked + 4 + 128)
    [video] = load_questions(file)
    for policy, positions in (('full', 'native'), ('statekv(20)', 'native'), ('statekv(20)', 'contiguous')):
        stream, expected = VideoStream(scaled, policy, positions=positions), []
        waiting = sorted(ASKED, key=lambda question: question[1])
        for stamp_ns, frame in open_footage(video).frames():
            while waiting and stamp_ns - SECOND > waiting[0][1] * SECOND:
                expected.append(stream.answer(waiting.pop(0)[0], max_tokens=4).text)
            stream.step(frame, stamp_ns)
        expected += [stream.answer(text, max_tokens=4).text for text, _ in waiting]
        assert told[policy + '/contiguous' * (positions == 'contiguous')] == expected[::-1]
    plan = json.loads((run / 'run.json').read_text())
    assert plan['layout'] == 'released' and plan['rope_length'] == plan['positions'] == ''


def test_lockstep_answers_the_same_where_lengths_agree_and_says_so_where_not(tmp_path, folder):
    file = questions_file(tmp_path, (STEPS, STEPS))
    policies = parse_policies(['full', 'statekv(20)'])
    worker = Worker(Settings(folder, dtype='float32', max_tokens=4, watching=Offline('released')))
    alone, together = ([[answer['answer'] for answer in result['answers']] for job in make_jobs(load_questions(file), policies, n)
                        for result in worker.run(job)] for n in (1, 2))
    assert sorted(alone) == sorted(together)
    file.write_text(file.read_text().replace(ASKED[1][0], 'where?', 1))
    [job] = make_jobs(load_questions(file), policies[:1], 2)
    with pytest.raises(EvaluationError, match='leave --lockstep out, or set --rope-length to'):
        worker.run(job)


def test_a_number_scales_every_video_alike(tmp_path, folder):
    watching = Offline(rope_length='900')
    assert watching.load(folder, device='cpu').max_position == 900 and watching.position_policy() == 'native'
    assert Offline().position_policy() == '' and Offline(rope_length='0').position_policy() == ''
    assert Offline('released', '0').load(folder, device='cpu').max_position == 200
    assert Offline(max_frame_pixels=64 * 64).load('patrol').frame_size(480, 640) == (32, 64)


@pytest.mark.parametrize('more, told', [
    (['--layout', 'paper'], "layout must be one of model, released, got 'paper'"),
    (['--rope-length', 'long'], "rope_length must be a number of positions, 0 for as trained, or auto for the length of each video, "
                                "got 'long'"),
    (['--rope-length', '-5'], "got '-5'"),
    (['--rope-length', '1e5'], "got '1e5'"),
    (['--rope-length', '100'], 'at least the trained context of 200 positions'),
    (['--rope-length', '300'], 'questions.yaml:3: videos[0].source: rope_length must be at least the'),
    (['--positions', 'magic'], "positions must be one of native, contiguous, lazy_shift, got 'magic'"),
    (['--max-frame-pixels', '-1'], 'max_frame_pixels must be a number of pixels'),
    (['--online', '--layout', 'released'], '--layout released and --rope-length auto are for offline runs'),
    (['--online', '--rope-length', 'auto'], 'a live node does not know how long'),
    (['--stats', '--layout', 'released'], "--layout is for questions files, got 'released'"),
    (['--formats', '--max-frame-pixels', '9999'], '--max-frame-pixels is for questions files, got 9999'),
])
def test_bad_values_are_named_before_anything_is_written(more, told, tmp_path, folder, capsys):
    assert main(command(questions_file(tmp_path), folder, tmp_path / 'run', *more)) == 2
    assert told in capsys.readouterr().err and not (tmp_path / 'run').exists()


def test_a_number_may_be_less_than_the_video_where_positions_have_a_bound(tmp_path, folder):
    policies = ['statekv(20)/lazy_shift', 'rlivs']
    worker = Worker(Settings(folder, dtype='float32', watching=Offline(rope_length='300')))
    for job in make_jobs(load_questions(questions_file(tmp_path)), parse_policies(policies)):
        assert worker.fitted(job.policy, job.videos[0]).max_position == 300
    with pytest.raises(EvaluationError, match='raise it, or set it to auto'):
        worker.fitted(parse_policies(['full'])[0], job.videos[0])


def test_a_model_that_cannot_is_named(tiny_model_dir):
    with pytest.raises(ModelError, match="RoPE of type 'default': leave rope_length at 0"):
        Offline(rope_length='auto').load(tiny_model_dir, device='cpu')
    with pytest.raises(ParameterError, match='internvl alone'):
        Offline('released').load(tiny_model_dir, device='cpu')


def test_another_layout_is_another_run(folder):
    plans = [describe(Settings(folder, watching=watching), [], [], [])['digest'] for watching in (
        Offline(), Offline('released'), Offline(rope_length='auto'), Offline(positions='native'), Offline(max_frame_pixels=9))]
    assert len(set(plans)) == len(plans)
