"""Answer policy sparse(n): which pages each layer, KV head and pass reads, and that nothing else is read."""
import pytest
import torch

from conftest import SECOND
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import PolicyError
from statekv_ros.memory import VideoStream, parse_answer_policy
from statekv_ros.memory.answering.choosing import PageChooser
from statekv_ros.memory.answering.decoding import Answering
from statekv_ros.memory.answering.notes import Notes
from statekv_ros.memory.answering.snapshot import take_snapshot
from statekv_ros.memory.detailed.held import HeldSteps, Records
from statekv_ros.memory.detailed.pages import HeldStep, Stretch
from statekv_ros.memory.detailed.step_rows import StepRows
from statekv_ros.memory.records import StepRecord

FAMILIES = ['qwen3_vl', 'qwen2_5_vl', 'internvl', 'llava_onevision', 'eagle2_5']
QUESTION = 'where did you last see the red toolbox?'
PAGE = 7


@pytest.fixture(scope='module')
def backbones(tmp_path_factory):
    base = tmp_path_factory.mktemp('sparse')
    return {family: load_backbone(str(write_tiny_checkpoint(base / family, family=family, max_position=300)),
                                  device='cpu', dtype='float32') for family in FAMILIES}


def stamp(index: int) -> int:
    return (index + 1) * SECOND


def stream_of(backbone, frames, count: int, **options) -> VideoStream:
    stream = VideoStream(backbone, 'statekv(30)', page_tokens=PAGE, **options)
    for index in range(count):
        stream.step(frames[index % len(frames)], stamp(index))
    return stream


def asked(stream: VideoStream, policy: str, **options) -> Answering:
    answering = stream.begin_answer(QUESTION, policy, **{'max_tokens': 4, 'evidence': 999, **options})
    while not answering.advance(5):
        pass
    return answering


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('positions', ['native', 'lazy_shift'])
def test_as_many_tokens_as_are_held_answer_as_all_does_to_the_bit(family, positions, backbones, frames):
    stream = stream_of(backbones[family], frames, 16, positions=positions)
    sparse, everything = (asked(stream, policy).result() for policy in (f'sparse({stream.detailed_tokens})', 'all'))
    assert sparse.token_ids == everything.token_ids and sparse.evidence == everything.evidence
    assert sparse.context_tokens == everything.context_tokens


class Spy:
    """Keeps what a chooser was asked and chose."""

    def __init__(self, monkeypatch):
        self.choices, choose = [], PageChooser.choose

        def spy(chooser, layer, rows):
            choices = choose(chooser, layer, rows)
            self.choices.append((layer, rows, *choices))    # one: none of these memories is in few bits
            return choices

        monkeypatch.setattr(PageChooser, 'choose', spy)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('count,positions', [(16, 'native'), (60, 'lazy_shift'), (60, 'contiguous')])
