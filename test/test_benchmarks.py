"""Readers of published streaming benchmarks: files as documented, a broken one for each field, protocol and scores end to end."""
import copy
import csv
import importlib.util
import json
import os
import signal
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from statekv_ros.errors import EvaluationError
from statekv_ros.evaluation.benchmarks import BENCHMARKS, read_benchmark
from statekv_ros.evaluation.benchmarks.prompts import Prompts
from statekv_ros.evaluation.cli import main
from statekv_ros.evaluation.plan import Job, Policy, Settings
from statekv_ros.evaluation.pool import on_ray
from statekv_ros.evaluation.run import asked_at_s, run_job
from statekv_ros.evaluation.schema import Poll, Question, Video
from statekv_ros.evaluation.scores import judged

CHOICE = {'task_type': 'Action Recognition', 'question': 'what happens?', 'time_stamp': '00:00:05', 'answer': 'C',
          'options': ['A. one', 'B. two', 'C. three', 'D. four'], 'required_ability': 'working memory'}
PROACTIVE = {'task_type': 'Proactive Output', 'question': 'say "3" when it is there', 'time_stamp': '00:00:02',
             'ground_truth_time_stamp': '00:00:04', 'ground_truth_output': '3', 'required_ability': 'working memory'}
FILES = {
    'ovobench': [{'id': 0, 'task': 'EPM', 'video': 'a.mp4', 'realtime': 4, 'question': 'who was it?', 'answer': 'two',
                  'options': ['one', 'two', 'three'], 'gt': 1},
                 {'id': 1, 'task': 'OCR', 'video': 'a.mp4', 'realtime': 6.5, 'question': 'what stands there?', 'answer': 'x',
                  'options': ['x', 'y'], 'gt': 0},
                 {'id': 2, 'task': 'REC', 'video': 'b.mp4', 'activity': 'jump', 'test_info': [{'realtime': 3, 'count': 1}]}],
    'streamingbench-real': [{'video_path': './a.mp4', 'questions': [CHOICE, CHOICE | {'time_stamp': '00:00:07', 'answer': 'A'}]},
                            {'video_path': './b.mp4', 'questions': [CHOICE]}],
    'streamingbench-sqa': [[{'video_path': './a.mp4', 'questions': [CHOICE | {'options': ['one', 'two', 'three', 'four']}]},
                            {'video_path': './a.mp4', 'questions': [CHOICE | {'question': 'and then?', 'time_stamp': '00:00:06'}]}]],
    'streamingbench-proactive': [{'video_path': './a.mp4', 'questions': [PROACTIVE]}],
    'rvs': [{'video_id': 'a', 'video_path': 'a.mp4', 'conversations': [
        {'question': 'what is done?', 'answer': 'cutting', 'start_time': 1.0, 'end_time': 5.5}]}],
}
FILES['streamingbench-omni'] = FILES['streamingbench-real']
# Every field that is read: where it stands in the first question, and what cannot stand there.
BROKEN = {
    'ovobench': {'task': ([0, 'task'], 'XYZ'), 'video': ([0, 'video'], ''), 'realtime': ([0, 'realtime'], -1), 'gt': ([0, 'gt'], 3),
                 'question': ([0, 'question'], None), 'options': ([0, 'options'], ['one'])},
    'streamingbench-real': {'video_path': ([0, 'video_path'], 5), 'questions': ([1, 'questions'], {}),
                            'time_stamp': ([0, 'questions', 0, 'time_stamp'], '5 s'), 'answer': ([0, 'questions', 0, 'answer'], 'E'),
                            'options': ([0, 'questions', 0, 'options'], ['a', 'b', 'c']),
                            'task_type': ([0, 'questions', 0, 'task_type'], []), 'question': ([0, 'questions', 0, 'question'], ' ')},
    'streamingbench-sqa': {'answer': ([0, 1, 'questions', 0, 'answer'], 'c'), 'video_path': ([0, 1, 'video_path'], None),
                           'options': ([0, 0, 'questions', 0, 'options'], ['1', '2', '3', '4', '5'])},
    'streamingbench-proactive': {name: ([0, 'questions', 0, name], wrong) for name, wrong in (
        ('ground_truth_time_stamp', '00:00:01'), ('ground_truth_output', ''), ('time_stamp', 2), ('question', None))},
    'rvs': {name: ([0, 'conversations', 0, name], wrong) for name, wrong in (
        ('question', ''), ('answer', 3), ('start_time', 'x'), ('end_time', 0.5))} | {'video_path': ([0, 'video_path'], None)},
}
BROKEN['streamingbench-omni'] = BROKEN['streamingbench-real']


def written(folder: Path, value, name: str = 'file.json') -> Path:
    (folder / name).write_text(json.dumps(value))
    return folder / name


