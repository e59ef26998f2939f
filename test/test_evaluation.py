"""statekv-eval: mistakes are named before any work, results are exact and repeatable, and a killed run goes on where it was."""
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rosbags.rosbag2 import StoragePlugin, Writer
from torch.utils.flop_counter import FlopCounterMode

from conftest import SECOND
from statekv_ros.errors import BagError, EvaluationError, PolicyError
from statekv_ros.evaluation.cli import main
from statekv_ros.evaluation.flops import step_flops
from statekv_ros.evaluation.footage import Footage, PatrolFootage, open_path
from statekv_ros.evaluation.judge import evidence_hit, fact_age_s, is_right
from statekv_ros.evaluation.plan import Job, Policy, Settings, describe, make_jobs, parse_policies
from statekv_ros.evaluation.pool import Worker, in_process, on_ray, run_all
from statekv_ros.evaluation.run import run_job
from statekv_ros.evaluation.schema import Question, Video, load_questions
from statekv_ros.evaluation.store import RunFolder
from statekv_ros.memory import VideoStream
from statekv_ros.patrol.make import make_patrols
from statekv_ros.replay.bag_writer import write_bag

STEPS = 6
QUESTION = """\
      - text: is the door open?
        kind: door
        group: recall
        accepted: [yes, 'it is']
        ask_at: 3.75
        valid: [2.0, 4.5]
        evidence: [[1.0, 2.0]]
        chance: 0.5
"""
POLICIES = ['full', 'statekv(24) x all', 'statekv(24) x last(4)', 'none x state']


@pytest.fixture(scope='module')
def bag(tmp_path_factory) -> Path:
    """A patrol of six seconds, 12 frames of 64x64."""
    out = tmp_path_factory.mktemp('bags') / 'patrol'
    write_bag(out, ((stamp_ns - SECOND, frame) for stamp_ns, frame in PatrolFootage(3, STEPS, 64, 64).frames()))
    return out


def questions_file(folder: Path, sources: list[str], questions: str = QUESTION) -> Path:
    file = folder / 'questions.yaml'
    file.write_text('version: 1\nvideos:\n' + ''.join(f'  - source: {source}\n    questions:\n{questions}'
                                                      for source in sources))
    return file


def patrols(videos: int) -> list[str]:
    return [f'patrol:seed={seed},steps={STEPS},size=64x64' for seed in range(videos)]


def but_for_times(value):
    """Without the fields whose names end in _ms."""
    if isinstance(value, dict):
        return {name: but_for_times(part) for name, part in value.items() if not name.endswith('_ms')}
    return [but_for_times(part) for part in value] if isinstance(value, list) else value


def results_in(run: Path) -> dict[str, dict]:
    return {file.stem: but_for_times(json.loads(file.read_text())) for file in sorted((run / 'jobs').glob('*.json'))}