def test_pages_are_chosen_by_their_definition(family, count, positions, backbones, frames, monkeypatch):
    """From the keys themselves: every page's mean and variance before each row, one vote a row, the most votes within n tokens.

    The longer streams are past the positions that the model knows: far pages are scored where they are read.
    """
    backbone, spy = backbones[family], Spy(monkeypatch)
    stream = stream_of(backbone, frames, count, positions=positions)
    answering, budget = asked(stream, 'sparse(50)'), 50
    snapshot, table = answering._snapshot, stream.detailed.pages
    key = stream.detailed.rows()[0]
    seen, compared = set(), 0
    for layer, rows, choice in spy.choices:
        scores = []
        first_of = {}
        for step in snapshot.steps:
            first_of.setdefault(id(step.stretch), step.record.position)
            turned = backbone.rotate(rows, snapshot.turn(first_of[id(step.stretch)], step.stretch.shift))
            for start, length in zip(step.starts, step.lengths):
                page = key[layer, :, start:start + length]
                # Before a turn of the page's own, for the variance is told in the stretch's positions.
                page = backbone.rotate(page, step.stretch.shift - step.stretch.position)
                own = backbone.rotate(turned, step.stretch.shift - step.stretch.position)
                # The index has halves.
                mean, spread = page.mean(dim=1).half().float(), page.var(dim=1, correction=0).half().float()
                scores.append((own * mean[:, None]).sum(-1) + (own ** 2 * spread[:, None]).sum(-1) / 2
                              + torch.tensor(float(length)).log())
        votes = torch.softmax(torch.stack(scores, dim=-1), dim=-1).sum(dim=1)
        for head in range(backbone.layout.kv_heads):
            chosen = {int(page): int(length) for page, length in zip(choice.pages[head], choice.lengths[head]) if length}
            assert 0 < sum(chosen.values()) <= budget
            assert all(chosen[page] == int(table.lengths(slice(page, page + 1))) for page in chosen)
            left = votes[head].clone()
            worst = min(float(left[page - table.first]) for page in chosen)
            left[[page - table.first for page in chosen]] = -1
            assert worst >= float(left.max()) - 1e-4, 'a page with more votes was left out'
            seen.add((layer, head, *sorted(chosen)))
            compared += 1
    assert compared and len(seen) > backbone.layout.layers * backbone.layout.kv_heads, 'heads and passes choose for themselves'


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('count', [16, 60])
def test_an_answer_equals_dense_attention_over_what_was_chosen(family, count, backbones, frames, monkeypatch):
    """Each pass against softmax attention in float64 over prefix, chosen pages and tail, past the known positions too."""
    backbone, spy = backbones[family], Spy(monkeypatch)
    stream = stream_of(backbone, frames, count)
    answering = stream.begin_answer(QUESTION, 'sparse(40)', max_tokens=3)
    reading, snapshot = answering._reading, answering._snapshot
    attend, compared = type(reading).attend, []

    def checked(self, layer, query, key, value, scale):
        output = attend(self, layer, query, key, value, scale)
        _, rows, choice = spy.choices[-1]
        pool_key, pool_value, _ = stream.detailed.rows()
        tokens, own = query.shape[2], slice(self.tail.before, self.tail.next_place + query.shape[2])
        for head in range(key.shape[1]):
            keys, values = [], []
            for view in snapshot.views:
                keys.append(backbone.rotate(view.key[layer, head], -snapshot.turn(view.position, view.shift)))
                values.append(view.value[layer, head])
            moves = torch.zeros_like(choice.starts) if choice.moves is None else choice.moves
            for start, length, move in zip(choice.starts[head].tolist(), choice.lengths[head].tolist(), moves[head].tolist()):
                keys.append(backbone.rotate(pool_key[layer, head, start:start + length], move))
                values.append(pool_value[layer, head, start:start + length])
            keys.append(self.tail.key[layer, head, own])
            values.append(self.tail.value[layer, head, own])
            scores = rows[head].double() @ torch.cat(keys).double().T
            future = torch.ones(tokens, tokens, dtype=torch.bool).triu_(1).repeat(len(scores) // tokens, 1)
            scores[:, -tokens:].masked_fill_(future, float('-inf'))
            expected = torch.softmax(scores, dim=-1) @ torch.cat(values).double()
            ours = output.reshape(key.shape[1], -1, key.shape[-1])[head]
            assert (ours - expected).abs().max() < 1e-4
            compared.append(head)
        return output

    monkeypatch.setattr(type(reading), 'attend', checked)
    while not answering.advance(5):
        pass
    assert len(compared) > 10


def test_evidence_is_of_chosen_pages_and_adds_up(backbones, frames):
    for family in FAMILIES:
        stream = stream_of(backbones[family], frames, 40)
        result = asked(stream, 'sparse(40)').result()
        shares = [evidence.share for evidence in result.evidence]
        assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
        assert result.context_tokens == 40 + backbones[family].prefix().tokens
        assert result.frames_covered == 40


def test_a_time_span_cuts_pages(backbones, frames, monkeypatch):
    spy = Spy(monkeypatch)
    stream = stream_of(backbones['internvl'], frames, 30)
    result = asked(stream, 'sparse(30)', span=(stamp(5), stamp(12))).result()
    allowed = {page for step in stream.detailed.steps(lambda record: 5 <= record.step <= 12)
               for page in range(step.page, step.page + len(step.lengths))}
    for _, _, choice in spy.choices:
        assert set(choice.pages[choice.lengths > 0].tolist()) <= allowed
    assert (result.first_stamp_ns, result.last_stamp_ns) == (stamp(5), stamp(12))
    assert all(stamp(5) <= evidence.first_stamp_ns <= stamp(12) for evidence in result.evidence)


@pytest.mark.parametrize('family', FAMILIES)
def test_frames_that_come_meanwhile_change_nothing(family, backbones, frames):
    whole = asked(stream_of(backbones[family], frames, 41), 'sparse(40)').result()
    stream = stream_of(backbones[family], frames, 41)
    answering, index = stream.begin_answer(QUESTION, 'sparse(40)', max_tokens=4, evidence=999), 41
    while not answering.advance(5):
        for _ in range(6):
            stream.step(frames[index % 32], stamp(index))
            index += 1
    assert answering.result().token_ids == whole.token_ids
    assert [(e.first_stamp_ns, round(e.share, 4)) for e in answering.result().evidence] == \
        [(e.first_stamp_ns, round(e.share, 4)) for e in whole.evidence]


def test_a_span_touches_a_step_of_two_frames_that_it_begins_within(backbones, frames):
    stream = stream_of(backbones['qwen3_vl'], frames, 8)
    for policy in ('all', 'sparse(20)', 'retrieve(1)'):
        result = asked(stream, policy, span=(stamp(3), stamp(3))).result()
        assert (result.first_stamp_ns, result.last_stamp_ns) == (stamp(2), stamp(3))


def test_stamps_that_went_back_do_not_hide_the_newest_time_that_is_covered(backbones, frames):
    stream = stream_of(backbones['internvl'], frames, 10)
    for index in range(4):
        stream.step(frames[index], stamp(index) + 1)
    result = asked(stream, 'all').result()
    assert (result.first_stamp_ns, result.last_stamp_ns) == (stamp(0), stamp(9))


def test_an_answer_from_the_state_covers_what_was_forgotten_too(backbones, frames):
    backbone = backbones['internvl']
    bound = 10 * backbone.step_tokens(64, 64) * backbone.kv_bytes_per_token
    stream = stream_of(backbone, frames, 30, device_cache_bytes=bound)
    assert stream.forgotten_frames
    result = asked(stream, 'state').result()
    assert (result.frames_covered, result.first_stamp_ns) == (30, stamp(0))


def test_reading_the_question_and_an_answer_of_many_pages_take_no_more_operations_than_of_few(backbones, frames):
    """Launches, not seconds: each operation of torch is counted."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls = getattr(self, 'calls', 0) + 1
            return function(*args, **(kwargs or {}))

    counts = []
    for frames_seen in (40, 160):
        answering = stream_of(backbones['internvl'], frames, frames_seen, positions='native').begin_answer(
            QUESTION, 'sparse(40)', max_tokens=4)
        with Count() as count:
            while not answering.advance(5):
                pass
        counts.append(count.calls)
    assert counts[1] < 1.02 * counts[0], 'pages of unlike lengths cost a few masks, whatever their number'


@pytest.mark.parametrize('text', ['sparse', 'sparse()', 'sparse(0)', 'sparse(-1)', 'sparse(nan)', 'sparse(2.5)'])
def test_bad_sizes_are_named(text):
    with pytest.raises(PolicyError, match='sparse'):
        parse_answer_policy(text)


def test_a_snapshot_takes_no_pages_of_its_own(backbones, frames):
    """What a question of an hour reads is found by number: nothing of the memory's size is copied when it is asked."""
    stream = stream_of(backbones['internvl'], frames, 40)
    snapshot = take_snapshot(stream.seen(), parse_answer_policy('sparse(40)'), (None, None))
    assert [view.key.shape[2] for view in snapshot.views] == [backbones['internvl'].prefix().tokens]


def test_asking_takes_no_operation_per_step_held(backbones, frames):
    """From the question to its evidence: what would grow with the hours."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for frames_seen in (40, 160):
        stream = stream_of(backbones['internvl'], frames, frames_seen, positions='native')
        with Count() as count:
            answering = stream.begin_answer(QUESTION, 'sparse(40)', max_tokens=1)
        while not answering.advance(4):
            pass
        with count:
            answering.newest_evidence(3)
            answering.result()
        counts.append(count.calls)
    assert counts[0] == counts[1]


def test_evidence_looks_at_few_of_many_steps(monkeypatch):
    """Of pages by number, in steps that are many after hours."""
    rows, stretch, made, make = StepRows(9), Stretch(0, 0), [], StepRows.__getitem__
    for number in range(20_000):
        record = StepRecord(number, 0, 0, 0, 1, 18 * number, 18, 0, 18, 0, 0)
        rows.append(HeldStep(record, -1, stretch, 2 * number, (9, 9), None))
    monkeypatch.setattr(StepRows, '__getitem__', lambda self, index: made.append(index) or make(self, index))
    steps = HeldSteps(rows)
    notes = Notes(torch.device('cpu'), 0, steps)
    notes.begin()
    notes.add_pages(torch.tensor([[11, 39_999], [1400, 10]]), torch.tensor([[1.0, 2.0], [4.0, 1.0]]))
    assert [(each.step, each.share) for each in notes.newest_evidence(Records(steps), 9)] == [(700, .5), (5, .25), (19_999, .25)]
    assert len(made) < 20


def test_a_span_of_a_looped_stream_reads_and_names_nothing_between_its_two_halves(backbones, frames, monkeypatch):
    stream, spy = stream_of(backbones['internvl'], frames, 20), Spy(monkeypatch)
    for index in range(20):
        stream.step(frames[index], stamp(index))
    result = asked(stream, 'sparse(30)', span=(stamp(5), stamp(9))).result()
    assert result.frames_covered == 10
    assert result.evidence and all(stamp(5) <= step.first_stamp_ns <= stamp(9) for step in result.evidence)
    wanted = {page for step in stream.detailed.steps(lambda record: stamp(5) <= record.first_stamp_ns <= stamp(9))
              for page in range(step.page, step.page + len(step.lengths))}
    for _, _, choice in spy.choices:
        assert set(choice.pages[choice.lengths > 0].tolist()) <= wanted
