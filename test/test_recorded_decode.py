"""Tokens of answers as recorded graphs: those of eager passes, whatever happens to the memory in between, and eager where
recording does not pay or fails.

Without a GPU the recorder is a stand-in that queues the same operations again, with the host's numbers as they were (`queued`).
"""
import gc
import warnings
import weakref

import pytest
import torch

from conftest import SECOND
from family_libraries import LIBRARIES
from queued import Queued, as_kernels
from test_answer_passes import Operations
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.errors import Code, Interrupted, QuestionError
from statekv_ros.kernels import fitness
from statekv_ros.memory import VideoStream
from statekv_ros.memory.answering import reading as reading_module
from statekv_ros.memory.answering.shared import decode_together
from statekv_ros.memory.graphs import make_decodes
from statekv_ros.memory.pauses import PAUSES_S
from statekv_ros.memory.recorded_decode import RECORDED_AT, DecodeGraphs

QUESTION = 'where did you last see the red toolbox?'
AT = 3      # the token that is recorded here


@pytest.fixture(scope='module')
def backbones(tmp_path_factory):
    base = tmp_path_factory.mktemp('decodes')
    loaded = {family: load_backbone(str(write_tiny_checkpoint(base / family, family=family)), device='cpu', dtype='float32')
              for family in LIBRARIES}
    short = write_tiny_checkpoint(base / 'short', family='internvl', max_position=400)
    loaded['short'] = load_backbone(str(short), device='cpu', dtype='float32')
    for backbone in loaded.values():
        backbone.stop_token_ids = frozenset()       # answers are as long as they may be
    return loaded


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    as_kernels(monkeypatch, 'statekv_ros.memory.answering.reading.span_and_pages')
    # What stands in for a graph queues torch's operations: votes that are compiled for CPUs are none, and no GPU runs them.
    monkeypatch.setattr(fitness, 'find_library', lambda operation: None)


