"""Recording CUDA graphs and telling time on the right device, with torch's own Python above a stand-in for the driver."""
import gc
from types import SimpleNamespace

import pytest
import torch

from fake_cuda import FakeCuda, cuda  # noqa: F401
from statekv_ros.bench import hardware
from statekv_ros.memory import recorded
from statekv_ros.memory.clock import PhaseClock
from statekv_ros.memory.detailed.tiers import HostTier
from statekv_ros.memory.recorded import CudaRecorder

SECOND_GPU = torch.device('cuda:1')


@pytest.mark.parametrize('tidy', [True, False])
@pytest.mark.parametrize('device', ['cuda', 'cuda:1'])
def test_a_capture_that_cannot_end_leaves_the_thread_where_it_was(device, tidy, cuda: FakeCuda):  # noqa: F811
    before, record = (cuda.device, cuda.current_stream(0), cuda.current_stream(1)), CudaRecorder(torch.device(device), tidy)
    cuda.refuses_to_end = True
    with pytest.raises(RuntimeError, match='previous error during capture'):
        record(cuda.multiply)
    assert (cuda.device, cuda.current_stream(0), cuda.current_stream(1)) == before
    cuda.refuses_to_end = False
    CudaRecorder(torch.device(device), tidy)(cuda.multiply)
    assert (cuda.device, cuda.current_stream(0), cuda.current_stream(1)) == before


def test_only_a_tidy_recorder_gives_memory_back_to_the_driver(cuda: FakeCuda, monkeypatch):  # noqa: F811
    given = []
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: given.append(1))
    for tidy, times in ((False, 0), (True, 2)):
        record = CudaRecorder(SECOND_GPU, tidy)
        replays = [record(cuda.multiply)[0] for _ in range(2)]
        assert len(given) == times and len({replay.__self__.pool() for replay in replays}) == 1


@pytest.mark.parametrize('tidy', [True, False])
@pytest.mark.parametrize('ends, kept', [(False, 1), (True, 0)])
def test_a_half_captured_graph_is_kept_for_the_allocator_that_asks_it(ends, kept, tidy, cuda: FakeCuda, monkeypatch):  # noqa: F811
    monkeypatch.setattr(recorded, '_half_captured', [])
    cuda.refuses_to_end = not ends

    def fails():
        raise ValueError('in mid capture')

    with pytest.raises(ValueError if ends else RuntimeError):
        CudaRecorder(SECOND_GPU, tidy)(fails)
    assert len(recorded._half_captured) == kept


def test_a_recording_takes_the_workspace_of_its_own_pool_and_leaves_none_behind(cuda: FakeCuda):  # noqa: F811
    """Otherwise a graph that is destroyed takes the workspace of those along that were recorded on its stream after it."""
    first = CudaRecorder(SECOND_GPU)
    replays = [first(cuda.multiply)[0] for _ in range(2)]
    other = CudaRecorder(SECOND_GPU)
    other._stream = first._stream       # torch hands out 32 streams in turn, the same ones again
    replays.append(other(cuda.multiply)[0])
    assert cuda.products == [replay.__self__.pool() for replay in replays] == [1, 1, 2]
    assert cuda.workspaces == {}, 'nor may work that is not recorded use that memory'


def test_the_recorder_of_a_pool_that_died_is_of_no_use_any_more(cuda: FakeCuda):  # noqa: F811
    """What `StepGraphs.clear` takes a new one for; see test_graphs.py."""
    record = CudaRecorder(SECOND_GPU)
    replay, _ = record(cuda.multiply)
    del replay
    gc.collect()
    with pytest.raises(RuntimeError, match='use_count'):
        record(cuda.multiply)


def test_phases_are_timed_on_the_device_that_computes_them(cuda: FakeCuda):  # noqa: F811
    clock = PhaseClock(SECOND_GPU)
    clock.mark()
    assert [stream.device for stream in cuda.events] == [SECOND_GPU] * 2


def test_the_arrival_in_main_memory_is_waited_for_on_the_device_that_sends(cuda: FakeCuda, monkeypatch):  # noqa: F811
    monkeypatch.setattr(HostTier, '_on_host', lambda tier, part: part.clone())      # pinned memory needs a driver
    tier = HostTier(10**6, SECOND_GPU)
    tier.put(0, {'key': torch.ones(3)})
    assert [stream.device for stream in cuda.events] == [SECOND_GPU] and tier.holds(0)


def test_a_bench_records_and_times_on_its_own_device(cuda: FakeCuda, monkeypatch):  # noqa: F811
    seen = []

    def do_bench(function, **options):
        seen.append(('timed', cuda.device))
        return 7.0

    monkeypatch.setattr('triton.testing.do_bench', do_bench)

    def work(tensors):
        seen.append(('ran', cuda.current_stream(1).number > 0))

    assert hardware.median_ms(work, [SimpleNamespace()], SECOND_GPU) == 7.0
    assert seen == [('ran', False), ('ran', True), ('timed', 1)] and cuda.device == 0
