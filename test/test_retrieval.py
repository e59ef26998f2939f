"""Answer policy retrieve(k): which frame steps each layer reads, and from where."""
import pytest
import torch

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import PolicyError
from statekv_ros.memory import VideoStream, parse_answer_policy

FAMILIES = ['qwen3_vl', 'qwen2_5_vl', 'internvl', 'llava_onevision', 'eagle2_5']
QUESTION = 'where did you last see the red toolbox?'


@pytest.fixture(scope='module')
def backbones(tmp_path_factory):
    base = tmp_path_factory.mktemp('retrieval')
    return {family: load_backbone(str(write_tiny_checkpoint(base / family, family=family, max_position=300)),
                                  device='cpu', dtype='float32') for family in FAMILIES}


def stamp(index: int) -> int:
    return (index + 1) * SECOND


def stream_of(backbone, frames, count: int, policy: str = 'statekv(30)', **options) -> VideoStream:
    stream = VideoStream(backbone, policy, **options)
    for index in range(count):
        stream.step(frames[index % len(frames)], stamp(index))
    return stream


def finished(stream: VideoStream, policy: str, tokens: int = 64, **options):
    answering = stream.begin_answer(QUESTION, policy, **{'max_tokens': 4, 'evidence': 99, **options})
    while not answering.advance(tokens):
        pass
    return answering


def logits_of(stream: VideoStream, policy: str, monkeypatch) -> torch.Tensor:
    logits = []
    with monkeypatch.context() as patch:
        project = stream.backbone.logits
        patch.setattr(stream.backbone, 'logits', lambda hidden: logits.append(project(hidden)) or logits[-1])
        finished(stream, policy, max_tokens=3)
    return torch.stack(logits)


