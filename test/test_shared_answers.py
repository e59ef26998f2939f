"""Answers that are decoded together are those that would have been decoded one by one, and the weights are read once for all."""
import warnings

import pytest
import torch

from conftest import SECOND
from family_libraries import LIBRARIES
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.bench.in_turn import WeightReads
from statekv_ros.errors import Code, Interrupted
from statekv_ros.memory import VideoStream
from statekv_ros.memory.answering.shared import decode_together

QUESTIONS = ('is the door open?', 'where did you last see the red toolbox?', 'what is on the table now?', 'who came by?')
READ = 6     # a slice of a question's, in tokens of an answer's
POLICIES = ('sparse(40)', 'all', 'last(3)', 'state', 'retrieve(3)')


@pytest.fixture(scope='module')
def backbones(tmp_path_factory):
    base = tmp_path_factory.mktemp('shared')
    return {family: load_backbone(str(write_tiny_checkpoint(base / family, family=family)), device='cpu', dtype='float32')
            for family in LIBRARIES}


@pytest.fixture
def endless(monkeypatch):
    """A backbone whose answers are as long as they may be."""
    def make(backbone):
        monkeypatch.setattr(backbone, 'stop_token_ids', frozenset())
        return backbone
    return make


class Camera:
    """A stream and what it sees."""

    def __init__(self, backbone, frames, count: int, **options):
        self.stream, self._frames = VideoStream(backbone, 'statekv(40)', **options), frames
        self.watch(count)

    def watch(self, count: int = 1) -> None:
        for _ in range(count):
            number = self.stream.frames
            self.stream.step(self._frames[number % len(self._frames)], (number + 1) * SECOND // 2)

    def asked(self, question: str, policy: str, **options):
        """An answer that keeps its tokens' logits in `said`."""
        answering = self.stream.begin_answer(question, policy, **{'max_tokens': 8, 'evidence': 99, **options})
        answering.said, take = [], answering.take
        answering.take = lambda token, logits: (answering.said.append(logits.clone()), take(token, logits))
        return answering


def decoded(answerings, between=lambda: None, tokens=1) -> list[int]:
    """All of them to their ends, those that can at once, a question read in slices of its own. How many shared each slice."""
    shared = []
    while any(not each.finish_reason for each in answerings):
        if reading := [each for each in answerings if not each.finish_reason and not each.is_decoding]:
            reading[0].advance(READ)
        if rows := [each for each in answerings if each.is_decoding]:
            assert decode_together(rows, tokens) == [None] * len(rows)
            shared.append(len(rows))
        between()
    return shared


def assert_alike(ours, alone) -> None:
    got, right = ours.result(), alone.result()
    assert (got.token_ids, got.text, got.finish_reason, got.context_tokens, got.frames_covered) == \
        (right.token_ids, right.text, right.finish_reason, right.context_tokens, right.frames_covered)
    for said, expected in zip(ours.said, alone.said, strict=True):
        assert (said - expected).norm() <= 1e-5 * expected.norm()
    for evidence, expected in ((got.evidence, right.evidence), (ours.newest_evidence(9), alone.newest_evidence(9))):
        assert {each.first_stamp_ns: each.share for each in evidence} == \
            pytest.approx({each.first_stamp_ns: each.share for each in expected}, abs=1e-5)


@pytest.mark.parametrize('family, form, count, tokens', [
    *((family, 'bf16', 4, 1) for family in LIBRARIES), ('qwen3_vl', 'int4', 3, 3), ('internvl', 'int4', 2, 4)])
def test_words_logits_and_evidence_are_those_of_one_by_one_while_streams_go_on(form, count, tokens, family, backbones, frames,
                                                                              endless):
    backbone = endless(backbones[family])
    cameras = [Camera(backbone, frames, seen, detailed_format=form) for seen in (17, 26)]
    lengths = [6 + 5 * (count - 1 - number) for number in range(count)]

    def asked() -> list:
        """Each camera under several policies; of several lengths, so that one after the other leaves."""
        return [cameras[number % 2].asked(QUESTIONS[number], POLICIES[(number + 2 * (count == 3)) % 5], seed=number,
                                          temperature=0.8 * (number == 1), max_tokens=lengths[number]) for number in range(count)]

    alone, ours = asked(), asked()
    for each in alone:
        while not each.advance(1 if each.is_decoding else READ):
            pass
    # What is read exactly by those alone would be in few bits later.
    shared = decoded(ours, lambda: [camera.watch() for camera in cameras if form == 'bf16'], tokens)
    assert max(shared) == count and min(shared) < count and [len(each.said) for each in ours] == lengths
    for pair in zip(ours, alone):
        assert_alike(*pair)


@pytest.mark.parametrize('family', ['qwen3_vl', 'internvl'])
def test_weights_are_read_once_a_token_however_many_questions_there_are(family, backbones, frames, endless):
    camera, reads = Camera(endless(backbones[family]), frames, 12), {}
    for count in (1, 2, 4):
        answerings = [camera.asked(question, policy) for question, policy in zip(QUESTIONS[:count], POLICIES)]
        for each in answerings:
            while not each.token_ids:
                each.advance(1)
        with WeightReads(camera.stream.backbone.model) as counted:
            assert decode_together(answerings, 1) == [None] * count
        reads[count] = counted.launches, counted.bytes
        with WeightReads(camera.stream.backbone.model) as one_by_one:
            for each in answerings:
                each.advance(1)
        assert (one_by_one.launches, one_by_one.bytes) == (count * reads[1][0], count * reads[1][1])
    assert len(set(reads.values())) == 1 and reads[1][0] > 7 * camera.stream.backbone.layout.layers


def test_a_slice_is_so_many_tokens_of_all_together_and_at_least_one_of_each(backbone, frames, endless):
    camera = Camera(endless(backbone), frames, 8)
    for count, tokens, expected in ((4, 1, 1), (4, 3, 1), (3, 7, 2), (2, 8, 4), (1, 5, 5)):
        answerings = [camera.asked(question, 'last(2)', max_tokens=50) for question in QUESTIONS[:count]]
        for each in answerings:
            while not each.is_decoding:
                each.advance(1)
        before = [len(each.token_ids) for each in answerings]
        decode_together(answerings, tokens)
        assert [len(each.token_ids) - had for each, had in zip(answerings, before)] == [expected] * count


def test_one_that_is_ended_or_whose_memory_was_reset_leaves_the_others(backbone, frames, endless):
    first, second = (Camera(endless(backbone), frames, seen) for seen in (12, 16))
    asked = [first.asked(QUESTIONS[0], 'all'), second.asked(QUESTIONS[1], 'sparse(40)'), second.asked(QUESTIONS[2], 'last(3)')]
    alone = [second.asked(QUESTIONS[1], 'sparse(40)'), second.asked(QUESTIONS[2], 'last(3)')]
    for each in (*asked, *alone):
        while not each.is_decoding:
            each.advance(1)
    assert decode_together(asked, 6) == [None] * 3
    first.stream.reset()
    errors = decode_together(asked, 3)
    assert errors[1:] == [None] * 2 and errors[0].code is Code.MEMORY_RESET
    said = len(asked[0].token_ids)
    asked[2].finish('canceled')
    while not asked[1].finish_reason:
        decode_together([each for each in asked if each.is_decoding and each is not asked[0]], 1)
    assert len(asked[0].token_ids) == said and asked[2].result().finish_reason == 'canceled'
    for each in alone:
        while not each.advance(1):
            pass
    assert_alike(asked[1], alone[0])
    assert asked[2].token_ids == alone[1].token_ids[:len(asked[2].token_ids)] and asked[2].token_ids


@pytest.mark.parametrize('whose', ['one', 'nobody'])
def test_a_pass_that_fails_is_done_one_by_one_and_costs_only_the_one_at_fault(whose, backbone, frames, endless, monkeypatch):
    camera = Camera(endless(backbone), frames, 16)
    ours, alone = ([camera.asked(question, policy) for question, policy in zip(QUESTIONS, POLICIES)] for _ in range(2))
    for each in (*ours, *alone):
        while not each.is_decoding:
            each.advance(1)
    at_fault = ours[2]._reading
    attend, layers = at_fault.attend, []

    def broken(layer, *arguments):
        layers.append(layer)
        if layer == 1 and (whose == 'one' or len(layers) == 2):
            raise ZeroDivisionError('oops')
        return attend(layer, *arguments)

    monkeypatch.setattr(at_fault, 'attend', broken)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        errors = decode_together(ours, 4)
    failed = {2} if whose == 'one' else set()
    assert {number for number, error in enumerate(errors) if error is not None} == failed
    assert [str(each.message) for each in told] == ([] if failed else [
        'answers were decoded one by one, which is slower: ZeroDivisionError: oops'])
    for number, (each, right) in enumerate(zip(ours, alone)):
        if number in failed:
            assert each.token_ids == [] and isinstance(errors[number], ZeroDivisionError)
            continue
        while not right.advance(1):
            pass
        while not each.finish_reason:
            decode_together([each], 1)
        assert_alike(each, right)


def test_an_answer_that_the_model_ends_leaves_with_the_evidence_that_it_has_alone(backbone, frames, monkeypatch):
    camera, ends = Camera(backbone, frames, 16), 4
    free = [camera.asked(question, policy, max_tokens=20) for question, policy in zip(QUESTIONS, POLICIES)]
    for each in free:
        while not each.advance(1 if each.is_decoding else READ):
            pass
    monkeypatch.setattr(backbone, 'stop_token_ids', frozenset(free[1].token_ids[ends:ends + 1]))
    alone, ours = ([camera.asked(question, policy, max_tokens=20) for question, policy in zip(QUESTIONS, POLICIES)]
                   for _ in range(2))
    for each in alone:
        while not each.advance(1 if each.is_decoding else READ):
            pass
    decoded(ours)
    assert ours[1].finish_reason == 'stop' and 1 < len(ours[1].token_ids) <= ends + 1
    for pair in zip(ours, alone):
        assert_alike(*pair)


def test_numbers_that_are_not_finite_fail_the_one_that_has_them(backbone, frames, endless, monkeypatch):
    camera, logits = Camera(endless(backbone), frames, 12), type(backbone).logits
    asked = [camera.asked(question, 'last(3)') for question in QUESTIONS[:3]]
    for each in asked:
        while not each.is_decoding:
            each.advance(1)
    monkeypatch.setattr(type(backbone), 'logits', lambda self, hidden: logits(self, hidden).index_fill(
        0, torch.tensor([1]), float('nan')))
    errors = decode_together(asked, 3)
    assert [error is None for error in errors] == [True, False, True] and 'not finite' in str(errors[1])
    assert [len(each.token_ids) for each in asked] == [1, 0, 1]


def test_who_cannot_share_is_told_apart_and_an_interruption_ends_all(backbone, backbones, frames):
    stop = []
    camera = Camera(backbone, frames, 12, cancelled=lambda: bool(stop))
    other = Camera(backbones['internvl'], frames, 12)
    mine, theirs = camera.asked(QUESTIONS[0], 'all'), camera.asked(QUESTIONS[1], 'state')
    foreign, unread = other.asked(QUESTIONS[0], 'all'), camera.asked(QUESTIONS[0], 'all')
    for each in (mine, theirs, foreign):
        while not each.is_decoding:
            each.advance(1)
    assert mine.shares_with(theirs) and not any(map(mine.shares_with, (foreign, unread)))
    stop.append(True)
    with pytest.raises(Interrupted):
        decode_together([mine, theirs], 2)