def command(file: Path, model: str, run: Path, *more: str) -> list[str]:
    return [str(file), '--model', model, '--out', str(run), '--max-tokens', '4', '--policies', *POLICIES, *more]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('old, new, line, told', [
    ('kind: door', 'kinds: door', 6, 'videos[0].questions[0].kinds: unknown field'),
    ('kind: door', 'text: again', 6, 'videos[0].questions[0].text: stands here twice'),
    ('        kind: door\n', '', 5, "lacks the field 'kind'"),
    ('group: recall', 'group: memory', 7, "group: must be one of perception, recall, formed, got 'memory'"),
    ("[yes, 'it is']", '[]', 8, 'accepted: must be a list with at least one item'),
    ("[yes, 'it is']", 'yes', 8, 'accepted: must be a list'),
    ('ask_at: 3.75', 'ask_at: soon', 9, "ask_at: must be a number, got 'soon'"),
    ('ask_at: 3.75', 'ask_at: 1:30', 9, "ask_at: must be a number, got '1:30'"),
    ('ask_at: 3.75', 'ask_at: .nan', 9, "ask_at: must be a number, got '.nan'"),
    ('ask_at: 3.75', 'ask_at: 4.75', 9, 'ask_at: must lie inside valid, [2.0, 4.5], got 4.75'),
    ('[2.0, 4.5]', '[4.5, 2.0]', 10, 'valid: must be [begin, end]'),
    ('[2.0, 4.5]', '[2.0, x]', 10, "valid[1]: must be a number, got 'x'"),
    ('[[1.0, 2.0]]', '[[1.0, 1.0]]', 11, 'evidence[0]: must be [begin, end) with begin < end'),
    ('[[1.0, 2.0]]', '[1.0, 2.0]', 11, 'evidence[0]: must be a list'),
    ('chance: 0.5', 'chance: 50', 12, 'chance: must be a share from 0 to 1, got 50'),
    ('chance: 0.5', 'chance: 0.5\n    rate_hz: 0', 13, 'videos[0].rate_hz: must be a positive number'),
    ('chance: 0.5', 'retrieve_by: " "', 12, "retrieve_by: must be text, got ' '"),
    ('version: 1', 'version: 2', 1, 'version: must be 1, got 2'),
    ('version: 1', 'version: {1', 2, 'is not YAML'),
])
def test_a_mistake_in_a_questions_file_is_told_with_line_and_field(tmp_path, old, new, line, told):
    file = questions_file(tmp_path, ['bag'])
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(EvaluationError) as error:
        load_questions(file)
    assert any(row.startswith(f'{file}:{line}: ') and told in row for row in str(error.value).splitlines()), error.value


def test_all_mistakes_of_a_questions_file_are_told_at_once(tmp_path):
    file = questions_file(tmp_path, ['bag', 'bag'])
    file.write_text(file.read_text().replace('group: recall', 'group: memory').replace('chance: 0.5', 'chance: 2'))
    with pytest.raises(EvaluationError) as error:
        load_questions(file)
    assert [int(row.split(':')[1]) for row in str(error.value).splitlines()] == [7, 12, 17, 22]


@pytest.mark.parametrize('text', ['', '\n', '- 1\n', 'version: 1\n', '\x00', 'version: 1\nvideos: []\n'])
def test_what_is_no_questions_file_is_an_error(tmp_path, text):
    file = tmp_path / 'questions.yaml'
    file.write_text(text)
    with pytest.raises(EvaluationError, match=str(file)):
        load_questions(file)


def empty_bag(folder: Path) -> Path:
    with Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP):
        pass
    return folder


@pytest.mark.parametrize('broken, told', [
    ('window', 'questions.yaml:10: videos[0].questions[0].valid: [2.0, 40.0] ends after the source, which lasts 6 s'),
    ('evidence', 'questions.yaml:11: videos[0].questions[0].evidence: [1.0, 20.0] ends after the source'),
    ('policy', "policy must be statekv(4096), window(16), rekv(15000), full or none, got 'fifo(3)'"),
    ('answer policy', "got 'first(3)'"),
    ('against', "--against 'window(2)' is not among --policies, which are full x all"),
    ('ages', '--ages must be at least two seconds that grow'),
    ('model', 'nowhere'),
    ('empty bag', 'questions.yaml:3: videos[0].source: bag'),
    ('no bag', 'questions.yaml:3: videos[0].source: source'),
    ('patrol', 'questions.yaml:3: videos[0].source: must look like patrol:seed=5,steps=64'),
    ('topic', 'has no images on /rear'),
    ('folder', 'is not a run of statekv-eval'),
])
def test_nothing_is_written_before_everything_is_checked(tmp_path, bag, tiny_model_dir, capsys, broken, told):
    source = {'empty bag': 'empty', 'no bag': 'missing', 'patrol': 'patrol:steps=5'}.get(broken, str(bag))
    if broken == 'empty bag':
        empty_bag(tmp_path / 'empty')
    file, run = questions_file(tmp_path, [source]), tmp_path / 'run'
    changes = {'window': ('4.5]', '40.0]'), 'evidence': ('[[1.0, 2.0]]', '[[1.0, 20.0]]'),
               'topic': ('questions:', 'topic: /rear\n    questions:')}
    file.write_text(file.read_text().replace(*changes.get(broken, ('', ''))))
    policies = {'policy': 'fifo(3)', 'answer policy': 'full x first(3)'}.get(broken, 'full')
    if broken == 'folder':
        run.mkdir()
        (run / 'thesis.tex').write_text('')
    model = './nowhere' if broken == 'model' else tiny_model_dir
    more = {'against': ['--against', 'window(2)'], 'ages': ['--ages', '5', '4']}.get(broken, [])
    assert main([str(file), '--model', model, '--out', str(run), '--policies', policies, *more]) == 2
    assert told in capsys.readouterr().err
    assert not run.exists() or [entry.name for entry in run.iterdir()] == ['thesis.tex']


