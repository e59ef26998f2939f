"""A CUDA runtime in place of the driver's, for what torch does above it: streams, devices, captures, workspaces. torch.cuda's own
Python (`graph`, `stream`, `device` and their ways out) runs as it is."""
from dataclasses import dataclass, field

import pytest
import torch


@dataclass(frozen=True)
class FakeStream:
    number: int
    device: torch.device

    @property
    def stream_id(self) -> int:
        return self.number

    @property
    def device_index(self) -> int:
        return self.device.index

    device_type = 1


@dataclass
class FakeCuda:
    """What the driver and torch's C++ part would hold.

    Attributes:
        device: the present one; streams: the present one of each device.
        live: graphs that are there, by pool; a pool whose graphs have all died cannot be recorded into again.
        workspaces: by stream, the pool that a matrix product's workspace lies in; 0 is the ordinary one.
        products: pool of the workspace that each matrix product was given.
        refuses_to_end: captures end with an error, as after a call that is not permitted.
        events: the stream on which each event was recorded.
    """
    device: int = 0
    streams: dict[int, FakeStream] = field(default_factory=dict)
    made: int = 0
    pools: int = 0
    live: dict[int, int] = field(default_factory=dict)
    workspaces: dict[FakeStream, int] = field(default_factory=dict)
    products: list[int] = field(default_factory=list)
    capturing: int = 0
    refuses_to_end: bool = False
    events: list[FakeStream] = field(default_factory=list)

    def index(self, device) -> int:
        if device is None or isinstance(device, int):
            return self.device if device is None else device
        return self.device if device.index is None else device.index

    def current_stream(self, device=None) -> FakeStream:
        index = self.index(device)
        return self.streams.get(index, FakeStream(0, torch.device('cuda', index)))

    def new_stream(self, device=None) -> FakeStream:
        self.made += 1
        return FakeStream(self.made, torch.device('cuda', self.index(device)))

    def set_stream(self, stream: FakeStream) -> None:
        self.streams[stream.device_index] = stream
        self.device = stream.device_index

    def exchange_device(self, index: int) -> int:
        before, self.device = self.device, index if index >= 0 else self.device
        return before

    def multiply(self) -> None:
        """A matrix product on the present stream."""
        pool = self.workspaces.setdefault(self.current_stream(), self.capturing)
        self.products.append(pool)


def make_graph_class(cuda: FakeCuda) -> type:
    class FakeGraph:
        """As torch's before it mended pools that have died, and after it began to clear a stream's workspaces with a graph."""

        def capture_begin(self, pool=None, capture_error_mode='global', **options):
            if pool is not None and not cuda.live.get(pool):
                raise RuntimeError(f'use_count > 0 INTERNAL ASSERT FAILED: pool {pool}')
            if pool is None:
                cuda.pools += 1
                pool = cuda.pools
            self.id, self.stream, cuda.capturing = pool, cuda.current_stream(), pool
            assert self.stream.number, 'CUDA graphs must be captured on a non-default stream'

        def capture_end(self):
            cuda.capturing = 0
            if cuda.refuses_to_end:
                raise RuntimeError('CUDA error: operation failed due to a previous error during capture')
            cuda.live[self.id] = cuda.live.get(self.id, 0) + 1
            self.ended = True

        def pool(self):
            if not getattr(self, 'ended', False):
                raise RuntimeError('Called CUDAGraph::pool() without a preceding successful capture.')
            return self.id

        def replay(self):
            pass

        def __del__(self):
            if getattr(self, 'ended', False):
                cuda.live[self.id] -= 1
                cuda.workspaces.pop(self.stream, None)

    return FakeGraph


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    """Two devices; a part of torch.cuda that is not named here is torch's own."""
    fake = FakeCuda()

    class Event:
        def __init__(self, **options):
            pass

        def record(self, stream=None):
            fake.events.append(stream or fake.current_stream())

        def synchronize(self):
            pass

    for name, value in {
            'CUDAGraph': make_graph_class(fake), 'Stream': fake.new_stream, 'Event': Event, 'current_stream': fake.current_stream,
            'set_stream': fake.set_stream, '_exchange_device': fake.exchange_device,
            '_maybe_exchange_device': fake.exchange_device, 'synchronize': lambda device=None: None,
            'empty_cache': lambda: None, 'current_device': lambda: fake.device, 'is_available': lambda: True,
            'device_count': lambda: 2}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._utils, '_get_current_device_index', lambda: fake.device)
    monkeypatch.setattr(torch._C, '_cuda_clearCublasWorkspaces', fake.workspaces.clear, raising=False)
    monkeypatch.setattr(torch._C, '_host_emptyCache', lambda: None, raising=False)
    return fake