class Camera:
    """A stream and what it sees, and one like it whose answers are eager."""

    def __init__(self, backbone, frames, count: int, record=None, at: int = AT, **options):
        self.record = record or Queued()
        self.ours, self.eager = (VideoStream(backbone, 'statekv(40)', **options) for _ in range(2))
        self.graphs = self.ours.decodes = DecodeGraphs(lambda: self.record, at)
        self._frames, self._seen = frames, 0
        self.watch(count)

    def watch(self, count: int = 1) -> None:
        for _ in range(count):
            self._seen += 1
            for stream in (self.ours, self.eager):
                stream.step(self._frames[self._seen % len(self._frames)], self._seen * SECOND // 2)

    def asked(self, policy: str, question: str = QUESTION, **options) -> list:
        """The same question to both, up to its first token; each keeps its logits in `said`."""
        answers = []
        for stream in (self.ours, self.eager):
            answering = stream.begin_answer(question, policy, **{'max_tokens': 40, 'evidence': 99, **options})
            keep(answering)
            while not answering.token_ids:
                answering.advance(1)
            answers.append(answering)
        return answers


def keep(answering) -> None:
    answering.said, take = [], answering.take
    answering.take = lambda token, logits: (answering.said.append(logits.clone()), take(token, logits))


def assert_alike(ours, right) -> None:
    """Words, logits, and where they looked."""
    assert ours.token_ids == right.token_ids and ours.finish_reason == right.finish_reason
    for said, expected in zip(ours.said, right.said, strict=True):
        assert (said - expected).norm() <= 1e-5 * expected.norm()
    for evidence, expected in ((ours.newest_evidence(99), right.newest_evidence(99)),
                               (ours.result().evidence, right.result().evidence)):
        assert {each.first_stamp_ns: each.share for each in evidence} == \
            pytest.approx({each.first_stamp_ns: each.share for each in expected}, abs=1e-5)


def in_slices(pair, camera, tokens: int = 4, between=lambda: None) -> None:
    """Both to their ends, a slice of each at a time."""
    while not all([each.advance(tokens) for each in pair]):
        assert_alike(*pair)
        between()
    assert_alike(*pair)


@pytest.mark.parametrize('family, policy, form', [
    *((family, 'sparse(40)', 'bf16') for family in LIBRARIES), ('internvl', 'sparse(40)', 'int4'),
    ('qwen3_vl', 'sparse(60)', 'int8'), ('internvl', 'all', 'bf16'), ('internvl', 'state', 'bf16'),
    ('qwen3_vl', 'last(6)', 'bf16'), ('internvl', 'last(6)', 'int4'),
    ('qwen3_vl', 'retrieve(4)', 'bf16'), ('internvl', 'retrieve(3)', 'int4'), ('internvl', 'rekv(3)', 'bf16')])
def test_a_long_answer_is_that_of_eager_passes_while_frames_come_in(family, policy, form, backbones, frames):
    """70 tokens, in which the tail doubles; 17 steps, in which pools grow and pages are put into few bits."""
    camera = Camera(backbones[family], frames, 24, detailed_format=form)
    pair = camera.asked(policy, max_tokens=70)
    in_slices(pair, camera, between=camera.watch)
    assert len(pair[0].token_ids) == 70 and camera.graphs.problem == ''
    changes = camera.record.recorded
    assert changes >= 2, 'the tail doubled'
    assert camera.graphs.replays >= (35 if form == 'bf16' or policy.startswith('sparse') else 8), changes


def test_frames_that_are_put_into_few_bits_meanwhile_leave_a_recording_as_it_is(backbones, frames):
    """Which pages are exact is read on the device: else each frame would take a recording of its own."""
    camera = Camera(backbones['internvl'], frames, 40, detailed_format='int4')
    pair, table = camera.asked('sparse(60)', max_tokens=30), camera.ours.detailed.pages
    for each in pair:
        each.advance(AT)
    recorded, boundary, stop = camera.record.recorded, table.boundary, table.stop
    assert boundary < stop
    for _ in range(5):
        camera.watch()
        for each in pair:
            each.advance(4)
        assert_alike(*pair)
    assert table.boundary >= stop > boundary, 'all that was exact when it was asked is not any more'
    assert camera.record.recorded == recorded and camera.graphs.replays >= 18


@pytest.mark.parametrize('form, tokens', [('bf16', 900), ('int4', 400)])
def test_what_is_forgotten_meanwhile_is_read_no_more(form, tokens, backbones, frames):
    """`tokens`: that there is room for, were all of them exact."""
    bound = tokens * backbones['internvl'].kv_bytes_per_token
    camera = Camera(backbones['internvl'], frames, 90, detailed_format=form, device_cache_bytes=bound)
    assert camera.ours.forgotten_frames
    pair = camera.asked('sparse(60)', max_tokens=60)
    forgotten = camera.ours.forgotten_frames
    in_slices(pair, camera, 6, camera.watch)
    assert camera.ours.forgotten_frames > forgotten and camera.graphs.replays > 5 and camera.record.recorded > 2


def test_a_host_that_did_not_look_where_things_lie_would_be_wrong(backbones, frames, monkeypatch):
    """Else the tests above would prove nothing."""
    monkeypatch.setattr(reading_module.Reading, 'place', lambda self: (0,))
    camera = Camera(backbones['internvl'], frames, 60, device_cache_bytes=900 * backbones['internvl'].kv_bytes_per_token)
    with pytest.raises(AssertionError):
        in_slices(camera.asked('sparse(60)', max_tokens=60), camera, 6, camera.watch)


def test_stretches_that_queries_are_turned_for_are_read_as_eagerly(backbones, frames):
    camera = Camera(backbones['short'], frames, 60)
    assert camera.ours.shift > 0
    for policy in ('sparse(60)', 'all'):
        pair = camera.asked(policy, max_tokens=24)
        replays = camera.graphs.replays
        in_slices(pair, camera, between=camera.watch)
        assert camera.graphs.replays > replays + 8
        reading = pair[0]._reading
        assert any(turns is not None for turns in reading._turns.values()) if policy == 'all' else \
            reading._pages[0]._moves is not None


@pytest.mark.parametrize('family', LIBRARIES)
def test_tokens_on_the_device_are_embedded_as_the_hosts(family, backbones):
    """A model may say any token, one too that stands for something else in its prompt."""
    backbone = backbones[family]
    for token in (7, *(backbone._token_id(each) for each in backbone.special_tokens)):
        expected, inputs = backbone.embed([token], 9), backbone.embed_there(torch.tensor([[token]]), torch.tensor([[9]]))
        assert torch.equal(inputs.embeds, expected.embeds) and torch.equal(inputs.positions, expected.positions)


@pytest.mark.parametrize('temperature', [0.0, 0.9])
def test_tokens_are_sampled_as_eagerly(temperature, backbones, frames):
    camera = Camera(backbones['qwen3_vl'], frames, 30)
    pair = camera.asked('sparse(40)', temperature=temperature, seed=5)
    in_slices(pair, camera)
    assert len(set(pair[0].token_ids)) > 1 and camera.graphs.replays > 30


@pytest.mark.parametrize('policy, form', [('sparse(40)', 'bf16'), ('sparse(40)', 'int4'), ('last(6)', 'bf16')])
def test_what_the_host_queues_for_a_replayed_token_does_not_grow_with_the_layers(policy, form, tmp_path, frames):
    queued = []
    for layers in (3, 9):
        folder = write_tiny_checkpoint(tmp_path / str(layers), family='internvl', layers=layers)
        backbone = load_backbone(str(folder), device='cpu', dtype='float32')
        backbone.stop_token_ids = frozenset()
        operations = Operations()

        def record(function):
            replay, result = Queued()(function)
            return lambda: (operations.left_out(replay) if operations.on else replay)(), result

        camera = Camera(backbone, frames, 20, record, detailed_format=form)
        answering = camera.asked(policy)[0]
        answering.advance(6)
        replays, operations.on = camera.graphs.replays, True
        with operations:
            answering.advance(1)
        assert camera.graphs.replays == replays + 1
        queued.append(operations.count)
    assert queued[0] == queued[1] <= 20, queued


@pytest.mark.parametrize('tokens', [1, 5, RECORDED_AT, 2 * RECORDED_AT - 1])
def test_a_short_answer_pays_for_no_recording(tokens, backbones, frames):
    camera = Camera(backbones['internvl'], frames, 20, at=RECORDED_AT)
    in_slices(camera.asked('sparse(40)', max_tokens=tokens), camera)
    assert camera.record.recorded == camera.graphs.replays == 0
    in_slices(camera.asked('sparse(40)', max_tokens=2 * RECORDED_AT), camera)
    assert camera.record.recorded == 1 and camera.graphs.replays == RECORDED_AT


def test_two_answers_side_by_side_have_each_its_own(backbones, frames):
    """By themselves, with what they share in between: only the newest recording may be replayed, for they share memory."""
    camera = Camera(backbones['internvl'], frames, 30, at=2)
    pairs = [camera.asked(policy, question, max_tokens=60)
             for policy, question in (('sparse(40)', QUESTION), ('all', 'what now?'))]
    for turn in range(6):
        for pair in pairs:
            for each in pair:
                each.advance(4)
            assert_alike(*pair)
        camera.watch()
        for shared in zip(*pairs):
            assert decode_together(shared, 4) == [None] * 2
        for pair in pairs:
            assert_alike(*pair)
    assert camera.record.recorded >= 6 and camera.graphs.replays > 12


def test_a_replay_looks_whether_it_is_cancelled_and_leaves_the_answer_as_it_was(backbones, frames):
    stop = []
    camera = Camera(backbones['internvl'], frames, 20, cancelled=lambda: bool(stop))
    pair = camera.asked('sparse(40)')
    for each in pair:
        each.advance(10)
    replays = camera.graphs.replays
    assert replays
    stop.append(True)
    for each in pair:
        with pytest.raises(Interrupted):
            each.advance(1)
    assert_alike(*pair)
    stop.clear()
    in_slices(pair, camera)
    assert camera.graphs.replays > replays


def test_an_interruption_while_a_token_is_recorded_is_no_failure(backbones, frames):
    stop = []

    def record(function):
        stop.append(True)
        return Queued()(function)

    camera = Camera(backbones['internvl'], frames, 20, record, cancelled=lambda: bool(stop))
    answering = camera.asked('sparse(40)')[0]
    with pytest.raises(Interrupted):
        answering.advance(AT)
    assert camera.graphs.problem == '' and len(answering.token_ids) == AT - 1


def test_a_reset_ends_it_and_forgets_what_is_recorded(backbones, frames):
    camera = Camera(backbones['internvl'], frames, 20)
    pair = camera.asked('sparse(40)')
    pair[0].advance(9)
    assert camera.graphs.newest is not None
    camera.ours.reset(), camera.eager.reset()
    with pytest.raises(QuestionError) as told:
        pair[0].advance(1)
    assert told.value.code is Code.MEMORY_RESET and camera.graphs.newest is None
    camera.watch(20)
    in_slices(camera.asked('sparse(40)'), camera)


class Wrong(Queued):
    """Gives other logits than those of the eager pass."""

    def __call__(self, function):
        replay, (logits, noted) = super().__call__(function)
        return lambda: (replay(), logits.mul_(1.1)), (logits, noted)


def refusing(function):
    function()
    raise RuntimeError('operation not permitted when stream is capturing')


@pytest.mark.parametrize('record, reason', [(refusing, 'not permitted when stream is capturing'), (Wrong(), 'differs')])
def test_tokens_that_cannot_be_recorded_say_so_once_and_are_decoded_eagerly(record, reason, backbones, frames):
    camera = Camera(backbones['internvl'], frames, 20, record)
    pair = camera.asked('sparse(40)')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        in_slices(pair, camera, between=camera.watch)
    assert [str(each.message) for each in caught if 'CUDA graphs' in str(each.message)] == [
        'tokens of answers are not replayed as CUDA graphs but run eagerly, which is slower: '
        f'{camera.graphs.off} (failure 1 of 4; tried again in {PAUSES_S[0]:.0f} s)']
    assert reason in camera.graphs.off and camera.graphs.replays == 0 and camera.graphs.newest is None


def test_pages_below_the_device_are_fetched_by_eager_passes(backbones, frames):
    backbone = backbones['internvl']
    camera = Camera(backbone, frames, 60, device_cache_bytes=900 * backbone.kv_bytes_per_token, host_cache_bytes=10**8)
    assert camera.ours.detailed.steps_below
    in_slices(camera.asked('sparse(60)'), camera, between=camera.watch)
    assert camera.record.recorded == 0
    in_slices(camera.asked('sparse(20)', span=(camera.ours.last_stamp_ns - 3 * SECOND, None)), camera)
    assert camera.record.recorded == 1, 'what is on the device alone is not'


def test_much_that_is_read_as_it_lies_is_not_recorded(backbones, frames, monkeypatch):
    monkeypatch.setattr(reading_module, 'MOST_IN_PARTS', 100)
    camera = Camera(backbones['internvl'], frames, 30)
    in_slices(camera.asked('all', max_tokens=12), camera)
    assert camera.record.recorded == 0
    in_slices(camera.asked('last(2)', max_tokens=12), camera)
    assert camera.record.recorded == 1


def test_pages_that_a_naive_twin_would_look_at_are_not_recorded(backbones, frames, monkeypatch):
    monkeypatch.setattr(reading_module.fitness, 'problem', lambda operation, device: 'no compiler')
    camera = Camera(backbones['internvl'], frames, 30)
    in_slices(camera.asked('sparse(40)', max_tokens=12), camera)
    assert camera.record.recorded == 0
    in_slices(camera.asked('state', max_tokens=12), camera)
    assert camera.record.recorded >= 1


def test_the_pool_of_a_recording_is_kept_for_the_next_and_a_new_recorder_taken_after_a_reset(backbones, frames):
    """The pool of a recorder dies with its recordings: torch may record none in it any more."""
    made, camera = [], Camera(backbones['internvl'], frames, 20)

    def record_while_alive():
        recorded = []

        def record(function):
            again, result = Queued()(function)
            assert not recorded or recorded[-1]() is not None, 'use_count > 0'
            recorded.append(weakref.ref(again))
            return again, result

        made.append(recorded)
        return record

    camera.ours.decodes = DecodeGraphs(record_while_alive, AT)
    for _ in range(2):
        for _ in range(2):
            answering = camera.ours.begin_answer(QUESTION, 'sparse(40)', max_tokens=20)
            while not answering.advance(4):
                pass
            del answering
            gc.collect()
        assert sum(each() is not None for each in made[-1]) == 1 and camera.ours.decodes.problem == ''
        camera.ours.reset()
        assert not any(each() is not None for each in made[-1])
        camera.watch(20)
    assert len(made) == 2 and all(len(recorded) == 2 for recorded in made)


def test_graphs_of_answers_are_for_a_gpu(backbones):
    backbone = backbones['internvl']
    assert VideoStream(backbone, 'window(4)').decodes is None and make_decodes('off', backbone) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('form', ['bf16', 'int4'])
@pytest.mark.parametrize('policy', ['sparse(60)', 'last(4)', 'state'])
def test_replayed_tokens_equal_eager_ones_on_a_gpu(policy, form, tmp_path, frames, monkeypatch):
    monkeypatch.undo()      # kernels of its own
    folder = str(write_tiny_checkpoint(tmp_path / 'tiny', family='internvl'))
    backbone = load_backbone(folder, device='cuda', dtype='float32')
    backbone.stop_token_ids = frozenset()
    streams = [VideoStream(backbone, 'statekv(40)', cuda_graph=mode, detailed_format=form) for mode in ('auto', 'off')]
    assert streams[0].decodes is not None and streams[1].decodes is None

    def watch(count: int) -> None:
        for _ in range(count):
            for stream in streams:
                stream.step(frames[stream.frames % len(frames)], (stream.frames + 1) * SECOND // 2)

    watch(30)
    for question in (QUESTION, 'what is in view now?'):
        pair = [stream.begin_answer(question, policy, max_tokens=70, evidence=99) for stream in streams]
        for each in pair:
            keep(each)
        while not all([each.advance(6) for each in pair]):
            watch(1)
        ours, right = pair
        assert ours.token_ids == right.token_ids and streams[0].decodes.problem == ''
        assert all((said - expected).norm() <= 1e-3 * expected.norm() for said, expected in zip(ours.said, right.said))
        shares = [{each.first_stamp_ns: each.share for each in answer.result().evidence} for answer in pair]
        assert shares[0] == pytest.approx(shares[1], abs=1e-3)
    assert streams[0].decodes.replays > 40