@pytest.fixture(scope='module')
def videos(tmp_path_factory) -> Path:
    """Two videos of 8 seconds, 4 frames a second."""
    folder = tmp_path_factory.mktemp('videos')
    random = np.random.default_rng(0)
    for name in ('a.mp4', 'b.mp4'):
        writer = cv2.VideoWriter(str(folder / name), cv2.VideoWriter_fourcc(*'mp4v'), 4, (64, 64))
        for _ in range(32):
            writer.write(np.repeat(np.repeat(random.integers(0, 255, (8, 8, 3), dtype=np.uint8), 8, 0), 8, 1))
        writer.release()
    return folder


def questions(read: list[Video]) -> list[Question]:
    return [question for video in read for question in video.questions]


@pytest.mark.parametrize('name', BENCHMARKS)
def test_files_as_documented_are_read(tmp_path, videos, name):
    read = read_benchmark(name, [written(tmp_path, FILES[name])], videos)
    assert all(Path(video.source).is_file() and video.rate_hz == BENCHMARKS[name].rate_hz for video in read)
    asked = questions(read)
    options = name not in ('rvs', 'streamingbench-proactive')
    assert all(bool(q.retrieve_by) == (name != 'rvs') and q.retrieve_by in q.text and not (options and 'A.' in q.retrieve_by)
               for q in asked)
    assert len(asked) == {'ovobench': 2, 'streamingbench-real': 3, 'streamingbench-omni': 3, 'streamingbench-sqa': 2,
                          'streamingbench-proactive': 1, 'rvs': 1}[name]
    if name == 'ovobench':      # the forward task is left out, the source watched once for both
        [video] = read
        assert [(q.kind, q.group, q.accepted, q.ask_at, q.chance) for q in asked] == [
            ('EPM', 'recall', ('B',), 4., 1 / 3), ('OCR', 'perception', ('A',), 6.5, 1 / 2)]
        assert (video.begin_s, video.end_s) == (0., 6.5) and 'A. one; B. two; C. three;' in asked[0].text
    elif name == 'streamingbench-sqa':
        assert 'A. one' in asked[0].text and '00:00:05' not in asked[0].text
        assert all(part in asked[1].text for part in ('what happens?', 'C. three', '00:00:05', 'and then?'))
    elif name == 'streamingbench-proactive':
        assert asked[0].poll.due_s == 4 and asked_at_s(asked[0]) == [3., 4., 5., 6., 7., 8.] and read[0].begin_s == 2
    elif name == 'rvs':
        assert asked[0].evidence == ((1., 5.5),) and asked[0].ask_at == 5.5 and asked[0].scores == ('judge',)


@pytest.mark.parametrize('name, field', [(name, field) for name, fields in BROKEN.items() for field in fields])
def test_each_wrong_field_is_named_with_its_place(tmp_path, videos, name, field):
    path, wrong = BROKEN[name][field]
    for value in (wrong, 'missing'):
        broken = copy.deepcopy(FILES[name])
        inner = broken
        for step in path[:-1]:
            inner = inner[step]
        if value == 'missing':
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        with pytest.raises(EvaluationError) as error:
            read_benchmark(name, [written(tmp_path, broken)], videos)
        assert field in str(error.value) and 'file.json' in str(error.value)


@pytest.mark.parametrize('name', BENCHMARKS)
def test_mixed_up_files_are_told(tmp_path, videos, name):
    for other, content in FILES.items():
        alike = {'streamingbench-real', 'streamingbench-omni'}
        if other != name and not {other, name} <= alike:
            with pytest.raises(EvaluationError, match='is not a file of ' + name) as error:
                read_benchmark(name, [written(tmp_path, content)], videos)
            assert other in str(error.value)


@pytest.mark.parametrize('arguments, what', [
    ({'videos': Path('/nowhere')}, '--videos /nowhere is not a folder'), ({'rate_hz': 0.}, '--rate-hz must be a positive number'),
    ({'context_s': -1.}, '--context must be a positive number'), ({'prompts': Path('/nowhere')}, '--prompts'),
])
def test_wrong_arguments_are_named(tmp_path, videos, arguments, what):
    with pytest.raises(EvaluationError, match=what):
        read_benchmark('streamingbench-real', [written(tmp_path, FILES['streamingbench-real'])], **{'videos': videos} | arguments)


def test_what_a_protocol_does_not_know_is_refused(tmp_path, videos):
    for name, arguments in (('ovobench', {'context_s': 60.}), ('rvs', {'prompts': tmp_path})):
        with pytest.raises(EvaluationError, match=name):
            read_benchmark(name, [written(tmp_path, FILES[name])], videos, **arguments)
    with pytest.raises(EvaluationError, match='must be one of ovobench'):
        read_benchmark('videomme', [], videos)
    for content in ('{', '"text"', '[]'):
        (tmp_path / 'file.json').write_text(content)
        with pytest.raises(EvaluationError, match='file.json'):
            read_benchmark('ovobench', [tmp_path / 'file.json'], videos)