class BeforeRotation:
    """What the model's own layers compute before they rotate it: keys or queries [tokens, heads, head_dim] per layer."""

    def __init__(self, backbone, kind: str):
        self.calls = []         # per forward pass, a list with one tensor per layer
        self._handles = []
        head_dim = backbone.layout.head_dim
        for index, layer in enumerate(backbone._language.layers):
            attention = layer.self_attn
            last = getattr(attention, f'{kind}_norm', None) or getattr(attention, f'{kind}_proj')

            def note(module, args, output, index=index):
                if index == 0:
                    self.calls.append([])
                self.calls[-1].append(output.reshape(-1, output.numel() // head_dim // output.shape[1], head_dim).double())

            self._handles.append(last.register_forward_hook(note))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize('positions', ['native', 'contiguous', 'lazy_shift'])
@pytest.mark.parametrize('family', FAMILIES)
def test_each_layer_chooses_by_the_definition(family, positions, backbones, frames):
    """Mean keys and mean query before rotation, from the model's own projections; plain loops in float64."""
    backbone, k = backbones[family], 3
    with BeforeRotation(backbone, 'k') as keys:
        stream = stream_of(backbone, frames, 44, positions=positions)
    assert positions == 'native' or family == 'qwen2_5_vl' or stream.shift > 0
    steps = keys.calls[-stream.steps:]
    with BeforeRotation(backbone, 'q') as queries:
        answering = finished(stream, f'retrieve({k})')
    asked = backbone.tokenize_question(QUESTION)
    own = asked[backbone.question_slice(asked)]
    assert backbone.decode(own) == QUESTION
    begin = backbone.question_slice(asked).start
    differ = set()
    for layer in range(backbone.layout.layers):
        query = queries.calls[0][layer][begin:begin + len(own)].mean(0)
        group = query.shape[0] // backbone.layout.kv_heads
        scores = []
        for step in steps:
            score = 0.0
            for head in range(query.shape[0]):
                mean = sum(step[layer][token, head // group] for token in range(len(step[layer]))) / len(step[layer])
                score += float(query[head] @ mean)
            scores.append(score)
        expected = sorted(sorted(range(len(steps)), key=lambda step: (-scores[step], step))[:k])
        assert answering._retrieval.chosen[layer] == expected, layer
        differ.add(tuple(expected))
    if family == 'qwen3_vl':
        assert len(differ) > 1, 'layers should be free to differ'


@pytest.mark.parametrize('family', [family for family in FAMILIES if family != 'qwen2_5_vl'])
@pytest.mark.parametrize('positions', ['native', 'contiguous'])
def test_all_steps_retrieved_equal_all(family, positions, backbones, frames, monkeypatch):
    """Where every step is taken and none was evicted, placing them one behind the other changes nothing.

    Qwen2.5-VL's steps have time between them, which retrieval closes.
    """
    stream = stream_of(backbones[family], frames, 8, 'statekv(unlimited)', positions=positions)
    everything, retrieved = (logits_of(stream, policy, monkeypatch) for policy in ('all', f'retrieve({stream.steps + 5})'))
    assert stream.steps >= 4 and (everything - retrieved).abs().max() < 1e-4
    fewer = logits_of(stream, 'retrieve(1)', monkeypatch)
    assert (everything[0] - fewer[0]).abs().max() > 1e-3, 'else this would prove nothing'


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('positions', ['native', 'lazy_shift'])
def test_what_is_retrieved_stands_right_before_the_question(family, positions, backbones, frames):
    stream = stream_of(backbones[family], frames, 40, positions=positions)
    answering = finished(stream, 'retrieve(3)')
    here = stream.next_position - stream.shift
    records = {record.first_ordinal: record for record in stream.detailed.records()}
    for layer, chosen in answering._retrieval.chosen.items():
        distance = 0
        for part in reversed(answering._reading._parts[layer]):
            first, last = part.view.ordinal[[0, -1]].tolist()
            inside = [record for ordinal, record in records.items() if first <= ordinal <= last]
            extent = sum(record.next_position - record.position for record in inside)
            distance += extent or backbones[family].prefix().tokens
            assert here + part.turn - (part.view.position - part.view.shift) == distance
            chosen = [step for step in chosen if step not in {record.step for record in inside}]
        assert chosen == []


def test_only_what_was_retrieved_is_evidence(backbones, frames):
    stream = stream_of(backbones['qwen3_vl'], frames, 40)
    answering = finished(stream, 'retrieve(2)')
    records = {record.step: record for record in stream.detailed.records()}
    chosen = {records[step].first_stamp_ns for steps in answering._retrieval.chosen.values() for step in steps}
    result = answering.result()
    assert {evidence.first_stamp_ns for evidence in result.evidence} == chosen and len(chosen) < stream.steps
    assert sum(evidence.share for evidence in result.evidence) == pytest.approx(1)
    assert result.answer_policy == 'retrieve(2)'
    prefix = stream.backbone.prefix().tokens
    assert prefix < result.context_tokens <= prefix + 2 * max(record.tokens for record in records.values())


def test_a_time_span_bounds_what_can_be_retrieved(backbones, frames):
    stream = stream_of(backbones['internvl'], frames, 20)
    answering = finished(stream, 'retrieve(3)', span=(stamp(5), stamp(12)))
    for chosen in answering._retrieval.chosen.values():
        assert len(chosen) == 3 and all(5 <= step <= 12 for step in chosen)
    result = answering.result()
    assert (result.first_stamp_ns, result.last_stamp_ns, result.frames_covered) == (stamp(5), stamp(12), 8)


def test_ties_go_to_the_earlier_step(backbones, frames):
    stream = stream_of(backbones['internvl'], frames, 20)
    for step in stream.detailed.steps(lambda record: True):
        step.mean = torch.ones_like(stream.detailed.mean_key(step))
    assert set(map(tuple, finished(stream, 'retrieve(4)')._retrieval.chosen.values())) == {(0, 1, 2, 3)}


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('tokens', [1, 3])
def test_slices_and_frames_that_come_meanwhile_change_nothing(family, tokens, backbones, frames):
    whole = finished(stream_of(backbones[family], frames, 41), 'retrieve(2)').result()
    stream, index = stream_of(backbones[family], frames, 41), 41
    answering = stream.begin_answer(QUESTION, 'retrieve(2)', max_tokens=4, evidence=99)
    while not answering.advance(tokens):
        for _ in range(6):
            stream.step(frames[index % 32], stamp(index))
            index += 1
    assert answering.result().token_ids == whole.token_ids
    assert [(e.first_stamp_ns, round(e.share, 5)) for e in answering.result().evidence] == \
        [(e.first_stamp_ns, round(e.share, 5)) for e in whole.evidence]


@pytest.mark.parametrize('answer_policy', ['retrieve(2)', 'all', 'sparse(30)', 'last(30)'])
def test_what_is_overwritten_meanwhile_is_not_read_any_more(answer_policy, backbones, frames, monkeypatch):
    """A bound of 20 steps, and 60 new ones while the answer is decoded: what it read at first is gone, and no newer frame shows."""
    backbone = backbones['internvl']
    bound = 20 * backbone.step_tokens(64, 64) * backbone.kv_bytes_per_token
    stream = stream_of(backbone, frames, 40, device_cache_bytes=bound)
    answering = stream.begin_answer(QUESTION, answer_policy, max_tokens=6, evidence=99)
    for index in range(40, 100):
        stream.step(frames[index % 32], stamp(index))
        if index % 4 == 0:
            answering.advance(2)
    assert stream.detailed.overwritten > answering._seen.ordinal
    poisoned = stream.detailed.rows()
    with torch.inference_mode():
        poisoned[0].fill_(float('nan'))
    while not answering.advance(2):
        pass
    assert len(answering.token_ids) == 6 or answering.finish_reason == 'stop'
    assert torch.isfinite(torch.tensor([evidence.share for evidence in answering.result().evidence])).all()


def test_a_question_before_the_first_whole_step_reads_the_waiting_frame(backbones, frames):
    result = finished(stream_of(backbones['qwen3_vl'], frames, 1), 'retrieve(2)').result()
    assert (result.frames_covered, [e.share for e in result.evidence]) == (1, [1.0])


@pytest.mark.parametrize('argument', ['', '()', '(0)', '(-1)', '(2.5)', '(many)'])
def test_bad_arguments_are_named(argument):
    with pytest.raises(PolicyError, match='retrieve'):
        parse_answer_policy(f'retrieve{argument}')
    assert str(parse_answer_policy(' retrieve( 64 ) ')) == 'retrieve(64)'
