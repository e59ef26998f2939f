"""The model `statekv` of lmms-eval: the harness's own tasks over small data sets in their formats give what `VideoStream` gives."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('lmms_eval', reason='lmms-eval is not installed: its tests run with "make test-lmms"')

from lmms_data import Datasets, moving_square, write_video  # noqa: E402
from lmms_patrol import by_lmms_eval, by_statekv_eval, write_patrols  # noqa: E402
from statekv_ros.backbones import load_backbone  # noqa: E402
from statekv_ros.backbones.tiny import write_tiny_checkpoint  # noqa: E402
from statekv_ros.errors import EvaluationError, ModelError, ParameterError, PolicyError, StateKVError  # noqa: E402
from statekv_ros.evaluation.offline import Offline  # noqa: E402
from statekv_ros.evaluation.plan import parse_policies  # noqa: E402
from statekv_ros.evaluation.run import make_memory  # noqa: E402
from statekv_ros.lmms.generation import Generation  # noqa: E402
from statekv_ros.lmms.requests import Request  # noqa: E402
from statekv_ros.memory import VideoStream  # noqa: E402

FAMILIES = ('internvl', 'qwen3_vl', 'qwen2_5_vl')
FPS = 4         # of videos of 16 frames in 2 s: every other one
TASKS = ('videomme_small', 'mlvu_small', 'ovo_backward_small', 'ovo_realtime_small', 'ovo_forward_small')
VIDEOMME = ('videomme_small',)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Datasets:
    """Two videos of videomme and of mlvu with two questions each, and a document of each part of ovobench."""
    made = Datasets(tmp_path_factory.mktemp('lmms'))
    for seed, name in enumerate(('one', 'two')):
        write_video(made.home / f'videomme/data/{name}.mp4', moving_square(seed), 8)
        write_video(made.home / f'mlvu/{name}.mp4', moving_square(5 + seed), 8)
    for seed, name in enumerate(('7', '8', '9_0', '9_1')):
        write_video(made.folder / f'chunks/{name}.mp4', moving_square(10 + seed), 8)
    made.videomme('videomme_small', ('one', 'two'))
    made.mlvu('mlvu_small', ('one', 'two'))
    for number, part in enumerate(('backward', 'realtime', 'forward'), start=7):
        made.ovobench(f'ovo_{part}_small', part, made.folder / 'chunks', [number])
    return made


@pytest.fixture(scope='module')
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp('models')
    return {family: str(write_tiny_checkpoint(folder / family, family=family)) for family in FAMILIES}


@pytest.fixture
def own_data(data, tmp_path) -> Datasets:
    """A copy of the data, to be spoilt."""
    shutil.copytree(data.folder, tmp_path / 'data')
    made = Datasets.__new__(Datasets)
    made.folder, made.home, made.tasks = (tmp_path / 'data' / part for part in ('', 'home', 'tasks'))
    return made


def arguments(model: str, **more) -> str:
    return ','.join(f'{name}={value}' for name, value in ({'pretrained': model, 'fps': FPS, 'dtype': 'float32', 'device': 'cpu',
                                                           'prefill': 'statekv(24)'} | more).items())


def on_command_line(data: Datasets, model_args: str, tasks, out: Path, *more: str, launch=()) -> tuple[dict, dict]:
    """Run `python -m lmms_eval`; the results that it wrote, and task -> documents in order."""
    done = subprocess.run(
        [sys.executable, *(launch or ('-m', 'lmms_eval')), '--model', 'statekv', '--model_args', model_args, '--tasks',
         ','.join(tasks), '--include_path', str(data.tasks), '--output_path', str(out), '--log_samples', *more],
        env=os.environ | {'HF_HOME': str(data.home), 'HF_HUB_OFFLINE': '1', 'ACCELERATE_USE_CPU': 'true'}, cwd=data.folder,
        capture_output=True, text=True, timeout=240)
    written = [file for file in out.glob('*/*_results.json') if file.parent.name != 'submissions']
    assert len(written) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    samples = {task: sorted(map(json.loads, next(out.glob(f'*/*_samples_{task}.jsonl')).read_text().splitlines()),
                            key=lambda sample: sample['doc_id']) for task in tasks}
    return json.loads(written[0].read_text()), samples


def in_process(data: Datasets, model_args: str, tasks=VIDEOMME, **more) -> tuple[dict, list]:
    """The same without a process of its own: counts of videos watched and questions unanswered, and the answers in the order of
    the documents."""
    os.environ |= {'HF_HOME': str(data.home), 'HF_HUB_OFFLINE': '1'}
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    found = simple_evaluate('statekv', model_args=model_args, tasks=list(tasks), bootstrap_iters=0, task_manager=TaskManager(
        'ERROR', include_path=str(data.tasks), include_defaults=False, model_name='statekv'), **more)
    counts = {name: found['throughput'][f'avg_{name}'] for name in ('watched', 'unanswered')}
    return counts, [told(sample) for task in tasks for sample in sorted(found['samples'][task], key=lambda each: each['doc_id'])]


def told(sample: dict) -> str:
    """What the model answered."""
    answer = sample['filtered_resps']
    return answer[0] if isinstance(answer, list) and len(answer) == 1 else answer


def directly(backbone, policy: str, video: Path, questions, max_tokens: int, **more) -> list[str]:
    """Answers of the policy's memory, asked one by one, over the frames that the harness's own reader picks; cut at the stop that
    these tasks have of the harness, an empty line."""
    from lmms_eval.models.model_utils.load_video import read_video
    [parsed] = parse_policies([policy])
    memory = make_memory(backbone, parsed)
    frames = read_video(str(video), num_frm=512, fps=FPS)
    assert len(frames) == 2 * FPS
    for index, frame in zip(np.linspace(0, 15, len(frames), dtype=int), frames):
        memory.step(frame, 10**9 + int(index) * 10**9 // 8)
    options = {} if parsed.is_rlivs else {'answer_policy': parsed.answers[0]} | more
    return [memory.answer(question, max_tokens=max_tokens, **options).text.lstrip().split('\n\n')[0] for question in questions]


@pytest.mark.parametrize('family', FAMILIES)
def test_command_line_gives_the_streams_own_answers_and_the_harness_scores_them(data, models, family, tmp_path):
    """Two questions to a video, in one batch of the harness's, beside each asked alone."""
    results, samples = on_command_line(data, arguments(models[family]), TASKS, tmp_path / 'out', '--batch_size', '2')
    backbone = load_backbone(models[family], 'cpu', 'float32')
    for task, folder, max_tokens in (('videomme_small', 'videomme/data', 16), ('mlvu_small', 'mlvu', 16)):
        assert len(samples[task]) == 4
        for first, name in ((0, 'one'), (2, 'two')):
            two = samples[task][first:first + 2]
            expected = directly(backbone, 'statekv(24) x all', data.home / folder / f'{name}.mp4',
                                [sample['input'] for sample in two], max_tokens)
            assert [told(sample).strip() for sample in two] == [text.strip() for text in expected]
    for part, number in (('backward', 7), ('realtime', 8)):
        [sample] = samples[f'ovo_{part}_small']
        [expected] = directly(backbone, 'statekv(24) x all', data.folder / f'chunks/{number}.mp4', [sample['input']], 128)
        assert told(sample).strip() == expected.strip()
    [sample] = samples['ovo_forward_small']
    assert len(sample['forward_acc']['test_info']) == 2 and all('response' in each for each in sample['forward_acc']['test_info'])
    metrics = {task: next(name for name in results['results'][task] if name.endswith(',none')) for task in TASKS}
    assert metrics == {'videomme_small': 'videomme_perception_score,none', 'mlvu_small': 'mlvu_percetion_score,none',
                       'ovo_backward_small': 'back_real_acc,none', 'ovo_realtime_small': 'back_real_acc,none',
                       'ovo_forward_small': 'forward_acc,none'}
    assert results['throughput']['avg_unanswered'] == 0