def test_a_bounded_context_gives_each_question_a_memory_of_its_own(tmp_path, videos):
    read = read_benchmark('streamingbench-real', [written(tmp_path, FILES['streamingbench-real'])], videos, context_s=3.)
    assert [(Path(v.source).name, v.begin_s, v.end_s) for v in read] == [('a.mp4', 2., 5.), ('a.mp4', 4., 7.), ('b.mp4', 2., 5.)]
    assert len({video.title for video in read}) == 3


def test_the_authors_wording_is_read_and_not_run(tmp_path, videos):
    program = tmp_path / 'repository' / BENCHMARKS['streamingbench-real'].program
    program.parent.mkdir(parents=True)
    program.write_text('import nothing_of_that_name\nPROMPT_TEMPLATE = """Q: {} O: {} {} {} {}"""\n'
                       'def run():\n    inp = f"x"\n    inp += " Best:"\n    query = f"{a[0]} now {b}?"\n')
    asked = questions(read_benchmark('streamingbench-real', [written(tmp_path, FILES['streamingbench-real'])], videos,
                                     prompts=tmp_path / 'repository'))
    assert asked[0].text == 'Q: what happens? O: A. one B. two C. three D. four Best:'
    assert Prompts(program).assigned('query') == '{} now {}?'
    program.write_text('PROMPT = 3')
    with pytest.raises(EvaluationError, match='no text is assigned to PROMPT_TEMPLATE'):
        read_benchmark('streamingbench-real', [written(tmp_path, FILES['streamingbench-real'])], videos, prompts=program)


@pytest.mark.parametrize('scores, text, at_s, right', [
    (('first_character',), 'C. three', 5, True), (('first_character',), ' C', 5, False), (('first_character',), '', 5, False),
    (('letter_within',), 'it is C', 5, True), (('letter_within',), 'Clearly a', 5, True), (('letter_within',), 'B', 5, False),
    (('first_letter',), 'The answer is C.', 5, True), (('first_letter',), 'B, not C', 5, False), (('first_letter',), 'Clearly', 5, False),
    (('output_in_time',), 'now C', 6, True), (('output_in_time',), 'now C', 6.5, False), (('output_in_time',), 'now', 4, False),
    (('in_time',), 'anything', 2, True), (('words',), 'c.', 5, True), (('judge',), 'C', 5, None)])
def test_scores_are_those_of_the_benchmarks(scores, text, at_s, right):
    question = Question('?', 'k', 'recall', ('C',), 1., (1., 1.), scores=scores, poll=Poll('now?', 4., 8.))
    assert judged(text, question, at_s) == {scores[0]: right}


class Scripted:
    """A memory whose answers are written down; notes what it was shown and asked."""

    def __init__(self, memory, yes_at: float):
        self._memory, self._yes_at, self.asked, self.shown = memory, yes_at, [], []

    def __getattr__(self, name):
        return getattr(self._memory, name)

    def step(self, frame, stamp_ns):
        self.shown.append(stamp_ns / 1e9)
        return self._memory.step(frame, stamp_ns)

    def answer(self, text, **options):
        answer = self._memory.answer(text, **options)
        come = self.shown[-1] - self.shown[0] >= self._yes_at
        self.asked.append((text, self.shown[-1] - self.shown[0]))
        said = ('Yes' if come else 'no') if 'Has the time come' in text else '3'
        return type(answer)(**{**answer.__dict__, 'text': said})


@pytest.mark.parametrize('yes_at, answered_s, right, in_time', [(0.5, 3., True, True), (2.5, 5., True, True), (4.5, 7., False, False),
                                                                 (99., 8., False, False)])
def test_a_question_with_a_time_is_asked_every_second(tmp_path, videos, backbone, monkeypatch, yes_at, answered_s, right, in_time):
    """From a second after it was put until four seconds after the right time, over what was seen since it was put."""
    import statekv_ros.evaluation.run as run
    made, original = [], run.make_memory

    def make(*arguments, **options):
        made.append(Scripted(original(*arguments, **options), yes_at))
        return made[-1]

    monkeypatch.setattr(run, 'make_memory', make)
    [video] = read_benchmark('streamingbench-proactive', [written(tmp_path, FILES['streamingbench-proactive'])], videos, rate_hz=4.)
    result = run_job(backbone, Job(('one',), (video,), Policy('statekv(64)', ('all',))), 4)
    [answer] = result['answers']
    assert (answer['answered_s'], answer['right'], answer['beside']['in_time']) == (answered_s, right, in_time)
    assert len([text for text, _ in made[0].asked if 'Has the time come' in text]) == answered_s - 2
    # What it saw when it was asked: all to that second, from the second at which the question was put on.
    assert [round(seen + 2, 2) for text, seen in made[0].asked if 'Has the time come' in text][:5] == [
        min(2. + second, 7.75) for second in range(1, int(answered_s - 2) + 1)][:5]