def test_header_stamps_that_go_back_and_sources_that_are_not_there_are_refused(tmp_path):
    class Stamps(Footage):
        def _images(self):
            for stamp_ns in (0, SECOND, 2 * SECOND, 2 * SECOND, SECOND):
                yield stamp_ns, lambda: np.zeros((4, 4, 3), np.uint8)

    with pytest.raises(EvaluationError, match='header stamps go back after 1 s'):
        Stamps(None).extent()
    with pytest.raises(EvaluationError, match='is not a bag, so it has no topic'):
        open_path(tmp_path, topic='/camera')
    with pytest.raises(BagError, match='does not exist'):
        open_path(tmp_path / 'missing')


def test_policies():
    assert parse_policies(['full', 'statekv( 64 ) x last(4)', 'statekv(64)']) == [
        Policy('full', ('all',)), Policy('statekv(64)', ('last(4)', 'all'))]
    assert parse_policies(['rlivs( norecurrence )', 'rlivs', 'none x retrieve(2)']) == [
        Policy('rlivs(norecurrence)', ('captions',)), Policy('rlivs', ('captions',)), Policy('none', ('retrieve(2)',))]
    [policy] = parse_policies(['statekv(64)/native/int4 x all', 'statekv(64) / int4/native x last(4)'])
    assert policy == Policy('statekv(64)/int4/native', ('all', 'last(4)')) and policy.watching == 'statekv(64)'
    assert policy.options == {'detailed_format': 'int4', 'positions': 'native'} and Policy('full', ('all',)).options == {}
    for wrong in (['full/int3'], ['full/'], ['full/int4/int8'], ['full/int4', 'full/int4 x all'], ['rlivs/int4'],
                  ['full x all/int4'], ['full', 'full x all'], [], ['full x'], ['statekv'], ['full x all x all'], ['rlivs x all'], ['rlivs(2)']):
        with pytest.raises(PolicyError):
            parse_policies(wrong)


def test_another_plan_does_not_go_into_the_same_folder(tmp_path, tiny_model_dir):
    videos, policies = [Video('patrol:seed=1,steps=3', ())], [Policy('full', ('all',))]
    settings = Settings(tiny_model_dir)
    plan = describe(settings, videos, policies, [6])
    assert plan['digest'] == describe(Settings(tiny_model_dir, threads=2), videos, policies, [6])['digest']
    RunFolder(tmp_path / 'run', plan)
    RunFolder(tmp_path / 'run', plan)
    copy = shutil.copytree(tiny_model_dir, tmp_path / 'model')
    assert describe(Settings(str(copy)), videos, policies, [6])['digest'] == plan['digest']
    with (copy / 'config.json').open('a') as config:
        config.write(' ')
    for other, name in ((describe(Settings(str(copy)), videos, policies, [6]), 'model_digest'),
                        (describe(Settings(tiny_model_dir, max_tokens=3), videos, policies, [6]), 'max_tokens'),
                        (describe(settings, [Video('patrol:seed=2,steps=3', ())], policies, [6]), 'videos'),
                        (describe(settings, videos, policies, [5]), 'videos'),
                        (describe(settings, videos, [Policy('full', ('last(1)',))], [6]), 'policies')):
        with pytest.raises(EvaluationError, match=f'holds another run, which differs in .*{name}'):
            RunFolder(tmp_path / 'run', other)