@pytest.mark.parametrize('policy', ['window(2) x all', 'full x all', 'window(2) x retrieve(2)', 'rekv(50) x rekv(2)',
                                    'none x last(4)', 'statekv(24)/int8 x sparse(64)', 'rlivs'])
def test_each_policy_answers_as_its_own_memory(data, models, policy):
    prefill, _, answer = policy.partition(' x ')
    _, answers = in_process(data, arguments(models['internvl'], prefill=prefill, answer=answer))
    _, samples = in_process(data, arguments(models['internvl'], prefill='none', answer='state'))
    assert answers != samples, 'the model answers the same whatever it remembers'
    backbone = load_backbone(models['internvl'], 'cpu', 'float32')
    expected = [text for name in ('one', 'two') for text in directly(
        backbone, policy, data.home / f'videomme/data/{name}.mp4', questions_of(data, 'videomme_small', name), 16)]
    assert [text.strip() for text in answers] == [text.strip() for text in expected]


def questions_of(data: Datasets, task: str, video: str) -> list[str]:
    """The prompts that the harness makes of a video's questions."""
    from lmms_eval.tasks import TaskManager, get_task_dict
    manager = TaskManager('ERROR', include_path=str(data.tasks), include_defaults=False, model_name='statekv')
    task = get_task_dict([task], manager, 'chat')[task]
    return [task.doc_to_text(doc) for doc in task.test_docs() if doc['videoID'] == video]


