"""The layout of StateKV's released evaluation: which token stands where, and that streaming it is one forward of the library."""
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from conftest import SECOND
from family_libraries import QUESTION, InternVL
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import ModelError, ParameterError
from statekv_ros.memory import VideoStream

FRAME = '<img>' + '<IMG_CONTEXT>' * 256 + '</img>\n'
PROMPT = ('<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n'
          f'<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n')
TRAINED, ANSWER = 100, 8


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A checkpoint that was trained for few positions."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp('released') / 'internvl', family='internvl', max_position=TRAINED)


@pytest.fixture(scope='module')
def backbone(folder):
    return load_backbone(str(folder), device='cpu', dtype='float32', layout='released')


def watch(stream: VideoStream, frames) -> VideoStream:
    for index, frame in enumerate(frames):
        stream.step(frame, (index + 1) * SECOND)
    return stream


def given(backbone, monkeypatch) -> list:
    """What the text model is given from now on, in order."""
    seen, forward = [], backbone.forward
    monkeypatch.setattr(backbone, 'forward', lambda inputs, memory: seen.append(inputs) or forward(inputs, memory))
    return seen


def logits_of(backbone, frames, monkeypatch, policy: str = 'statekv(unlimited)', **options) -> tuple[torch.Tensor, tuple]:
    """Logits of each token of an answer, and its token ids."""
    stream, logits, project = watch(VideoStream(backbone, policy, positions='native', **options), frames), [], backbone.logits
    with monkeypatch.context() as patch:
        patch.setattr(backbone, 'logits', lambda hidden: logits.append(project(hidden)) or logits[-1])
        answer = stream.answer(QUESTION, max_tokens=ANSWER)
    return torch.cat(logits), answer.token_ids


def stock_logits(library: InternVL, pictures, answer: tuple, frame: str, length: int = 0) -> torch.Tensor:
    """One forward of the library's model over video, prompt and answer; `length`: its dynamic RoPE has seen as many positions."""
    ids = torch.cat([library.ids(frame * len(pictures) + PROMPT), torch.tensor([answer[:-1]], dtype=torch.long)], dim=1)
    if length:
        library.model.model.language_model.rotary_emb(torch.zeros(1), torch.tensor([[length - 1]]))
        assert TRAINED < ids.shape[1] < length, 'else the library would go back to the frequencies as trained'
    with torch.inference_mode():
        return library.model(input_ids=ids, pixel_values=library.pixels(pictures)['pixel_values']).logits[0, -len(answer):]


def test_each_token_stands_where_the_release_has_it(tmp_path, frames, monkeypatch):
    """| positions | tokens |
       | 259 f | <img> of frame f, from 0 | 259 f + 1 ... 259 f + 256 | visual tokens | 259 f + 257 | </img> | 259 f + 258 | newline |
       | 259 F ... | the chat template with its system text and the question, no video in it | then the answer |
    """
    folder = write_tiny_checkpoint(tmp_path / 'real', family='internvl', image=448, patch=14)
    backbone = load_backbone(str(folder), device='cpu', dtype='float32', layout='released')
    seen = given(backbone, monkeypatch)
    answer = watch(VideoStream(backbone, 'full'), frames[:3]).answer(QUESTION, max_tokens=1)
    tokenizer = backbone._tokenizer
    start, end, newline = (tokenizer(text, add_special_tokens=False).input_ids for text in ('<img>', '</img>', '\n'))
    assert len(start) == len(end) == len(newline) == 1
    table = {}
    for frame in range(3):
        table |= {259 * frame: start[0], 259 * frame + 257: end[0], 259 * frame + 258: newline[0]}
    table |= dict(enumerate(tokenizer(PROMPT, add_special_tokens=False).input_ids, 3 * 259))

    assert [inputs.tokens for inputs in seen[:3]] == [259] * 3
    embeds = torch.cat([inputs.embeds[0] for inputs in seen])
    positions = torch.cat([inputs.positions[0] for inputs in seen])
    assert positions.tolist() == [*range(3 * 259 + answer.question_tokens)]
    words = backbone._language.embed_tokens.weight
    for position in positions.tolist():
        is_visual = position < 3 * 259 and 0 < position % 259 < 257
        assert (position not in table) == is_visual
        assert is_visual or torch.equal(embeds[position], words[table[position]]), position
    assert answer.question_tokens == len(tokenizer(PROMPT, add_special_tokens=False).input_ids)
    assert tokenizer(FRAME * 2 + PROMPT, add_special_tokens=False).input_ids[:259 * 2 + 1].count(start[0]) == 2


@pytest.mark.parametrize('policy', ['statekv(unlimited)', 'full', 'window(1000)'])
def test_unlimited_memory_equals_one_forward_of_the_library(policy, tmp_path, frames, monkeypatch):
    folder = write_tiny_checkpoint(tmp_path / 'long', family='internvl')
    backbone = load_backbone(str(folder), device='cpu', dtype='float32', layout='released')
    logits, answer = logits_of(backbone, frames[:6], monkeypatch, policy)
    expected = stock_logits(InternVL(folder), frames[:6], answer, '<img>' + '<IMG_CONTEXT>' * 16 + '</img>\n')
    assert (logits - expected).abs().max() < 1e-4
    other, _ = logits_of(backbone, frames[:6], monkeypatch, 'statekv(8)')
    assert (logits[0] - other[0]).abs().max() > 1e-3, 'else this would prove nothing'


