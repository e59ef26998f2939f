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
from statekv_ros.errors import BagError, EvaluationError, ModelError, ParameterError, PolicyError  # noqa: E402
from statekv_ros.evaluation.plan import parse_policies  # noqa: E402
from statekv_ros.evaluation.run import make_memory  # noqa: E402
from statekv_ros.lmms.generation import Generation, parse_generation  # noqa: E402
from statekv_ros.lmms.requests import from_messages  # noqa: E402
from statekv_ros.lmms.sampling import frame_indices  # noqa: E402
from statekv_ros.lmms.video import DECODERS, check_video  # noqa: E402

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


def directly(backbone, policy: str, video: Path, questions, max_tokens: int) -> list[str]:
    """Answers of the policy's memory, asked one by one, over the frames that the harness's own reader picks; cut at the stop that
    these tasks have of the harness, an empty line."""
    from lmms_eval.models.model_utils.load_video import read_video
    [parsed] = parse_policies([policy])
    memory = make_memory(backbone, parsed)
    frames = read_video(str(video), num_frm=512, fps=FPS)
    assert len(frames) == 2 * FPS
    for index, frame in zip(np.linspace(0, 15, len(frames), dtype=int), frames):
        memory.step(frame, 10**9 + int(index) * 10**9 // 8)
    options = {} if parsed.is_rlivs else {'answer_policy': parsed.answers[0]}
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


@pytest.mark.parametrize('policy', ['window(2) x all', 'full x all', 'window(2) x retrieve(2)', 'none x last(4)',
                                    'statekv(24)/int8 x sparse(64)', 'rlivs'])
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
])
def test_bad_arguments_are_named_before_a_task_is_read(models, model_args, error, message):
    from statekv_ros.lmms.model import StateKV
    with pytest.raises(error, match=message):
        StateKV.create_from_arg_string(','.join(filter(None, (
            '' if 'pretrained' in model_args else f'pretrained={models["internvl"]}', 'device=cpu', model_args))))


def test_pretrained_is_asked_for():
    from statekv_ros.lmms.model import StateKV
    with pytest.raises(ParameterError, match='model_args has no pretrained'):
        StateKV.create_from_arg_string('fps=1')


@pytest.mark.parametrize('roles, contents, message', [
    (('user',), [[('text', 'first'), ('video', 'v')]], 'text before its video'),
    (('user',), [[('video', 'v'), ('video', 'v'), ('text', 'which?')]], 'must have one video, a file, got video, video'),
    (('user',), [[('image', 'v'), ('text', 'what?')]], 'got image'),
    (('user',), [[('video', 'v')]], 'has no question'),
    (('system', 'user'), [[('text', 'be brief')], [('video', 'v'), ('text', 'what?')]], 'system_prompt='),
    (('user', 'assistant'), [[('video', 'v'), ('text', 'what?')], [('text', 'a cat')]], 'leave few-shot out'),
])
def test_messages_that_are_not_one_video_and_a_question_are_refused(roles, contents, message, tmp_path):
    (tmp_path / 'v').touch()
    with pytest.raises(EvaluationError, match=message):
        from_messages(chat(roles, contents, tmp_path), 'a place', {})


def chat(roles, contents, folder: Path) -> list[dict]:
    return [{'role': role, 'content': [{'type': kind, **({'text': what} if kind == 'text' else {'url': str(folder / what)})}
                                       for kind, what in content]} for role, content in zip(roles, contents)]


def test_pieces_of_text_become_one_question(tmp_path):
    (tmp_path / 'v').touch()
    messages = chat(('user',), [[('video', 'v'), ('text', 'What '), ('text', 'is it?')]], tmp_path)
    request = from_messages(messages, 'a place', {'max_new_tokens': 5, 'until': ['\n', '.']})
    assert (request.question, request.generation) == ('What is it?', Generation(5, 0.0, ('\n', '.')))


def test_answers_end_before_the_first_stop_word(own_data, models):
    _, whole = in_process(own_data, arguments(models['internvl']))
    stop = whole[0].lstrip()[2:4]
    assert len(stop) == 2
    file = own_data.tasks / 'videomme_small.yaml'
    file.write_text(file.read_text() + json.dumps({'generation_kwargs': {'max_new_tokens': 16, 'until': [stop]}})[1:-1] + '\n')
    _, cut = in_process(own_data, arguments(models['internvl']))
    assert cut == [text.lstrip().split(stop)[0] if stop in text else text for text in whole] and len(cut[0]) <= 2


def test_blank_space_before_an_answer_is_no_stop():
    generation = Generation(16, 0., ('\n\n', 'D'))
    assert [generation.cut(text) for text in ('\n\n B\n\nmore', ' CD', '\n\nA', ' A')] == ['B', 'C', '\n\nA', ' A']


@pytest.mark.parametrize('kwargs, message', [({'num_beams': 3}, 'num_beams must be 1, got 3'),
                                             ({'max_new_tokens': 0}, 'max_new_tokens must be'),
                                             ({'temperature': .7, 'top_p': .9}, 'top_p and top_k are not known here')])
def test_ways_to_decode_that_there_are_not_are_refused(kwargs, message):
    with pytest.raises(ParameterError, match=message):
        parse_generation(kwargs)


@pytest.mark.parametrize('decoder', DECODERS)
@pytest.mark.parametrize('suffix', ['mp4', 'mkv'])
def test_frames_are_those_of_the_harness_at_their_times(decoder, suffix, tmp_path):
    """Which frames, and their pictures; Matroska does not say how many there are."""
    pytest.importorskip(decoder)
    from lmms_eval.models.model_utils.load_video import read_video
    pictures = moving_square(3, frames=50)
    path = str(write_video(tmp_path / f'video.{suffix}', pictures, 8))
    video = DECODERS[decoder](path)
    assert (video.frames, float(video.rate_hz)) == (50, 8)
    for fps, most in ((1, 512), (2, 512), (8, 512), (100, 512), (8, 7), (1, 1)):
        indices = frame_indices(video.frames, video.rate_hz, fps, most)
        read = list(video.read(indices))
        assert [stamp for stamp, _ in read] == [10**9 + index * 125_000_000 for index in indices]
        assert all(np.array_equal(frame, pictures[index]) for index, (_, frame) in zip(indices, read, strict=True))
        if suffix == 'mp4':
            assert np.array_equal(np.stack([frame for _, frame in read]), read_video(path, num_frm=most, fps=fps))


def test_a_video_of_less_than_a_second_gives_its_first_frame():
    assert frame_indices(5, 30, 1, 512).tolist() == [0]


def test_a_video_that_ends_too_early_is_an_error(tmp_path):
    path = write_video(tmp_path / 'video.mp4', moving_square(3, frames=50), 8)
    video = DECODERS['av'](str(path))
    video.frames = 80       # as where the head says more than there is
    with pytest.raises(BagError, match='cut off: it says that it has 80 frames, but none can be read past frame'):
        list(video.read(range(0, 80, 8)))


def test_a_file_with_sound_alone_is_no_video(tmp_path):
    import av
    with av.open(str(tmp_path / 'sound.mp4'), 'w') as container:
        stream = container.add_stream('aac', rate=8000, layout='mono')
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format='fltp', layout='mono')
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(BagError, match='has no pictures'):
        check_video(str(tmp_path / 'sound.mp4'))


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