# --- results ----------------------------------------------------------------------------------------------------------


def test_a_question_is_asked_after_the_last_frame_that_is_not_later(backbone, bag):
    """Against a stream fed by hand: same answers, same evidence, same context."""
    asked = [Question('is the door open?', 'door', 'recall', ('yes',), at, (0, 6)) for at in (0.0, 2.5, 2.75, 6.0)]
    video = Video(str(bag), tuple(asked))
    result = run_job(backbone, Job(('x',), (video,), Policy('statekv(24)', ('all', 'last(4)'))), max_tokens=4)
    assert (result['frames'], result['steps'], len(result['step_flops'])) == (2 * STEPS, STEPS, STEPS)
    frames = list(open_path(bag).frames())
    expected = []
    for question, shown in zip(asked, (1, 6, 6, 12)):
        stream = VideoStream(backbone, 'statekv(24)')
        for stamp_ns, frame in frames[:shown]:
            stream.step(frame, stamp_ns)
        for policy in ('all', 'last(4)'):
            answer = stream.answer(question.text, answer_policy=policy, max_tokens=4)
            expected.append((policy, answer.text, answer.context_tokens, answer.evidence[0].first_stamp_ns - SECOND))
    assert expected == [(answer['answer_policy'], answer['answer'], answer['context_tokens'],
                         round(answer['evidence'][0][0] * SECOND)) for answer in result['answers']]


def test_rekv_retrieves_by_the_bare_question_of_the_file(backbone, bag, tmp_path):
    text = 'is the door open?\n(A) yes\n(B) no'
    block = QUESTION.replace('text: is the door open?', f'text: "{text}"'.replace('\n', '\\n'))
    file = questions_file(tmp_path, [str(bag)], block + block + "        retrieve_by: is the door open?\n")
    [video] = load_questions(file)
    assert [question.retrieve_by for question in video.questions] == ['', 'is the door open?']
    assert ['retrieve_by' in question for question in video.as_dict()['questions']] == [False, True]
    result = run_job(backbone, Job(('x',), (video,), Policy('rekv(30)', ('rekv(1)',))), max_tokens=4)
    stream = VideoStream(backbone, 'rekv(30)')
    for stamp_ns, frame in list(open_path(bag).frames())[:8]:
        stream.step(frame, stamp_ns)
    expected = [stream.answer(text, answer_policy='rekv(1)', retrieve_by=by, max_tokens=4)
                for by in (text, 'is the door open?')]
    told = [(answer['answer'], answer['context_tokens'], [share for *_, share in answer['evidence']])
            for answer in result['answers']]
    assert told == [(answer.text, answer.context_tokens, [round(step.share, 6) for step in answer.evidence])
                    for answer in expected]


def test_rlivs_is_a_job_like_any_other(backbone, bag):
    video = Video(str(bag), (Question('is the door open?', 'door', 'recall', ('yes',), 3.75, (0, 6), ((0, 6),)),))
    job = Job(('x',), (video,), Policy('rlivs', ('captions',)))
    first = run_job(backbone, job, max_tokens=4)
    assert but_for_times(first) == but_for_times(run_job(backbone, job, max_tokens=4))
    assert (first['frames'], first['steps'], first['step_flops']) == (2 * STEPS, 1, []), 'one clip; captions are not counted'
    assert first['answers'][0]['answer_policy'] == 'captions' and first['answers'][0]['evidence_hit'] is True


def test_a_bag_a_patrol_and_a_lower_rate(bag):
    made, read = list(PatrolFootage(3, STEPS, 64, 64).frames()), list(open_path(bag).frames())
    assert [stamp for stamp, _ in made] == [stamp for stamp, _ in read]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(made, read))
    slower = open_path(bag, rate_hz=1.0)
    assert [stamp for stamp, _ in slower.frames()] == [stamp for stamp, _ in read][::2]
    extent = slower.extent()
    assert (extent.frames, extent.duration_s, extent.height, extent.width) == (STEPS, STEPS, 64, 64)