def command(file: Path, name: str, model: str, out: Path, *more: str) -> list[str]:
    return [str(file), '--benchmark', name, '--model', model, '--out', str(out), '--max-tokens', '3', '--device', 'cpu',
            '--policies', 'statekv(48) x all', *more]


@pytest.mark.parametrize('name', BENCHMARKS)
def test_a_benchmark_runs_to_its_report(tmp_path, videos, tiny_model_dir, name):
    assert main(command(written(tmp_path, FILES[name]), name, tiny_model_dir, tmp_path / 'run', '--videos', str(videos))) == 0
    report = json.loads((tmp_path / 'run' / 'report.json').read_text())
    policies = {policy['policy']: policy for policy in report['summary']['policies']}
    assert list(policies) == ['statekv(48) x all', 'window(4) x last(4)'] and not report['errors']
    for policy in policies.values():
        if name == 'rvs':
            assert policy['overall']['n'] == 0 and policy['unjudged'] == 1 and policy['mean_of_kinds'] is None
        else:
            assert policy['overall']['n'] == len(questions(read_benchmark(name, [tmp_path / 'file.json'], videos)))
            assert list(policy['beside']) and policy['mean_of_kinds'] == np.mean([kind['right'] for kind in policy['kinds'].values()])
    predictions = sorted((tmp_path / 'run' / 'predictions').glob('*.csv'))
    assert [file.name for file in predictions] == (['statekv_48_x_all.csv', 'window_4_x_last_4.csv'] if name == 'rvs' else [])
    for file in predictions:
        [row] = csv.DictReader(file.open())
        assert row['video_id'] == 'a' and row['question'] == 'what is done?' and row['answer'] == 'cutting'
    assert 'window(4)' in (tmp_path / 'run' / 'index.html').read_text()


def test_videos_that_cannot_be_read_are_named_first_or_counted_as_errors(tmp_path, videos, tiny_model_dir, capsys):
    folder = tmp_path / 'videos'
    folder.mkdir()
    (folder / 'a.mp4').write_bytes((videos / 'a.mp4').read_bytes())
    (folder / 'b.mp4').write_bytes(b'this is no video')
    file, name = written(tmp_path, FILES['streamingbench-real']), 'streamingbench-real'
    assert main(command(file, name, tiny_model_dir, tmp_path / 'run', '--videos', str(folder))) == 2
    assert 'b.mp4' in (told := capsys.readouterr().err) and 'a.mp4' not in told and not (tmp_path / 'run').exists()
    assert main(command(file, name, tiny_model_dir, tmp_path / 'run', '--videos', str(folder), '--skip-broken')) == 0
    assert 'skipped' in capsys.readouterr().err
    report = json.loads((tmp_path / 'run' / 'report.json').read_text())
    assert [policy['overall']['n'] for policy in report['summary']['policies']] == [2, 2]
    assert [(Path(error['source'].partition(' [')[0]).name, error['unanswered']) for error in report['errors']] == [('b.mp4', 1)] * 2
    assert 'could not be watched' in (tmp_path / 'run' / 'index.html').read_text()


@pytest.mark.parametrize('arguments, what', [
    (['--videos', '/tmp'], '--videos is for --benchmark'), (['--context', '60'], '--context is for --benchmark'),
    (['--benchmark', 'videomme'], '--benchmark must be one of')])
def test_options_that_do_not_fit_are_refused(tmp_path, tiny_model_dir, capsys, arguments, what):
    assert main([str(written(tmp_path, [])), '--model', tiny_model_dir, '--out', str(tmp_path / 'run'), *arguments]) == 2
    assert what in capsys.readouterr().err and not (tmp_path / 'run').exists()


@pytest.mark.skipif(importlib.util.find_spec('ray') is None, reason='ray is not installed: pip install "statekv_ros[ray]"')
def test_a_worker_that_is_killed_costs_its_job_only(tiny_model_dir, monkeypatch):
    import psutil
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, sys.path)))
    ask = Question('?', 'k', 'recall', ('x',), 40., (40., 40.))
    jobs = [Job((f'{seed}',), (Video(f'patrol:seed={seed},steps=60,size=64x64', (ask,)),), Policy('statekv(48)', ('all',)))
            for seed in range(4)]
    killed, over = [], threading.Event()

    def kill_one():
        while not over.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                if 'ray::Worker.run' in ' '.join(process.cmdline() or [process.name()]):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    results = [result for part in on_ray(Settings(tiny_model_dir, 'cpu', max_tokens=2), 'local', jobs) for result in part]
    over.set()
    thread.join()
    assert killed and sorted(result['job'] for result in results) == ['0', '1', '2', '3']
