"""What the layers attend to while steps of several streams go through the model as one: each row of the batch its own past."""
from collections.abc import Sequence

import torch

from statekv_ros.backbones.upload import copy_to_device
from statekv_ros.kernels.scored_attention.streams import Stream, entries, new_table, scored_attention_of_streams
from statekv_ros.memory.stream import VideoStream


class AtOnce:
    """Compressed states of different lengths, in one launch a layer."""

    def __init__(self, streams: Sequence[VideoStream], states: Sequence[Stream]):
        """states: of the steps that were begun, one for each stream."""
        self._streams, self._states = tuple(streams), tuple(states)
        self._table: torch.Tensor | None = None
        if states[0].key.device.type != 'cpu':      # where there are no kernels that would read it
            self._table = new_table(states)
            copy_to_device(entries(states, self._table), self._table)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        for stream in self._streams:
            stream.check_cancelled()
        return scored_attention_of_streams(query, key, value, self._states, layer, scale, self._table)

    def finish(self) -> None:
        """After the last layer: hand keys and values to the detailed caches."""
        for stream in self._streams:
            stream.detailed.write_all(*stream.carried.frame()[:2])


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
    """The memory of a batch whose steps were begun; `columns`: of each one's tokens in its row, what is beside them is padding."""
    states = [stream.carried.stream(own) for stream, own in zip(streams, columns)]
    return OneByOne(streams, columns) if None in states else AtOnce(streams, states)