def test_a_run_that_was_killed_goes_on_and_ends_the_same(tmp_path, tiny_model_dir):
    file = questions_file(tmp_path, patrols(4))
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    assert main(command(file, tiny_model_dir, whole)) == 0
    process = subprocess.Popen([sys.executable, '-m', 'statekv_ros.evaluation.cli', *command(file, tiny_model_dir, killed)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and len(list((killed / 'jobs').glob('*.json'))) < 2:
            time.sleep(.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {file.name: file.stat().st_mtime_ns for file in (killed / 'jobs').glob('*.json')}
    assert 2 <= len(before) < 12, 'it was not killed half-way'
    assert main(command(file, tiny_model_dir, killed)) == 0
    assert all((killed / 'jobs' / name).stat().st_mtime_ns == stamp for name, stamp in before.items()), 'done twice'
    assert results_in(killed) == results_in(whole) and len(results_in(whole)) == 12


def test_interrupting_leaves_a_run_that_goes_on(tmp_path, tiny_model_dir):
    plan = _plan(tmp_path, tiny_model_dir)
    folder, jobs, worker = RunFolder(tmp_path / 'run', plan[0]), plan[1], Worker(plan[2])

    def interrupted(left):
        for number, result in enumerate(in_process(worker, left)):
            if number == 2:
                raise KeyboardInterrupt
            yield result

    with pytest.raises(KeyboardInterrupt):
        run_all(jobs, folder, interrupted)
    assert len(results_in(tmp_path / 'run')) == 2
    ran = []
    run_all(jobs, folder, lambda left: (ran.append(job.names) or worker.run(job) for job in left))
    assert ran == [job.names for job in jobs[2:]]
    assert [result['job'] for result in folder.load(plan[0]['jobs'])] == [name for job in jobs for name in job.names]


def test_ray_gives_the_same(tmp_path, tiny_model_dir, monkeypatch):
    pytest.importorskip('ray', reason='ray is not installed: pip install "statekv_ros[ray]"')
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, sys.path)))
    plan, jobs, settings = _plan(tmp_path, tiny_model_dir)
    here, there = (RunFolder(tmp_path / name, plan) for name in ('here', 'there'))
    run_all(jobs, here, partial(in_process, Worker(settings)))
    run_all(jobs, there, partial(on_ray, settings, 'local'))
    assert results_in(tmp_path / 'here') == results_in(tmp_path / 'there')


@pytest.mark.skipif(importlib.util.find_spec('ray') is not None, reason='ray is installed')
def test_without_ray_the_error_says_how_to_get_it(tmp_path, tiny_model_dir, capsys):
    file = questions_file(tmp_path, patrols(1))
    assert main(command(file, tiny_model_dir, tmp_path / 'run', '--ray')) == 2
    assert "pip install 'statekv_ros[ray]'" in capsys.readouterr().err and not (tmp_path / 'run').exists()


def _plan(folder: Path, model: str) -> tuple[dict, list[Job], Settings]:
    videos, policies = load_questions(questions_file(folder, patrols(2))), parse_policies(POLICIES)
    settings = Settings(model, max_tokens=4)
    return describe(settings, videos, policies, [2 * STEPS] * 2), make_jobs(videos, policies), settings


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_flops_are_those_that_torch_counts(backbone, frames):
    """Torch counts every product, also those of a token with the frame's later ones, which it must not see."""
    carried, size = 7, backbone.size(64, 64)
    inputs = backbone.encode([backbone.prepare(frame) for frame in frames[:2]], [0.0, 0.5], 0)

    class Plain:
        def attend(self, layer, query, key, value, scale):
            groups = query.shape[1] // key.shape[1]
            key, value = (torch.cat([torch.zeros_like(part[:, :, :1]).expand(-1, -1, carried, -1), part], dim=2)
                          .repeat_interleave(groups, dim=1) for part in (key, value))
            return torch.softmax(query @ key.mT * scale, dim=-1) @ value

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        backbone.forward(inputs, Plain())
    tokens = inputs.tokens
    unseen = tokens * (tokens - 1) // 2
    attention = 4 * size.layers * size.q_heads * size.head_dim
    assert step_flops(size, tokens, carried, scored=False) == counter.get_total_flops() - attention * unseen
    pairs = tokens * (carried + tokens) - unseen
    assert step_flops(size, tokens, carried, True) - step_flops(size, tokens, carried, False) == attention // 2 * pairs


