"""ReKV as published, `rekv(n) x rekv(k)`: what a frame's tokens see, which steps a question retrieves, and what comes of it."""
from functools import cache

import pytest
import torch

from conftest import SECOND
from rekv_definition import Definition
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import PolicyError, QuestionError
from statekv_ros.memory import VideoStream, parse_answer_policy, parse_prefill_policy

FAMILIES = ['qwen3_vl', 'qwen2_5_vl', 'internvl', 'llava_onevision']
COUNT, K = 24, 3
BARE = 'where did you last see the red toolbox?'
QUESTION = f'{BARE}\n(A) on the table\n(B) at the door\nAnswer with a letter.'


@pytest.fixture(scope='module')
def backbones(tmp_path_factory):
    base = tmp_path_factory.mktemp('rekv')
    return {family: load_backbone(str(write_tiny_checkpoint(base / family, family=family, max_position=300)),
                                  device='cpu', dtype='float32') for family in FAMILIES}


@pytest.fixture(scope='module')
def defined(backbones, frames):
    """By family, the definition after COUNT frames, through a window that ends within a step, and what it answers."""
    @cache
    @torch.inference_mode()
    def of(family: str) -> tuple[Definition, dict[int, list[int]], torch.Tensor]:
        backbone = backbones[family]
        definition = Definition(backbone, window_of(backbone))
        for first in range(0, COUNT, backbone.frames_per_step):
            numbers = range(first, first + backbone.frames_per_step)
            definition.watch([frames[number] for number in numbers], [float(number) for number in numbers])
        return definition, *definition.ask(K, BARE, QUESTION, 3)
    return of


def window_of(backbone) -> int:
    return 5 * backbone.step_tokens(64, 64) // 2 + 1


def stream_of(backbone, frames, count: int = COUNT, policy: str = '', **options) -> VideoStream:
    stream = VideoStream(backbone, policy or f'rekv({window_of(backbone)})', **options)
    for index in range(count):
        stream.step(frames[index % 32], (index + 1) * SECOND)
    return stream


def asked(stream: VideoStream, policy: str, monkeypatch, retrieve_by: str = BARE):
    """The answering, and the logits of its tokens."""
    logits = []
    with monkeypatch.context() as patch:
        project = stream.backbone.logits
        patch.setattr(stream.backbone, 'logits', lambda hidden: logits.append(project(hidden)) or logits[-1])
        answering = stream.begin_answer(QUESTION, policy, max_tokens=3, evidence=99, retrieve_by=retrieve_by)
        while not answering.advance():
            pass
    return answering, torch.cat(logits).double()


@pytest.mark.parametrize('family, positions', [(family, 'native') for family in FAMILIES] + [('internvl', 'lazy_shift')])
def test_equals_the_definition(family, positions, backbones, defined, frames, monkeypatch):
    """Tokens carried, keys and values of all that was seen, steps that each layer retrieves, and logits."""
    stream, (definition, chosen, expected) = stream_of(backbones[family], frames, positions=positions), defined(family)
    assert (stream.shift > 0) == (positions != 'native')
    assert stream.carried.kept().sort().values.tolist() == [[definition.kept()] * stream.backbone.layout.kv_heads
                                                            ] * stream.backbone.layout.layers
    assert stream.state_tokens == definition.prompt + definition.window < stream.detailed_tokens
    for step, (begin, end, *_) in zip(stream.detailed.steps(), definition.steps, strict=True):
        rows = slice(step.row, step.row + step.record.tokens)
        key = stream.backbone.unrotated(stream.detailed.rows().key[:, :, rows], step.positions)
        assert (key - torch.stack(definition.keys)[:, :, begin:end]).abs().max() < 1e-3
        assert (stream.detailed.rows().value[:, :, rows] - torch.stack(definition.values)[:, :, begin:end]).abs().max() < 1e-4
    answering, logits = asked(stream, f'rekv({K})', monkeypatch)
    assert answering._retrieval.chosen == chosen
    assert (logits - expected[:len(logits)]).abs().max() < 1e-3
    others, other = asked(stream, f'rekv({K})', monkeypatch, QUESTION)
    assert others._retrieval.chosen != chosen and (logits[0] - other[0]).abs().max() > 1e-2, 'the bare text would prove nothing'


@pytest.mark.parametrize('family', ['qwen3_vl', 'internvl'])
def test_a_window_that_holds_everything_is_full_attention(family, backbones, frames, monkeypatch):
    full, rekv = (stream_of(backbones[family], frames, 12, policy, positions='native') for policy in ('full', 'rekv(100000)'))
    assert (asked(full, 'all', monkeypatch)[1] - asked(rekv, 'all', monkeypatch)[1]).abs().max() < 1e-5
    narrow = stream_of(backbones[family], frames, 12, positions='native')
    assert (asked(full, 'all', monkeypatch)[1] - asked(narrow, 'all', monkeypatch)[1]).abs().max() > 1e-3


