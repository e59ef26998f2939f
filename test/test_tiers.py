"""Steps that leave the device for a tier below it are read as if they had stayed, a few at a time where little is staged."""
import pytest
import torch

from statekv_ros.memory import VideoStream
from statekv_ros.memory.detailed import staging
from statekv_ros.memory.detailed.cache import EXACT_STEPS
from statekv_ros.memory.detailed.formats import find_format
from statekv_ros.memory.detailed.staging import Staging
from statekv_ros.memory.detailed.step_rows import StepRows
from test_packed_memory import FAMILIES, PAGE, QUESTION, backbones, held, logits_of, stamp, stream_of  # noqa: F401

FORMATS = ['bf16', 'int8', 'int4']
STEPS = {'bf16': 60, 'int8': 120, 'int4': 160}     # frames
POLICIES = ('all', 'sparse(45)', 'sparse(10)', 'last(12)', 'retrieve(3)')


class Below:
    """A tier that has what it is given, until it is told otherwise; what `Disk` and the store are in a node."""
    as_computed = False

    def __init__(self):
        self.steps: dict[int, dict[str, torch.Tensor]] = {}
        self.broken: set[int] = set()
        self.host = None
        self._gone: list[int] = []
        self.reads = self.calls = 0

    def holds(self, step):
        if self.host and self.host.holds(step):
            self.steps.setdefault(step, self.host._steps[step])
        return step in self.steps

    def runs(self, part, steps, extents):
        self.reads, self.calls = self.reads + len(steps), self.calls + (part == 'packed')
        return [None if step in self.broken else self._runs(self.steps[step][part], *extent)
                for step, extent in zip(steps, extents, strict=True)]

    def _runs(self, whole, size, runs):
        assert whole.nbytes == size
        whole = whole.flatten().view(torch.uint8).numpy()
        return b''.join(whole[run].tobytes() for run in runs)

    def gone(self):
        gone, self._gone = self._gone, []
        return gone

    def forget(self, *steps):
        for step in steps:
            del self.steps[step]
            self._gone.append(step)

    def clear(self):
        self.steps.clear()

    def takes(self, stream):
        """From now on every step that leaves the device arrives here."""
        self.host = stream.detailed.far.host


