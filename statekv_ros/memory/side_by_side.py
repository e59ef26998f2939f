"""What the layers attend to while steps of several streams go through the model as one: each row of the batch its own past."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from statekv_ros.backbones.upload import copy_to_device
from statekv_ros.kernels.scored_attention import default_implementation
from statekv_ros.kernels.scored_attention.streams import Stream, entries, new_table, scored_attention_of_streams
from statekv_ros.memory.carried.state import CompressedState
from statekv_ros.memory.stream import VideoStream


class States:
    """Compressed states of different lengths, whose steps were begun: one launch a layer."""

    def __init__(self, carried: Sequence[CompressedState], streams: Sequence[Stream]):
        """streams: of these states, where their frames' tokens stand in the batch."""
        self._carried, self._streams = tuple(carried), tuple(streams)
        self._table: torch.Tensor | None = None

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        if self._table is None and query.device.type != 'cpu':      # where there are no kernels that would read it
            self._tabulate(new_table(self._streams))
        return scored_attention_of_streams(query, key, value, self._streams, layer, scale, self._table)

    def place(self) -> tuple | None:
        """As `CompressedState.place`: how many there are and the longest one's length, for kernels find them by a table. On a GPU
        without its kernels None, since what the naive twin writes to would be recorded."""
        device = self._streams[0].key.device
        if any(state.place() is None for state in self._carried) or \
                device.type == 'cuda' and default_implementation(device) == 'naive':
            return None
        return len(self._streams), max(stream.live for stream in self._streams)

    def frame(self) -> tuple[torch.Tensor, ...]:
        """As `CompressedState.frame`, of one state after the other."""
        return tuple(part for state in self._carried for part in state.frame())

    def for_recording(self) -> 'States':
        """One that a recording is made over, for the states of whoever comes: it stands for some at a time and holds none."""
        recorded = States((), ())
        recorded._table = None if self._table is None else torch.empty_like(self._table)
        return recorded

    @contextmanager
    def standing_for(self, others: 'States') -> Iterator[None]:
        """Attend to those of `others`, as many as were recorded."""
        self._carried, self._streams = others._carried, others._streams
        if self._table is not None:
            self._tabulate(self._table)
        try:
            yield
        finally:
            self._carried = self._streams = ()      # one that is reset shall not live on here

    def _tabulate(self, table: torch.Tensor) -> None:
        copy_to_device(entries(self._streams, table), table)
        self._table = table


class AtOnce:
    """Streams that carry compressed states; see `States`."""

    def __init__(self, streams: Sequence[VideoStream], states: Sequence[Stream]):
        self._streams, self.carried = tuple(streams), States([stream.carried for stream in streams], states)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        self.check_cancelled()
        return self.carried.attend(layer, query, key, value, scale)

    def check_cancelled(self) -> None:
        """Raise Interrupted when a stream's `cancelled` says so."""
        for stream in self._streams:
            stream.check_cancelled()

    def replayed(self) -> None:
        """After a step that no layer attended to from here: `finish` is all that is left to do."""

    def finish(self) -> None:
        """After the last layer: hand keys and values to the detailed caches."""
        for stream in self._streams:
            stream.replayed()


class OneByOne:
    """Pasts of any kind, one stream after the other."""

    def __init__(self, streams: Sequence[VideoStream], columns: Sequence[slice]):
        self._rows = tuple(zip(streams, columns))

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        output = torch.zeros_like(query)
        for row, (stream, columns) in enumerate(self._rows):
            output[row, None, :, columns] = stream.attend(layer, *(part[row, None, :, columns] for part in (query, key, value)),
                                                          scale)
        return output

    def finish(self) -> None:
        """After the last layer: nothing is left to do."""


def side_by_side(streams: Sequence[VideoStream], columns: Sequence[slice]) -> AtOnce | OneByOne:
    """The memory of a batch whose steps were begun. columns: of each one's tokens in its row; what is beside them is padding."""
    states = [stream.carried.stream(own) for stream, own in zip(streams, columns)]
    return OneByOne(streams, columns) if None in states else AtOnce(streams, states)