def test_the_prompt_stays_in_sight(backbones, frames):
    """Without it, frames long after it has left the window are something else."""
    backbone, window = backbones['internvl'], window_of(backbones['internvl'])
    stream, forgetful = stream_of(backbone, frames, 20), VideoStream(backbone, f'rekv({window})')
    forgetful.remember_prefix()
    forgetful.carried._prompt_key, forgetful.carried._prompt_value = (backbone.layout.empty(0) for _ in range(2))
    for index in range(20):
        forgetful.step(frames[index % 32], (index + 1) * SECOND)
    newest = [each.detailed.steps()[-1] for each in (stream, forgetful)]
    assert (stream.detailed.mean_key(newest[0]) - forgetful.detailed.mean_key(newest[1])).abs().max() > 1e-4
    assert stream.state_tokens - forgetful.state_tokens == backbone.prefix().tokens


def test_the_question_itself_retrieves_where_nothing_else_is_told(backbones, frames, monkeypatch):
    stream = stream_of(backbones['llava_onevision'], frames, 20)
    chosen = [asked(stream, f'rekv({K})', monkeypatch, text)[0]._retrieval.chosen
              for text in ('', QUESTION, f' {QUESTION}\n', BARE)]
    assert chosen[0] == chosen[1] == chosen[2] != chosen[3]
    for policy in ('all', 'retrieve(3)', 'state'):
        one, other = (asked(stream, policy, monkeypatch, text)[1] for text in ('', BARE))
        assert torch.equal(one, other)


def test_slices_and_frames_that_come_meanwhile_change_nothing(backbones, frames, monkeypatch):
    """With a frame that waits for its partner."""
    whole, _ = asked(stream_of(backbones['qwen3_vl'], frames, 15), 'rekv(2)', monkeypatch)
    stream, index = stream_of(backbones['qwen3_vl'], frames, 15), 15
    answering = stream.begin_answer(QUESTION, 'rekv(2)', max_tokens=3, evidence=99, retrieve_by=BARE)
    while not answering.advance(1):
        stream.step(frames[index % 32], (index + 1) * SECOND)
        index += 1
    assert answering.result().token_ids == whole.result().token_ids
    assert answering._retrieval.chosen == whole._retrieval.chosen
    chosen = {step for steps in whole._retrieval.chosen.values() for step in steps}
    assert {evidence.step for evidence in whole.result().evidence} == chosen | {7}, 'and the frame that waits'


def test_steps_in_few_bits_or_off_the_device_are_retrieved_by_their_visual_tokens(backbones, frames):
    backbone = backbones['internvl']
    exact, few = stream_of(backbone, frames, 20), 8 * backbone.step_tokens(64, 64) * backbone.kv_bytes_per_token
    for options in ({'detailed_format': 'int8'}, {'detailed_format': 'int4', 'host_cache_bytes': 10**6, 'device_cache_bytes': few},
                    {'host_cache_bytes': 10**6, 'device_cache_bytes': few}):
        stream = stream_of(backbone, frames, 20, **options)
        assert stream.detailed.by_pages and (stream.detailed.steps_below > 0) == ('host_cache_bytes' in options)
        for right, step in zip(exact.detailed.steps(), stream.detailed.steps(), strict=True):
            error = (exact.detailed.mean_key(right, visual=True) - stream.detailed.mean_key(step, visual=True)).norm()
            other = (exact.detailed.mean_key(right, visual=True) - exact.detailed.mean_key(right)).norm()
            assert error < other / (4 if stream.detailed_format == 'int4' else 20)


def test_text_that_is_too_long_to_retrieve_by_is_refused(backbones, frames):
    stream = stream_of(backbones['internvl'], frames, 4)
    with pytest.raises(QuestionError, match=r'retrieve_by has \d+ tokens, and \d+ positions are left for it: shorten it'):
        stream.begin_answer(QUESTION, 'rekv(2)', retrieve_by='a b c d ' * 200)


def test_a_window_shorter_than_the_prompt_is_refused(backbones):
    with pytest.raises(PolicyError, match=r'rekv\(16\) is shorter than the prompt before the video, which has 17 tokens: raise it'):
        VideoStream(backbones['qwen2_5_vl'], 'rekv(16)')


@pytest.mark.parametrize('argument', ['', '()', '(0)', '(-1)', '(2.5)', '(unlimited)'])
def test_bad_arguments_are_named(argument):
    with pytest.raises(PolicyError, match='rekv must be a positive number of tokens'):
        parse_prefill_policy(f'rekv{argument}')
    with pytest.raises(PolicyError, match='rekv must be a positive number of frame steps'):
        parse_answer_policy(f'rekv{argument}')
    assert (str(parse_prefill_policy('rekv( 15000 )')), str(parse_answer_policy(' rekv(64)'))) == ('rekv(15000)', 'rekv(64)')