@pytest.mark.parametrize('policy', ['statekv(unlimited)', 'full'])
def test_past_the_trained_context_it_equals_the_library_scaled_for_the_whole_length(policy, folder, backbone, frames, monkeypatch):
    prompt = len(backbone._tokenizer(PROMPT, add_special_tokens=False).input_ids)
    length = 12 * 19 + prompt + ANSWER + 128
    scaled = backbone.for_length(length)
    logits, answer = logits_of(scaled, frames[:12], monkeypatch, policy)
    expected = stock_logits(InternVL(folder), frames[:12], answer, '<img>' + '<IMG_CONTEXT>' * 16 + '</img>\n', length)
    assert (logits - expected).abs().max() < 1e-4
    unscaled, _ = logits_of(backbone, frames[:12], monkeypatch, policy)
    assert (logits[0] - unscaled[0]).abs().max() > 1e-3, 'else this would prove nothing'


@pytest.mark.parametrize('length', [TRAINED + 1, 259, 1000, 70000])
def test_frequencies_are_the_librarys_dynamic_ntk_at_that_length(length, folder, backbone):
    rotary = InternVL(folder).model.model.language_model.rotary_emb
    trained = rotary.inv_freq.clone()
    expected, _ = ROPE_INIT_FUNCTIONS['dynamic'](rotary.config, seq_len=length)
    for scaled in (backbone.for_length(length), load_backbone(str(folder), device='cpu', rope_length=length)):
        assert torch.equal(scaled._language.rotary_emb.inv_freq, expected) and torch.equal(scaled.rope.frequencies, expected)
        assert scaled.max_position == length and not torch.equal(expected, trained)
    # Where positions come to that length the library's module computes the base in fp32.
    rotary(torch.zeros(1), torch.tensor([[length - 1]]))
    assert torch.allclose(rotary.inv_freq, expected, rtol=1e-6, atol=0)
    # The release's formula, of head size d: base ((f L / M) - (f - 1)) ^ (d / (d - 2)).
    size = backbone.layout.head_dim
    base = 1e6 * (2.0 * length / TRAINED - 1.0) ** (size / (size - 2))
    assert torch.equal(1.0 / base ** (torch.arange(0, size, 2).float() / size), expected)


def test_models_of_two_lengths_share_weights_and_watch_beside_each_other(backbone, frames, monkeypatch):
    longer = backbone.for_length(4 * TRAINED)
    assert longer._language.layers is backbone._language.layers and backbone.for_length(TRAINED) is backbone
    alone = [logits_of(one, frames[:10], monkeypatch, 'statekv(40)')[0] for one in (backbone, longer)]
    streams = [VideoStream(one, 'statekv(40)', positions='native') for one in (backbone, longer)]
    for index, frame in enumerate(frames[:10]):
        for stream in streams:
            stream.step(frame, (index + 1) * SECOND)
    for stream, expected in zip(streams, alone):
        seen, project = [], stream.backbone.logits
        with monkeypatch.context() as patch:
            patch.setattr(stream.backbone, 'logits', lambda hidden: seen.append(project(hidden)) or seen[-1])
            stream.answer(QUESTION, max_tokens=ANSWER)
        assert torch.equal(torch.cat(seen), expected)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_a_system_prompt_of_the_users_stands_behind_the_video_too(folder):
    backbone = load_backbone(str(folder), device='cpu', layout='released', system_prompt='Be brief.')
    text = backbone._tokenizer.decode(backbone.tokenize_question('who?'))
    assert text == '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n'
    assert backbone.prefix().tokens == 0


def test_the_questions_own_tokens_are_known(backbone):
    asked = backbone.tokenize_question(QUESTION)
    assert backbone.decode(asked[backbone.question_slice(asked)]) == QUESTION


@pytest.mark.parametrize('policy', ['all', 'state', 'sparse(30)', 'retrieve(2)', 'last(2)'])
@pytest.mark.parametrize('positions', ['native', 'contiguous', 'lazy_shift'])
def test_every_answer_policy_works_without_a_prefix(policy, positions, backbone, frames):
    stream = watch(VideoStream(backbone.for_length(320), 'statekv(30)', positions=positions), frames[:14])
    assert stream.next_position == 14 * 19 and (stream.shift > 0) == (positions != 'native')
    answer = stream.answer(QUESTION, answer_policy=policy, max_tokens=3, evidence=99)
    assert answer.answer_tokens and sum(evidence.share for evidence in answer.evidence) == pytest.approx(1, abs=1e-4)


def test_layouts_that_cannot_be_are_named(folder, tmp_path):
    with pytest.raises(ParameterError, match="one of model, released, got 'paper'"):
        load_backbone(str(folder), device='cpu', layout='paper')
    for family in ('qwen3_vl', 'eagle2_5'):
        other = write_tiny_checkpoint(tmp_path / family, family=family)
        with pytest.raises(ParameterError, match=f"internvl alone.*{family}.*take the layout \"model\""):
            load_backbone(str(other), device='cpu', layout='released')
    with pytest.raises(ModelError, match="RoPE of type 'default'"):
        load_backbone(str(other), device='cpu').for_length(10**6)
