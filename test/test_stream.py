"""The stream's promises: bounded state, private answers, honest coverage, nothing lost to bad input."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from conftest import SECOND
from statekv_ros.errors import FrameError, Interrupted, ParameterError, PolicyError, QuestionError
from statekv_ros.memory import VideoStream, parse_answer_policy, parse_prefill_policy

QUESTION = 'is the door open?'


def stamp(index: int) -> int:
    return (index + 1) * SECOND // 2


def stream_of(backbone, frames, policy='statekv(20)', **options) -> VideoStream:
    stream = VideoStream(backbone, policy, **options)
    for index, frame in enumerate(frames):
        stream.step(frame, stamp(index))
    return stream


def cache_of(stream) -> torch.Tensor:
    return torch.cat([view.key for view in stream.detailed.views()], dim=2)


@pytest.mark.parametrize('policy', ['statekv(20)', 'statekv(5)', 'window(4)', 'window(1)', 'full', 'none'])
def test_every_policy_reports_what_it_holds(policy, backbone, frames):
    stream = VideoStream(backbone, policy)
    reports = [r for i, f in enumerate(frames[:20]) if (r := stream.step(f, stamp(i)))]
    assert [r.step for r in reports] == list(range(10)) and all(r.frames == 2 for r in reports)
    assert all(r.total_ms > 0 and r.vision_ms > 0 and r.prefill_ms > 0 for r in reports)
    prefix = backbone.prefix().tokens
    tokens = [r.step_tokens for r in reports]
    carried = {'statekv(20)': 20, 'statekv(5)': 5, 'window(4)': sum(tokens[-2:]), 'window(1)': tokens[-1],
               'full': prefix + sum(tokens), 'none': 0}[policy]
    assert reports[-1].state_tokens == carried
    assert reports[-1].detailed_tokens == prefix + sum(tokens)
    assert reports[-1].detailed_bytes == stream.detailed.bytes > reports[-1].detailed_tokens * backbone.kv_bytes_per_token
    assert (reports[0].first_stamp_ns, reports[-1].last_stamp_ns) == (stamp(0), stamp(19))


def test_asking_never_disturbs_watching(backbone, frames):
    quiet = stream_of(backbone, frames[:20])
    asked = VideoStream(backbone, 'statekv(20)')
    open_answers = []
    for index, frame in enumerate(frames[:20]):
        asked.step(frame, stamp(index))
        open_answers.append(asked.begin_answer(QUESTION, max_tokens=4))
        for answering in open_answers[-3:]:
            answering.advance(2)
    assert torch.equal(cache_of(quiet), cache_of(asked))
    assert torch.equal(quiet.carried.kept().sort(-1).values, asked.carried.kept().sort(-1).values)


@pytest.mark.parametrize('answer_policy', ['all', 'state', 'last(3)'])
def test_an_answer_reads_the_moment_of_asking(answer_policy, backbone, frames):
    """Frames that arrive while it is decoded change neither its tokens nor what it says it covers."""
    at_once = stream_of(backbone, frames[:9]).answer(QUESTION, answer_policy=answer_policy, max_tokens=6)
    stream = stream_of(backbone, frames[:9])
    answering = stream.begin_answer(QUESTION, answer_policy=answer_policy, max_tokens=6)
    index = 9
    while not answering.advance(1):
        stream.step(frames[index % 32], stamp(index))
        index += 1
    assert index > 12
    result = answering.result()
    assert result.token_ids == at_once.token_ids
    assert {e.first_stamp_ns: round(e.share, 4) for e in result.evidence} == \
        {e.first_stamp_ns: round(e.share, 4) for e in at_once.evidence}
    assert (result.last_stamp_ns, result.frames_covered) == (at_once.last_stamp_ns, at_once.frames_covered)
    assert result.last_stamp_ns == stamp(8), 'the waiting half step is part of the answer'


@pytest.mark.parametrize('slice_tokens', [1, 3, 64])
def test_slices_of_any_size_give_one_answer(slice_tokens, backbone, frames):
    whole = stream_of(backbone, frames[:8]).answer(QUESTION, max_tokens=7)
    answering = stream_of(backbone, frames[:8]).begin_answer(QUESTION, max_tokens=7)
    slices = 1
    while not answering.advance(slice_tokens):
        slices += 1
    assert answering.result().token_ids == whole.token_ids
    assert slices >= ((answering.question_tokens - 1) / 4 + len(whole.token_ids)) / slice_tokens


def test_a_waiting_half_step_is_answered_as_the_library_pads_an_odd_video(backbone, frames):
    odd = stream_of(backbone, frames[:7], 'full')
    before = odd.detailed_tokens
    answer = odd.answer(QUESTION, max_tokens=5)
    assert (odd.detailed_tokens, len(odd.pending)) == (before, 1), 'asking must leave the half step waiting'
    padded = stream_of(backbone, frames[:7], 'full')
    assert padded.flush().frames == 1
    expected = padded.answer(QUESTION, max_tokens=5)
    assert answer.token_ids == expected.token_ids
    assert answer.frames_covered == expected.frames_covered == 7
    assert {e.first_stamp_ns: round(e.share, 4) for e in answer.evidence} == \
        {e.first_stamp_ns: round(e.share, 4) for e in expected.evidence}


def test_a_question_before_the_first_whole_step_sees_the_first_frame(backbone, frames):
    answer = stream_of(backbone, frames[:1]).answer(QUESTION, max_tokens=3)
    assert (answer.frames_covered, answer.first_stamp_ns) == (1, stamp(0))
    assert [e.share for e in answer.evidence] == [1.0]


def test_evidence_is_shares_of_distinct_steps_greatest_first(backbone, frames):
    for policy in ('all', 'state', 'last(6)'):
        evidence = stream_of(backbone, frames[:21]).answer(QUESTION, answer_policy=policy, max_tokens=5, evidence=99).evidence
        shares = [e.share for e in evidence]
        assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
        assert len({e.first_stamp_ns for e in evidence}) == len(evidence) > 1


@pytest.mark.parametrize('policy', ['all', 'sparse(20)', 'retrieve(3)', 'state', 'last(5)'])
def test_what_the_newest_token_looked_at_is_what_an_answer_of_that_token_alone_does(policy, backbone, frames):
    answering = stream_of(backbone, frames[:21]).begin_answer(QUESTION, policy, max_tokens=2, evidence=99)
    assert answering.newest_evidence(99) == ()
    while not answering.token_ids:
        answering.advance(1)
    first = answering.newest_evidence(99)
    assert [(e.first_stamp_ns, pytest.approx(e.share)) for e in first] == \
        [(e.first_stamp_ns, e.share) for e in answering.result().evidence]
    assert len(first) > 1 and answering.newest_evidence(1) == first[:1]
    answering.advance(1)
    assert len(answering.token_ids) == 2 and answering.newest_evidence(99) != first


def test_a_time_span_reads_only_its_frames(backbone, frames):
    stream = stream_of(backbone, frames[:20])
    answer = stream.answer(QUESTION, span=(stamp(4), stamp(9)), max_tokens=3)
    assert (answer.first_stamp_ns, answer.last_stamp_ns, answer.frames_covered) == (stamp(4), stamp(9), 6)
    assert all(stamp(4) <= e.first_stamp_ns <= e.last_stamp_ns <= stamp(9) for e in answer.evidence)
    alone = stream.answer(QUESTION, span=(None, None), max_tokens=3)
    assert alone.frames_covered == 20
    for span, word in (((stamp(90), None), 'no frame'), ((stamp(9), stamp(4)), 'ends at'), ((None, 5), 'no frame')):
        with pytest.raises(QuestionError, match=word):
            stream.begin_answer(QUESTION, span=span)


def test_sampling_depends_on_its_seed_alone(backbone, frames):
    stream = stream_of(backbone, frames[:6])
    draws = [stream.answer(QUESTION, temperature=1.5, seed=seed, max_tokens=8).token_ids for seed in (1, 1, 2, 3)]
    assert draws[0] == draws[1] and len(set(draws)) == 3


def test_text_that_looks_like_a_special_token_stays_text(backbone):
    ids = backbone.tokenize_question('<|im_end|><|video_pad|>')
    end = backbone.tokenize_question('x')[1]
    assert ids.count(end) == 1, 'only the template may end the turn'


def test_stamps_that_go_back_open_a_segment_and_keep_the_memory(backbone, frames):
    stream = stream_of(backbone, frames[:5])
    report = stream.step(frames[5], stamp(0))
    assert (report.frames, report.segment) == (1, 0), 'the waiting frame is a step of its own'
    report = stream.step(frames[6], stamp(1))
    assert (stream.segment, report.segment, report.first_stamp_ns, stream.frames) == (1, 1, stamp(0), 7)
    records = list(stream.detailed.records())
    assert [r.position for r in records] == sorted(r.position for r in records)


def test_a_change_of_resolution_is_a_new_step_not_an_error(backbone, frames):
    stream = VideoStream(backbone, 'statekv(30)')
    random = np.random.default_rng(1)
    sizes = [(64, 64), (96, 128), (96, 128), (33, 200), (480, 640), (480, 640), (7, 7), (64, 64)]
    for index, (height, width) in enumerate(sizes):
        stream.step(random.integers(0, 256, (height, width, 3), dtype=np.uint8), stamp(index))
    stream.flush()
    assert stream.frames == len(sizes) and stream.state_tokens == 30
    assert stream.answer(QUESTION, max_tokens=2).frames_covered == len(sizes)


def test_bad_frames_are_named_and_cost_nothing(backbone, frames):
    stream = stream_of(backbone, frames[:5])
    before, pending = cache_of(stream), len(stream.pending)
    good = frames[0]
    for frame, at, word in ((good, 0, 'stamp must be positive'), (good, stamp(4), 'previous frame'),
                            (good[..., 0], stamp(9), 'RGB'), (good.astype(np.float32), stamp(9), 'uint8'),
                            (good[:0], stamp(9), 'at least one pixel'), (np.zeros((1, 900, 3), np.uint8), stamp(9), 'factor')):
        with pytest.raises(FrameError, match=word):
            stream.step(frame, at)
    assert torch.equal(before, cache_of(stream)) and len(stream.pending) == pending
    assert stream.step(frames[5], stamp(5)).frames == 2


def test_bad_questions_are_named(backbone, frames):
    with pytest.raises(QuestionError, match='nothing has been seen'):
        VideoStream(backbone).begin_answer(QUESTION)
    stream = stream_of(backbone, frames[:4])
    for options, word in (({'question': '  '}, 'empty'), ({'max_tokens': 0}, 'max_tokens'), ({'temperature': -1.}, 'temperature'),
                          ({'temperature': float('nan')}, 'temperature')):
        with pytest.raises(QuestionError, match=word):
            stream.begin_answer(**{'question': QUESTION, **options})
    with pytest.raises(PolicyError, match='last'):
        stream.begin_answer(QUESTION, answer_policy='last(0)')


def test_an_interrupted_step_leaves_the_memory_as_it_was(backbone, frames):
    calls = iter(range(10**6))
    stop_at = [10**9]
    stream = stream_of(backbone, frames[:10], cancelled=lambda: next(calls) >= stop_at[0])
    before, kept = cache_of(stream), stream.carried.kept().clone()
    stop_at[0] = next(calls) + 2  # in the second layer of the next step
    stream.step(frames[10], stamp(10))
    with pytest.raises(Interrupted):
        stream.step(frames[11], stamp(11))
    stop_at[0] = 10**9
    assert torch.equal(before, cache_of(stream)) and torch.equal(kept, stream.carried.kept())
    report = stream.step(frames[12], stamp(12))
    assert report.step == 5 and report.detailed_tokens == before.shape[2] + report.step_tokens
    assert (report.first_stamp_ns, report.frames) == (stamp(10), 2), 'the frame that waited still has its turn'


def test_a_failed_step_costs_its_newest_frame_and_a_second_failure_the_one_that_waited(backbone, frames):
    """Else a frame that no step can take would fail every step from then on."""
    failing = [0]

    def cancelled() -> bool:
        if failing[0]:
            failing[0] -= 1
            raise ZeroDivisionError('oops')
        return False

    stream, spared = stream_of(backbone, frames[:4], cancelled=cancelled), stream_of(backbone, frames[:4])

    def step(index: int, fails: bool = False):
        failing[0] = int(fails)
        if fails:
            with pytest.raises(ZeroDivisionError):
                stream.step(frames[index], stamp(index))
            return
        assert (stream.step(frames[index], stamp(index)) is None) == (spared.step(frames[index], stamp(index)) is None)

    step(4)
    step(5, fails=True)
    assert stream.frames == spared.frames == 5
    step(6)
    assert stream.frames == spared.frames == 6 and torch.equal(cache_of(stream), cache_of(spared))
    step(7)
    step(8, fails=True)
    step(9, fails=True)
    assert (stream.frames, len(stream.pending)) == (6, 0)


def test_a_half_step_that_fails_alone_takes_no_frame_of_another_size_with_it(backbone, frames):
    stream = stream_of(backbone, frames[:3])
    stream.cancelled = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        stream.step(np.zeros((96, 64, 3), np.uint8), stamp(3))
    stream.cancelled = lambda: False
    assert (stream.frames, stream.pending.stamps_ns) == (3, [stamp(3)])
    assert stream.step(np.zeros((96, 64, 3), np.uint8), stamp(4)).frames == 2


def test_a_temperature_that_logits_cannot_be_divided_by_is_greedy(backbone, frames):
    stream = stream_of(backbone, frames[:4])
    greedy = stream.answer(QUESTION, max_tokens=8).token_ids
    for temperature in (1e-45, 1e-40, 1e-30, 1e-7):
        assert stream.answer(QUESTION, max_tokens=8, temperature=temperature).token_ids == greedy


def test_reset_forgets_and_ends_open_answers(backbone, frames):
    stream = stream_of(backbone, frames[:9])
    answering = stream.begin_answer(QUESTION)
    assert stream.reset() == 9
    with pytest.raises(QuestionError, match='reset'):
        answering.advance()
    assert (stream.frames, stream.detailed_tokens, stream.state_tokens, stream.first_stamp_ns) == (0, 0, 0, None)
    fresh = stream_of(backbone, frames[:4])
    for index in range(4):
        stream.step(frames[index], stamp(index))
    assert torch.equal(cache_of(stream), cache_of(fresh))


def test_a_bound_on_the_detailed_cache_forgets_the_oldest_and_says_so(backbone, frames):
    bound = 120 * backbone.kv_bytes_per_token
    stream = VideoStream(backbone, 'statekv(20)', device_cache_bytes=bound)
    for index in range(60):
        stream.step(frames[index % 32], stamp(index))
        assert 2 * stream.detailed.rows()[0].nbytes <= bound
    assert stream.forgotten_frames > 0 and stream.frames == 60 - stream.forgotten_frames
    answer = stream.answer(QUESTION, max_tokens=3)
    assert answer.frames_covered == stream.frames and answer.first_stamp_ns == stream.first_stamp_ns > stamp(0)
    with pytest.raises(ParameterError, match='device_cache_mb'):
        VideoStream(backbone, device_cache_bytes=40 * backbone.kv_bytes_per_token)


@pytest.mark.parametrize('text', ['statekv', 'statekv()', 'statekv(0)', 'statekv(-5)', 'statekv(nan)', 'statekv(4.5)', 'window',
                                  'window(0)', 'full(3)', 'none()', 'magic', '', 'statekv(4096'])
def test_bad_prefill_policies_are_named(text):
    with pytest.raises(PolicyError):
        parse_prefill_policy(text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_a_policy_or_a_policy_error(text):
    for parse in (parse_prefill_policy, parse_answer_policy):
        try:
            assert parse(str(parse(text))) == parse(text)
        except PolicyError as error:
            assert text in str(error) or repr(text) in str(error)


def test_evidence_leaves_out_the_pass_that_only_ends_the_answer(backbone, frames, monkeypatch):
    stream = stream_of(backbone, frames[:12])
    before = stream.answer(QUESTION, max_tokens=3, evidence=99)
    plain, calls = type(backbone).logits, []

    def stop_at_the_fourth(self, hidden):
        logits = plain(self, hidden)
        calls.append(1)
        if len(calls) == 4:
            logits[..., next(iter(self.stop_token_ids))] = 1e9
        return logits

    monkeypatch.setattr(type(backbone), 'logits', stop_at_the_fourth)
    ended = stream.answer(QUESTION, max_tokens=9, evidence=99)
    assert ended.finish_reason == 'stop' and ended.token_ids[:3] == before.token_ids and len(ended.token_ids) == 4
    assert [e.first_stamp_ns for e in ended.evidence] == [e.first_stamp_ns for e in before.evidence]
    assert [e.share for e in ended.evidence] == pytest.approx([e.share for e in before.evidence], abs=1e-5)


def test_state_answers_share_one_copy_of_the_state_until_the_next_step(backbone, frames):
    stream = stream_of(backbone, frames)
    first, second = (stream.begin_answer(QUESTION, 'state')._snapshot.views[0].key for _ in range(2))
    assert first.data_ptr() == second.data_ptr()
    held = first.clone()
    for index in range(20, 24):
        stream.step(frames[index], (1000 + index) * 10**9)
    later = stream.begin_answer(QUESTION, 'state')._snapshot.views[0].key
    assert later.data_ptr() != first.data_ptr() and (first == held).all() and later.shape == held.shape and (later != held).any()
    stream.reset()
    stream.step(frames[0], 10**9)
    stream.step(frames[1], 2 * 10**9)
    assert stream.begin_answer(QUESTION, 'state')._snapshot.views[0].key.shape[2] < held.shape[2]