def test_a_video_is_watched_once_for_all_its_questions_with_the_same_answers(data, models):
    once, answers = in_process(data, arguments(models['qwen3_vl']))
    again, same = in_process(data, arguments(models['qwen3_vl'], reuse_video='false'))
    assert (once['watched'], again['watched']) == (2, 4)
    assert answers == same and len(set(answers)) > 1


def test_two_ranks_give_the_answers_of_one(data, models, tmp_path):
    launch = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'lmms_eval')
    model_args = arguments(models['qwen2_5_vl'], device='auto')
    results, samples = on_command_line(data, model_args, TASKS[:2], tmp_path / 'out', launch=launch)
    assert results['throughput']['avg_watched'] == 4      # of rank 0: each rank has every other question
    _, alone = in_process(data, arguments(models['qwen2_5_vl']), TASKS[:2])
    assert [told(sample) for task in TASKS[:2] for sample in samples[task]] == alone


def test_a_stopped_run_goes_on_where_it_was(data, models, tmp_path):
    model_args = arguments(models['internvl'], resume=tmp_path / 'kept')
    first, some = in_process(data, model_args, limit=2)
    [file] = (tmp_path / 'kept').iterdir()
    with file.open('a') as stream:
        stream.write('{"key": "cut o')      # as a killed run leaves it
    second, answers = in_process(data, model_args)
    third, same = in_process(data, model_args, batch_size=2)
    assert (first['watched'], second['watched'], third['watched']) == (1, 1, 0)
    assert answers[:2] == some and answers == same == in_process(data, arguments(models['internvl']))[1]


@pytest.mark.parametrize('change', [{'prefill': 'window(2)'}, {'fps': 8}, {'pretrained': 'qwen3_vl'}])
def test_answers_of_another_run_are_not_taken(data, models, change, tmp_path):
    in_process(data, arguments(models['internvl'], resume=tmp_path))
    change = change | ({'pretrained': models['qwen3_vl']} if 'pretrained' in change else {})
    other, _ = in_process(data, arguments(models['internvl'], resume=tmp_path, **change))
    assert other['watched'] == 2