@pytest.mark.parametrize('text, right', [
    ('Red  ball.', True), (' red ball\n', True), ('RED BALL !', True), ('red', False), ('a red ball', False), ('', False)])
def test_an_answer_is_right_but_for_case_space_and_final_punctuation(text, right):
    assert is_right(text, ['blue box', 'red ball']) is right


def test_evidence_and_age():
    def question(*spans, ask_at=10.0):
        return Question('?', 'k', 'recall', ('a',), ask_at, (0, 20), spans)
    assert evidence_hit(question(), [[3.0, 3.5, 1.0]]) is None and evidence_hit(question((3, 4)), []) is False
    assert evidence_hit(question((1, 2), (3, 4)), [[3.0, 3.5, .9], [0.0, .5, .1]]) is True
    assert evidence_hit(question((3, 4)), [[4.0, 4.5, .9], [3.0, 3.5, .1]]) is False, 'the end is not part of a span'
    assert evidence_hit(question((3, 4)), [[2.0, 3.0, 1.0]]) is True
    assert fact_age_s(question((1, 2), (6, 7), (12, 13))) == 3.0
    assert fact_age_s(question((9, 11))) == 0.0 and fact_age_s(question((12, 13))) is None and fact_age_s(question()) is None


def test_lockstep_answers_as_one_by_one(tiny_model_dir, tmp_path):
    make_patrols(tmp_path / 'patrols', 5, STEPS, 0, (64, 64), bags=False)
    videos = load_questions(tmp_path / 'patrols/questions.yaml')
    policies = parse_policies(['statekv(20)', 'statekv(20) x retrieve(2)', 'statekv(20) x state', 'window(2) x last(4)'])
    worker, told = Worker(Settings(tiny_model_dir, max_tokens=3)), {}
    for lockstep in (1, 2):
        for result in (result for job in make_jobs(videos, policies, lockstep) for result in worker.run(job)):
            # Asked together, where the answers looked is not known, and nobody's time is its own.
            result['step_ms'] = None
            for answer in result['answers']:
                for name in ('evidence', 'evidence_hit', 'first_token_ms', 'total_ms'):
                    del answer[name]
            told.setdefault(result['job'], []).append(result)
    assert len(told) == len(videos) * len({policy.prefill for policy in policies})
    for alone, together in told.values():
        assert alone == together


def test_a_video_may_ask_twice_at_once_in_lockstep(tiny_model_dir, tmp_path):
    file = questions_file(tmp_path, patrols(2), QUESTION + QUESTION.replace('open', 'left'))
    videos, worker = load_questions(file), Worker(Settings(tiny_model_dir, max_tokens=3))
    policies = parse_policies(['statekv(20)', 'statekv(20) x state'])
    alone, together = ([[(a['text'], a['answer_policy'], a['answer']) for a in result['answers']]
                        for job in make_jobs(videos, policies, lockstep) for result in worker.run(job)] for lockstep in (1, 2))
    assert alone == together and len(alone[0]) == 4


def test_videos_that_differ_cannot_go_in_lockstep(tiny_model_dir, tmp_path):
    file = questions_file(tmp_path, [f'patrol:seed=1,steps={STEPS},size=64x64', f'patrol:seed=2,steps={STEPS + 1},size=64x64'])
    [job] = make_jobs(load_questions(file), parse_policies(['full']), lockstep=2)
    with pytest.raises(EvaluationError, match='leave --lockstep out'):
        Worker(Settings(tiny_model_dir)).run(job)