def small(backbone, frames, form, positions='', below=None, host_cache_bytes=2**40, takes=True):
    """A stream that has room on the device for its exact steps and about as many bytes again."""
    step = max(record.tokens for record in stream_of(backbone, frames, 4, form).detailed.records())
    stream = VideoStream(backbone, 'statekv(20)', detailed_format=form, positions=positions, page_tokens=PAGE,
                         host_cache_bytes=host_cache_bytes, below=[below] if below else [],
                         device_cache_bytes=(EXACT_STEPS + 2) * 4 * step * backbone.layout.bytes_per_token * 4 // 6)
    if below and takes:
        below.takes(stream)
    see(stream, frames, 0, STEPS[form])
    return stream


def see(stream, frames, begin, end):
    for index in range(begin, end):
        stream.step(frames[index % 32], stamp(index))


@pytest.mark.parametrize('positions, form, family', [
    *(('lazy_shift', form, family) for form in FORMATS for family in FAMILIES), ('native', 'int4', 'qwen3_vl'),
    ('contiguous', 'int4', 'eagle2_5'), ('contiguous', 'bf16', 'internvl')])
def test_an_answer_is_the_same_wherever_the_steps_are(positions, form, family, backbones, frames, monkeypatch):  # noqa: F811
    backbone = backbones[family]
    stream = small(backbone, frames, form, positions)
    whole = stream_of(backbone, frames, STEPS[form], form, positions=positions)
    assert len(stream.detailed.far.steps) > 10
    assert stream.detailed_tokens == whole.detailed_tokens and not stream.forgotten_frames
    for policy in POLICIES:
        ours, right = (s.begin_answer(QUESTION, policy, max_tokens=4, evidence=999) for s in (stream, whole))
        difference = (logits_of(ours, monkeypatch) - logits_of(right, monkeypatch)).abs().max()
        assert difference < 1e-4, (policy, difference)
        assert ours.token_ids == right.token_ids
        shares = [{e.first_stamp_ns: e.share for e in answering.result().evidence} for answering in (ours, right)]
        assert shares[0] == pytest.approx(shares[1], abs=1e-4)
        assert ours.result().frames_covered == right.result().frames_covered
    assert stream.detailed.far.bytes


@pytest.mark.parametrize('form', FORMATS)
def test_pages_are_read_a_few_at_a_time_where_little_is_staged(form, backbones, frames, monkeypatch):  # noqa: F811
    backbone = backbones['internvl']
    stream, whole = small(backbone, frames, form), stream_of(backbone, frames, STEPS[form], form)
    stream.detailed.far._staging_bytes = 0
    for policy in POLICIES:
        ours, right = (s.begin_answer(QUESTION, policy, max_tokens=4, evidence=999) for s in (stream, whole))
        assert (logits_of(ours, monkeypatch) - logits_of(right, monkeypatch)).abs().max() < 1e-4, policy
        shares = [{e.first_stamp_ns: e.share for e in answering.result().evidence} for answering in (ours, right)]
        assert shares[0] == pytest.approx(shares[1], abs=1e-4)
    assert stream.detailed.far.staging.slots == 1


@pytest.mark.parametrize('form', FORMATS)
def test_rows_that_were_never_written_are_not_read(form, backbones, frames, monkeypatch):  # noqa: F811
    """Staging is not cleared: where a bound is large that would take as long as many frames."""
    backbone, empty = backbones['internvl'], torch.empty
    stream, whole = small(backbone, frames, form), stream_of(backbone, frames, STEPS[form], form)
    monkeypatch.setattr(staging.torch, 'empty', lambda *shape, dtype, device: empty(*shape, dtype=dtype, device=device).fill_(
        255 if dtype == torch.uint8 else 2**31 - 1))
    stream.detailed.far._staging_for(1)
    monkeypatch.undo()
    for policy in POLICIES:
        answers = [each.answer(QUESTION, answer_policy=policy, max_tokens=4) for each in (stream, whole)]
        assert answers[0].token_ids == answers[1].token_ids


def test_what_stays_chosen_is_not_brought_up_again(backbones, frames):  # noqa: F811
    stream = small(backbones['internvl'], frames, 'int4', below=(below := Below()), host_cache_bytes=0)
    stream.detailed.far._staging_bytes = 2**24
    stream.answer(QUESTION, answer_policy='all', max_tokens=1)
    first, layers = below.reads, stream.backbone.layout.layers
    assert first >= layers * len(stream.detailed.far.steps)
    stream.answer(QUESTION, answer_policy='all', max_tokens=8)
    assert below.reads == first, 'all of it is staged'


def test_what_is_read_again_stays_longest_and_a_pass_displaces_nothing_of_its_own(backbones):  # noqa: F811
    layout, form = backbones['internvl'].layout, find_format('int4')
    staging = Staging(layout, form, 1, 4, 5 * Staging(layout, form, 1, 4, 0).bytes)

    def brought_up(*pages: int) -> list[int]:
        missing = staging.missing(1, pages)
        slots = staging.place(1, missing[:1]) + staging.place(1, missing[1:])       # as what lies apart is placed
        assert len(set(slots)) == len(slots) and all(page in staging.slot_of(1) for page in pages)
        assert sorted(staging.slot_of(1).values()) == list(range(len(staging.slot_of(1))))
        return missing

    assert staging.slots == 5 and brought_up(1, 2) == [1, 2] and brought_up(1, 2) == []
    for pages in ((3, 4), (5, 6), (7, 8)):
        assert brought_up(*pages) == list(pages)
    assert brought_up(1, 2, 8) == []
    assert brought_up(3, 4, 5, 6) == [3, 4, 5] and brought_up(3, 4, 5, 6, 8) == []


def test_all_pages_that_a_pass_wants_of_a_layer_are_read_at_once(backbones, frames):  # noqa: F811
    stream = small(backbones['qwen3_vl'], frames, 'int4', below=(below := Below()), host_cache_bytes=0)
    stream.detailed.far._staging_bytes = 2**24
    stream.answer(QUESTION, answer_policy='all', max_tokens=1)
    kinds = {(step.lengths, page) for step in stream.detailed.far.steps for page in range(len(step.lengths))}
    assert 1 < len(kinds) < len(stream.detailed.far.steps) and below.calls == stream.backbone.layout.layers


def test_no_step_is_made_an_object_for_its_pages(backbones, frames, monkeypatch):  # noqa: F811
    stream = small(backbones['qwen3_vl'], frames, 'int4', below=(below := Below()), host_cache_bytes=0)
    far, pages, made = stream.detailed.far, stream.detailed.pages, []
    monkeypatch.setattr(StepRows, '__getitem__', lambda steps, index: made.append(index))
    wanted = torch.arange(pages.first, pages.near).expand(2, -1)
    lengths = pages.lengths(slice(pages.first, pages.near)).expand(2, -1)
    brought_up = [page for each in far.rounds(0, wanted, lengths) for page in each.columns[0].tolist()]
    assert len(brought_up) == len(wanted[0]) > 10 and below.calls and not made


@pytest.mark.parametrize('form', FORMATS)
def test_main_memory_that_is_the_devices_lends_room_for_staging_and_both_keep_to_their_bounds(form, backbones,  # noqa: F811
                                                                                             frames):  # noqa: F811
    backbone, bound = backbones['internvl'], 100_000
    stream = small(backbone, frames, form, below=(below := Below()), host_cache_bytes=bound)
    whole = stream_of(backbone, frames, STEPS[form], form)
    detailed, far = stream.detailed, stream.detailed.far
    assert below.steps and 0 < far.host.max_bytes == bound // 4
    own = far._staging_bytes - bound * 3 // 4
    for index in range(STEPS[form], STEPS[form] + 8):
        answers = [each.answer(QUESTION, answer_policy='sparse(45)', max_tokens=3) for each in (stream, whole)]
        assert answers[0].token_ids == answers[1].token_ids
        for each in (stream, whole):
            each.step(frames[index % 32], stamp(index))
        assert own < far.staging.bytes <= own + bound * 3 // 4, 'one pool, of what both have for it'
        assert far.bytes == own
        assert detailed.tier_bytes['device'] <= detailed._max_bytes + own and detailed.tier_bytes['host'] <= bound
        assert sum(detailed.tier_bytes.values()) - detailed.tier_bytes['index'] == (
            detailed._exact.bytes + (detailed._packed.bytes if detailed._packed else 0) + far.host.bytes + far.staging.bytes)


@pytest.mark.parametrize('form', FORMATS)
def test_steps_that_the_last_tier_lets_go_are_forgotten_and_the_answer_says_so(form, backbones, frames):  # noqa: F811
    stream = small(backbones['qwen3_vl'], frames, form, below=(below := Below()), host_cache_bytes=0)
    held = stream.detailed.steps()
    before = stream.frames
    oldest, hole = held[0].record, held[5].record
    below.forget(oldest.step, hole.step)
    stream.step(frames[0], stamp(STEPS[form]))
    stream.step(frames[0], stamp(STEPS[form] + 1))
    records = list(stream.detailed.records())
    assert records[0] == held[1].record and hole not in records
    assert stream.forgotten_frames == oldest.frames + hole.frames
    assert stream.frames == before - oldest.frames - hole.frames + 2
    assert stream.detailed_tokens == sum(record.tokens for record in records) + stream.detailed._prefix[1].tokens
    for policy in POLICIES:
        answer = stream.answer(QUESTION, answer_policy=policy, max_tokens=3, evidence=999)
        assert answer.token_ids and hole.first_stamp_ns not in {each.first_stamp_ns for each in answer.evidence}
        if policy != 'last(12)':
            assert answer.first_stamp_ns == records[0].first_stamp_ns
    below.forget(records[0].step, *(record.step for record in records[1:4]))   # the one behind the hole is first now
    stream.step(frames[0], stamp(STEPS[form] + 2))
    stream.step(frames[0], stamp(STEPS[form] + 3))
    assert stream.first_stamp_ns == records[4].first_stamp_ns
    assert stream.detailed.pages.first == stream.detailed.steps()[0].page


def test_steps_wait_in_main_memory_for_the_tier_below_and_no_longer_than_that(backbones, frames):  # noqa: F811
    stream = small(backbones['internvl'], frames, 'int4', below=(below := Below()), host_cache_bytes=0, takes=False)
    far = stream.detailed.far
    waiting = len(far.steps)
    assert waiting == 8 and stream.forgotten_frames > 0, 'a disk that takes nothing costs what it does not take'
    below.takes(stream)
    stream.step(frames[0], stamp(STEPS['int4']))
    assert far.host.bytes == 0 and len(far.steps) >= waiting


def test_main_memory_keeps_to_its_bound(backbones, frames):  # noqa: F811
    backbone, bound = backbones['internvl'], 100_000
    stream = small(backbone, frames, 'int4', host_cache_bytes=bound)
    assert 0.5 * bound < stream.detailed.far.host.bytes <= bound
    assert stream.forgotten_frames > 0 and len(stream.detailed.far.steps) > 8


def test_a_page_that_cannot_be_read_is_left_out_of_the_answer(backbones, frames):  # noqa: F811
    stream = small(backbones['internvl'], frames, 'bf16', below=(below := Below()), host_cache_bytes=0)
    broken = stream.detailed.far.steps[3].record
    below.broken.add(broken.step)
    answer = stream.answer(QUESTION, answer_policy='all', max_tokens=3, evidence=999)
    assert broken.first_stamp_ns not in {each.first_stamp_ns for each in answer.evidence}
    assert len(answer.evidence) == len(list(stream.detailed.records())) - 1
    below.broken.clear()
    answer = stream.answer(QUESTION, answer_policy='all', max_tokens=3, evidence=999)
    assert broken.first_stamp_ns in {each.first_stamp_ns for each in answer.evidence}


@pytest.mark.parametrize('form', FORMATS)
def test_a_step_moves_down_while_an_answer_reads_it(form, backbones, frames, monkeypatch):  # noqa: F811
    backbone = backbones['internvl']
    stream, still = (small(backbone, frames, form) for _ in range(2))
    moving, right = (s.begin_answer(QUESTION, 'all', max_tokens=6, evidence=999) for s in (stream, still))
    count = STEPS[form]
    while not moving.advance(1):
        stream.step(frames[count % 32], stamp(count))
        count += 1
    while not right.advance(1):
        pass
    assert moving.token_ids == right.token_ids
    shares = [{e.first_stamp_ns: e.share for e in answering.result().evidence} for answering in (moving, right)]
    # In few bits, what was exact when the question was asked is quantised meanwhile.
    assert shares[0] == pytest.approx(shares[1], abs=1e-4 if form == 'bf16' else 0.05)