@pytest.mark.parametrize('spoil', [lambda file: file.write_bytes(b'no video at all'),
                                   lambda file: file.write_bytes(file.read_bytes()[:len(file.read_bytes()) // 2])])
def test_a_broken_video_costs_its_own_questions_only_and_is_asked_again(own_data, models, spoil, tmp_path):
    """An empty answer is all that the harness can be given; it is told apart from a wrong one by `unanswered`, and not cached."""
    file = own_data.home / 'videomme/data/one.mp4'
    whole = file.read_bytes()
    model_args, cache = arguments(models['internvl']), str(tmp_path / 'cache')
    _, expected = in_process(own_data, model_args)
    spoil(file)
    counts, answers = in_process(own_data, model_args, use_cache=cache)
    assert counts == {'unanswered': 2, 'watched': 1}
    assert answers == ['', '', *expected[2:]]
    file.write_bytes(whole)
    counts, answers = in_process(own_data, model_args, use_cache=cache)
    assert counts == {'unanswered': 0, 'watched': 1}        # the other video's are in the harness's cache
    assert answers == expected


def test_a_missing_video_is_named_before_any_is_watched(own_data, models, monkeypatch):
    from statekv_ros.lmms.model import StateKV
    monkeypatch.setattr(StateKV, '_watch', lambda self, path: pytest.fail(f'{path} was watched'))
    (own_data.home / 'videomme/data/two.mp4').unlink()
    with pytest.raises(EvaluationError, match=r'(?s)2 of 4 questions cannot be asked.*document 2.*two\.mp4 does not exist'):
        in_process(own_data, arguments(models['internvl']))


def test_a_task_without_video_is_refused(own_data, models):
    file = own_data.tasks / 'videomme_small.yaml'
    file.write_text(file.read_text() + 'doc_to_visual: null\n')
    with pytest.raises(EvaluationError, match='must have one video, a file, got none'):
        in_process(own_data, arguments(models['internvl']))


@pytest.mark.parametrize('model_args, error, message', [
    ('max_frames=0', ParameterError, 'max_frames must be a whole number from 1 on, got 0'),
    ('max_frames=1.5', ParameterError, 'max_frames must be a whole number from 1 on, got 1.5'),
    ('fps=0', ParameterError, 'fps must be a positive number'),
    ('fps=fast', ParameterError, "fps must be a number, got 'fast'"),
    ('reuse_video=perhaps', ParameterError, "reuse_video must be true or false, got perhaps"),
    ('frames=8', ParameterError, 'unknown model_args frames: there are pretrained, prefill'),
    ('decoder=opencv', ParameterError, "decoder must be one of av, decord, got 'opencv'"),
    ('prefill=statekv(0)', PolicyError, 'must be a positive number of tokens'),
    ('answer=everything', PolicyError, "policy must be all, .*, got 'everything'"),
    ('prefill=rlivs,answer=all', PolicyError, 'rlivs answers from its captions only'),
    ('prefill=full,positions=contiguous', PolicyError, "positions 'contiguous' needs a prefill policy that forgets"),
    ('pretrained=/no/such/model', ModelError, '/no/such/model'),
    ('layout=theirs', ParameterError, "layout must be one of model, released, got 'theirs'"),
    ('rope_length=long', ParameterError, "rope_length must be a number of positions, .*, got 'long'"),
    ('rope_length=-1', ParameterError, "rope_length must be a number of positions, .*, got '-1.0'"),
    ('rope_length=5', ModelError, 'rope_length must be 0 or at least the trained context'),
    ('positions=round', ParameterError, "positions must be one of native, contiguous, lazy_shift, got 'round'"),
    ('max_frame_pixels=-1', ParameterError, 'max_frame_pixels must be a number of pixels, .*, got -1'),
    ('retrieve_by=question', ParameterError, r"retrieve_by is for the answer policy rekv\(k\), .*, got 'question' with answer=all"),
])
def test_bad_arguments_are_named_before_a_task_is_read(models, model_args, error, message):
    from statekv_ros.lmms.model import StateKV
    with pytest.raises(error, match=message):
        StateKV.create_from_arg_string(','.join(filter(None, (
            '' if 'pretrained' in model_args else f'pretrained={models["internvl"]}', 'device=cpu', model_args))))


@pytest.mark.parametrize('model_args, message', [('layout=released', 'layout "released" is known of internvl alone'),
                                                 ('rope_length=auto', 'dynamic-NTK')])
def test_what_a_model_cannot_be_watched_with_is_refused_as_by_statekv_eval(models, model_args, message):
    from statekv_ros.lmms.model import StateKV
    name, _, value = model_args.partition('=')
    with pytest.raises(StateKVError, match=message) as theirs:
        Offline(**{name: value}).load(models['qwen3_vl'], 'cpu')
    with pytest.raises(theirs.type) as ours:
        StateKV.create_from_arg_string(f'pretrained={models["qwen3_vl"]},device=cpu,{model_args}')
    assert str(ours.value) == str(theirs.value)


@pytest.fixture(scope='module')
def short(tmp_path_factory) -> str:
    """A checkpoint that was trained for fewer positions than a video of 8 frames takes."""
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp('short') / 'internvl', family='internvl', max_position=100))


@pytest.mark.parametrize('options', [
    {'layout': 'released'}, {'rope_length': 'auto'}, {'rope_length': '2000', 'positions': 'contiguous'},
    {'positions': 'native', 'max_frame_pixels': 4096}])
def test_a_video_of_known_length_is_watched_as_statekv_eval_does(data, short, options):
    """Where RoPE is scaled by length, for each question as if it were the only one."""
    counts, answers = in_process(data, arguments(short, **options))
    watching = Offline(**options)
    backbone = watching.load(short, 'cpu', 'float32')
    seconds, expected, lengths = [index / 8 for index in np.linspace(0, 15, 2 * FPS, dtype=int)], [], set()
    for name in ('one', 'two'):
        for question in questions_of(data, 'videomme_small', name):
            fitted = watching.fitted(backbone, seconds, 64, 64, [question], 16)
            assert (fitted.max_position > 100) == watching.scales
            lengths.add((name, fitted.max_position))
            policy = f'statekv(24)/{watching.position_policy()} x all'
            expected += directly(fitted, policy, data.home / f'videomme/data/{name}.mp4', [question], 16)
    assert [text.strip() for text in answers] == [text.strip() for text in expected]
    assert counts['watched'] == len(lengths)


def test_questions_that_take_other_lengths_get_a_memory_each(data, short):
    from statekv_ros.lmms.model import StateKV
    video = data.home / 'videomme/data/one.mp4'
    questions = ('what drifts?', 'what is it that drifts over there?', 'what drifts?')
    watching, expected = Offline(rope_length='auto'), []
    seconds = [index / 8 for index in np.linspace(0, 15, 2 * FPS, dtype=int)]
    backbone = watching.load(short, 'cpu', 'float32')
    for question in questions:
        fitted = watching.fitted(backbone, seconds, 64, 64, [question], 8)
        expected += directly(fitted, 'statekv(24)/native x all', video, [question], 8)
    requests = [Request('here', str(video), question, Generation(8, 0., ('\n\n',))) for question in questions]
    for reuse, watched in (('true', 2), ('false', 3)):
        model = StateKV.create_from_arg_string(arguments(short, rope_length='auto', reuse_video=reuse, batch_size=2))
        assert [answer.text.lstrip() for answer in model._answers(requests)] == expected and model.watched == watched


def test_a_length_that_is_too_short_is_told_before_any_video_is_watched(data, short, monkeypatch):
    from statekv_ros.lmms.model import StateKV
    monkeypatch.setattr(StateKV, '_watch', lambda self, request: pytest.fail(f'{request.video} was watched'))
    with pytest.raises(EvaluationError, match=r'document 0, .*one\.mp4: rope_length must be at least the \d+ positions that .*'
                                              'take, got 150: raise it, or set it to auto'):
        in_process(data, arguments(short, rope_length=150))


def test_rekv_retrieves_by_the_field_that_is_named(data, models, monkeypatch):
    asked, begin = [], VideoStream.begin_answer
    monkeypatch.setattr(VideoStream, 'begin_answer', lambda self, question, **options: asked.append(
        (question, options.get('retrieve_by'))) or begin(self, question, **options))
    policy = {'prefill': 'rekv(60)', 'answer': 'rekv(1)'}
    _, answers = in_process(data, arguments(models['internvl'], retrieve_by='question', **policy))
    bare = [f'How many squares are there in part {part}?' for part in (1, 2)]
    asked = [(question, by) for question, by in asked if by is not None]    # without the trial that each model is given
    assert [by for _, by in asked] == bare * 2 and all(by in question != by for question, by in asked)
    backbone, expected = load_backbone(models['internvl'], 'cpu', 'float32'), []
    for name in ('one', 'two'):
        for question, by in zip(questions_of(data, 'videomme_small', name), bare):
            expected += directly(backbone, 'rekv(60) x rekv(1)', data.home / f'videomme/data/{name}.mp4', [question], 16,
                                 retrieve_by=by)
    assert [text.strip() for text in answers] == [text.strip() for text in expected]
    with pytest.raises(EvaluationError, match="(?s)4 of 4 questions cannot be asked.*has no text in the field 'query' that "
                                              'retrieve_by names; its fields are video_id, duration'):
        in_process(data, arguments(models['internvl'], retrieve_by='query', **policy))


def test_pretrained_is_asked_for():
    from statekv_ros.lmms.model import StateKV
    with pytest.raises(ParameterError, match='model_args has no pretrained'):
        StateKV.create_from_arg_string('fps=1')


def test_answers_end_before_the_first_stop_word(own_data, models):
    _, whole = in_process(own_data, arguments(models['internvl']))
    stop = whole[0].lstrip()[2:4]
    assert len(stop) == 2
    file = own_data.tasks / 'videomme_small.yaml'
    file.write_text(file.read_text() + json.dumps({'generation_kwargs': {'max_new_tokens': 16, 'until': [stop]}})[1:-1] + '\n')
    _, cut = in_process(own_data, arguments(models['internvl']))
    assert cut == [text.lstrip().split(stop)[0] if stop in text else text for text in whole] and len(cut[0]) <= 2


def test_statekv_eval_gives_the_same_answers_question_by_question(tmp_path):
    """Two patrols of 16 s; `python test/lmms_patrol.py` does it with more."""
    write_patrols(tmp_path, videos=2, steps=16, size=(160, 120))
    policy = 'statekv(144) x all'
    ours = sorted(by_statekv_eval(tmp_path, policy))
    assert len(ours) > 10 and len({answer for *_, answer in ours}) > 4
    assert sorted(by_lmms_eval(tmp_path, policy, batch_size=4)) == ours


def test_the_harness_finds_the_model_without_ros():
    code = ("import sys; sys.modules['rclpy'] = None; from lmms_eval.models import get_model; "
            "print(get_model('statekv').__module__, 'rclpy' in [name.partition('.')[0] for name in sys.modules if sys.modules[name]])")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-2:] == ['statekv_ros.lmms.model', 'False'], done.stderr[-2000:]
