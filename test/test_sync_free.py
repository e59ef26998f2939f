"""In a frame step the host never waits for the device: it queues work whose shapes it knows and goes on.

On a machine without a GPU the model lies on torch's meta device, where tensors have shapes and no data: whatever would have to
read a value back fails. A GPU, where there is one, is asked itself.
"""
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import SECOND
from family_libraries import LIBRARIES
from statekv_ros.backbones import FAMILIES as ADAPTERS
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.checkpoint import load_checkpoint
from statekv_ros.backbones.tiny import write_tiny_checkpoint
from statekv_ros.kernels.paged_attention import Noted, Read
from statekv_ros.memory import VideoStream
from statekv_ros.memory.answering.shared import decode_together
from statekv_ros.memory.recorded_decode import DecodeGraphs
from statekv_ros.memory.together import Given, Together

FAMILIES = list(LIBRARIES)
BUDGET = 40
META = torch.device('meta')


class Waits(Exception):
    """The host would wait for the device, or for a copy from memory that is not pinned."""


class NoTensorFromPython(TorchFunctionMode):
    """Values of Python reach a device through a copy that the host waits for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        device = (kwargs or {}).get('device')
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and device not in (None, 'cpu'):
            if torch.device(device) == META:
                raise Waits(f'{function.__name__}(..., device={device})')
        return function(*args, **kwargs or {})


class NoWaiting(TorchDispatchMode):
    """Operations on meta tensors, as a GPU would run them.

    Attributes:
        uploads: copies from the host to the device, all of them asked for without waiting.
    """
    uploads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # under torch.inference_mode operations come here whole: look at what they are made of
            if (parts := function.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        devices = {tensor.device for tensor in tensors if tensor.ndim}
        aten = torch.ops.aten
        if function is aten._to_copy.default and kwargs.get('device', META) != tensors[0].device:
            if tensors[0].device == META or not kwargs.get('non_blocking'):
                raise Waits(f'copy from {tensors[0].device} to {kwargs["device"]}')
            self.uploads += 1
        elif function is aten.copy_.default and tensors[1].device != META and (kwargs.get('non_blocking') or args[2:] == (True,)):
            self.uploads += 1
        elif len(devices) > 1:
            raise Waits(f'{function} on {devices}')
        elif devices == {META}:
            indices = [leaf for leaf in tree_leaves(args[1:]) if torch.is_tensor(leaf)] if 'index' in str(function) else []
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                raise Waits(f'{function} by a mask')
            if function in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
                            aten.unique_consecutive.default, aten._unique2.default):
                raise Waits(str(function))
        return function(*args, **kwargs)


class Looking(NoWaiting):
    """Gives the host what it reads back, all zeros: one page a step, say.

    Attributes:
        looks: bytes that it read, each time.
    """

    def __init__(self):
        super().__init__()
        self.looks: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten, first = torch.ops.aten, args[0] if args else None
        if torch.is_tensor(first) and first.device == META:
            if function is aten._local_scalar_dense.default:
                self.looks.append(first.itemsize)
                return torch.zeros((), dtype=first.dtype).item()
            if function is aten._to_copy.default and torch.device((kwargs or {}).get('device', META)) != META:
                self.looks.append(first.nbytes)
                return torch.zeros(first.shape, dtype=(kwargs or {}).get('dtype') or first.dtype)
            if function is aten.exponential_.default:       # with a generator, which meta tensors know none of
                return first
            if function is aten.unique_consecutive.default:
                self.looks.append(first.nbytes)
                return torch.zeros(1, dtype=first.dtype), torch.zeros(0), torch.tensor([first.numel()])
        return super().__torch_dispatch__(function, types, args, kwargs)


@contextmanager
def no_waiting(mode: type[NoWaiting] = NoWaiting):
    with NoTensorFromPython(), mode() as watching:
        yield watching


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp('sync')
    return {family: write_tiny_checkpoint(base / family, family=family) for family in FAMILIES}


def full_stream(backbone, frames, policy: str, seen: int = 8, **options) -> VideoStream:
    """A stream whose state is full, with no frame waiting and room in its detailed cache."""
    stream = VideoStream(backbone, policy, **options)
    for index in range(seen):
        stream.step(frames[index], (index + 1) * SECOND // 2)
    assert len(stream.pending) == 0
    return stream


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('policy', [f'statekv({BUDGET})', 'window(4)', 'full', 'none'])
def test_a_step_never_waits_and_sends_three_tensors(family, policy, folders, frames):
    checkpoint = load_checkpoint(str(folders[family]), 'cpu', 'float32')
    checkpoint = replace(checkpoint, model=checkpoint.model.to(META))
    backbone = ADAPTERS[checkpoint.model.config.model_type](checkpoint, 448 * 448, 64 * 64, '', 0)
    stream = full_stream(backbone, frames, policy)
    before = stream.steps
    with no_waiting() as mode:
        for index in range(8, 8 + backbone.frames_per_step):
            report = stream.step(frames[index], (index + 1) * SECOND // 2)
    assert stream.steps == before + 1 and mode.uploads == 3, 'frames, token ids and positions'
    assert not policy.startswith('statekv') or report.state_tokens == BUDGET


@pytest.mark.parametrize('family', FAMILIES)
def test_a_step_that_is_put_into_few_bits_makes_nobody_wait_and_sends_nothing(family, folders, frames):
    checkpoint = load_checkpoint(str(folders[family]), 'cpu', 'float32')
    checkpoint = replace(checkpoint, model=checkpoint.model.to(META))
    backbone = ADAPTERS[checkpoint.model.config.model_type](checkpoint, 448 * 448, 64 * 64, '', 0)
    uploads, seen = [], 9 * backbone.frames_per_step      # no pool grows with the next step
    for each in ('bf16', 'int8', 'int4'):
        stream = full_stream(backbone, frames, f'statekv({BUDGET})', seen, detailed_format=each)
        boundary = stream.detailed.pages.boundary
        with no_waiting() as mode:
            for index in range(seen, seen + backbone.frames_per_step):
                stream.step(frames[index], (index + 1) * SECOND // 2)
        assert (stream.detailed.pages.boundary > boundary) == (each != 'bf16')
        uploads.append(mode.uploads)
    assert uploads[0] == uploads[1] == uploads[2]


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('policies, sent', [
    ((f'statekv({BUDGET})',) * 4, 4), (('window(4)', 'full', 'none', f'statekv({BUDGET})'), 3)])
def test_a_step_of_several_cameras_never_waits_and_sends_as_many_tensors_as_one(family, policies, sent, folders, frames):
    """Of different ages, so that some rows of the batch are padded."""
    checkpoint = load_checkpoint(str(folders[family]), 'cpu', 'float32')
    checkpoint = replace(checkpoint, model=checkpoint.model.to(META))
    backbone = ADAPTERS[checkpoint.model.config.model_type](checkpoint, 448 * 448, 64 * 64, '', 0)
    streams = [full_stream(backbone, frames, policy, seen) for policy, seen in zip(policies, (8, 24, 8, 10))]
    together, before = Together(), [stream.steps + 1 for stream in streams]

    def step(first: int) -> list:
        for index in range(first, first + backbone.frames_per_step):
            told = together.step([Given(stream, frames[index], (100 + index) * SECOND // 2) for stream in streams])
        return [report.cameras for report in told]

    step(0)     # sends what the vision tower gathers by, once for each number of cameras
    with no_waiting() as mode:
        assert step(2) == [4] * 4
    assert mode.uploads == sent, 'frames, token ids, positions, and where the states lie that are attended to at once'
    assert [stream.steps - 1 for stream in streams] == before and together.problem == ''


def as_on_a_gpu(query, span, pools, scale, noting=False, later=tuple):
    """Kernels of its own there, which do not look whether pages are in the pool."""
    widths = [span.key.shape[1], *(pages.starts.shape[1] for pages in (*pools, *later()))]
    noted = [Noted(torch.empty(*query.shape[:2], sum(widths), device=META), widths)] if noting else []
    return Read(torch.empty(query.shape, device=META), torch.empty(query.shape[:2], device=META), noted)


def test_a_pass_of_answers_is_one_look_of_eight_bytes_a_token_however_they_are_sampled(folders, frames, monkeypatch):
    monkeypatch.setattr('statekv_ros.memory.answering.reading.span_and_pages', as_on_a_gpu)
    checkpoint = load_checkpoint(str(folders['qwen3_vl']), 'cpu', 'float32')
    checkpoint = replace(checkpoint, model=checkpoint.model.to(META))
    backbone = ADAPTERS[checkpoint.model.config.model_type](checkpoint, 448 * 448, 64 * 64, '', 0)
    stream = full_stream(backbone, frames, f'statekv({BUDGET})', 8 * backbone.frames_per_step, detailed_format='int4')
    answerings = []
    for policy, temperature in (('all', 0.0), ('sparse(40)', 0.7), ('state', 0.0)):
        with no_waiting(Looking):
            answerings.append(stream.begin_answer('where?', policy, max_tokens=50, temperature=temperature))
            while not answerings[-1].token_ids:
                answerings[-1].advance(9)
        said = len(answerings[-1].token_ids)
        with no_waiting(Looking) as mode:
            answerings[-1].advance(3)
        assert len(answerings[-1].token_ids) == said + 3
        assert mode.looks == [8] * 3 and mode.uploads == 3, 'a token is sent, and the next one comes back'
    with no_waiting(Looking) as mode:
        assert decode_together(answerings, 2 * len(answerings)) == [None] * len(answerings)
    assert mode.looks == [8 * len(answerings)] * 2 and mode.uploads == 2, 'tokens and positions go in one piece'


@pytest.mark.parametrize('form, policy', [('bf16', 'sparse(40)'), ('int4', 'sparse(40)'), ('int8', 'last(3)'), ('bf16', 'state'),
                                          ('bf16', 'all'), ('int4', 'retrieve(3)')])
def test_a_recorded_token_waits_for_nothing_and_a_replay_sends_one_tensor_and_reads_eight_bytes(form, policy, folders, frames,
                                                                                               monkeypatch):
    monkeypatch.setattr('statekv_ros.memory.answering.reading.span_and_pages', as_on_a_gpu)
    checkpoint = load_checkpoint(str(folders['qwen3_vl']), 'cpu', 'float32')
    checkpoint = replace(checkpoint, model=checkpoint.model.to(META))
    backbone = ADAPTERS[checkpoint.model.config.model_type](checkpoint, 448 * 448, 64 * 64, '', 0)
    stream, recorded, replayed = full_stream(backbone, frames, f'statekv({BUDGET})', 16, detailed_format=form), [], []

    def record(function):
        with NoWaiting() as mode:       # nor may it send anything: a graph would send the same again
            recorded.append(function())
        assert mode.uploads == 0
        return lambda: replayed.append(1), recorded[-1]

    stream.decodes = DecodeGraphs(lambda: record, 3)
    with no_waiting(Looking):
        answering = stream.begin_answer('where?', policy, max_tokens=50)
        while not recorded:
            answering.advance(4)
    said, count = len(answering.token_ids), len(replayed)
    with no_waiting(Looking) as mode:
        answering.advance(3)
    assert len(answering.token_ids) == said + 3 and len(replayed) == count + 3 and stream.decodes.problem == ''
    assert mode.looks == [8] * 3 and mode.uploads == 3, 'token, position and place go in one piece'


@pytest.mark.parametrize('wait', [
    lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool((x > 0).all()), lambda x: x[x > 0], lambda x: x.cpu(),
    lambda x: x.nonzero(), lambda x: x.masked_select(x > 0), lambda x: torch.where(x > 0), lambda x: x + torch.ones(3),
    lambda x: torch.tensor([1.0], device=META), lambda x: torch.ones(3).to(META), lambda x: x.copy_(torch.ones(3)),
    lambda x: x.__setitem__(x > 0, torch.ones(3, device=META)), lambda x: x.new_tensor([1.0], device=META)])
def test_whatever_waits_is_caught(wait):
    """Else the test above would prove nothing."""
    x = torch.ones(3, device=META)
    with no_waiting(), pytest.raises((Waits, RuntimeError, NotImplementedError)):
        wait(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('cuda_graph', ['auto', 'off'])
def test_a_step_of_several_cameras_never_waits_on_a_gpu(cuda_graph, folders, frames):
    backbone = load_backbone(str(folders['qwen3_vl']), device='cuda')
    streams = [full_stream(backbone, frames, f'statekv({BUDGET})', 16, cuda_graph=cuda_graph) for _ in range(3)]
    together = Together()

    def step(index: int) -> list:
        return together.step([Given(stream, frames[index % 32], (index + 1) * SECOND // 2) for stream in streams])

    for index in range(16, 24):     # recorded, where it is
        step(index)
    replays = together.graphs.replays if together.graphs else 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        told = [step(24), step(25)][-1]
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert [report.cameras for report in told] == [3] * 3 and together.problem == ''
    assert together.graphs is None or together.graphs.replays == replays + 1, 'else this was no replay'


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('cuda_graph', ['auto', 'off'])
@pytest.mark.parametrize('family', FAMILIES)
def test_a_step_never_waits_on_a_gpu(family, cuda_graph, folders, frames):
    backbone = load_backbone(str(folders[family]), device='cuda')
    stream = full_stream(backbone, frames, f'statekv({BUDGET})', 16, cuda_graph=cuda_graph)
    replays = stream.graphs.replays if stream.graphs else 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:  # the event at its end, by which a step's time is read, is no such wait: work goes on behind it
        for index in range(16, 16 + backbone.frames_per_step):
            stream.step(frames[index], (index + 1) * SECOND // 2)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert stream.carried.copy()[0].isfinite().all()
    assert stream.graphs is None or stream.graphs.replays == replays + 1, 'else this was no replay'
