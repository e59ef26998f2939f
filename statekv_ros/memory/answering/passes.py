"""An answer's pass of one token as recorded work: the host launches it at once, rather than kernel by kernel.

What changes from token to token is read on the device: the token, its position, its place in the tail; and which pages are in few
bits by now, for each frame changes that. What the host decides besides, from how many pages are held to where they lie, is part
of the recording (`Reading.place`): when it changes, because something grew, slid, was sorted or forgotten as frames came in between,
or because the tail grew, passes run eagerly until it pays to record anew. Eager are also those in whose middle the host has to
look, as for pages that it fetches from below the device, and those that several answers share (`Rows`).
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.backbones.upload import copy_to_device
from statekv_ros.errors import Interrupted
from statekv_ros.memory.answering.notes import Noted
from statekv_ros.memory.answering.reading import Reading
from statekv_ros.memory.recorded import require_same
from statekv_ros.memory.recorded_decode import DecodeGraphs


@dataclass(frozen=True)
class _Recording:
    """A pass of one token.

    Attributes:
        place: of the reading, which must be there at every replay.
        given: token, position and place in the tail, [3] int64 on the device.
        logits: [1, vocabulary], and what was noted: each replay fills them anew.
    """
    place: tuple
    given: torch.Tensor
    replay: Callable[[], None]
    logits: torch.Tensor
    noted: Noted


class TokenPasses:
    """The passes of one token of one answer that nobody shares: replayed, or eager. A recording is compared with the eager pass
    that it was made after; where they differ, or nothing can be recorded, a warning says why."""

    def __init__(self, backbone: Backbone, reading: Reading, graphs: DecodeGraphs | None):
        """graphs: None where all passes are eager; else the backbone is a `Family`."""
        self._backbone, self._reading, self._graphs = backbone, reading, graphs
        self._recording: _Recording | None = None
        self._place: tuple | None = None
        self._passes = 0    # in this place

    def logits(self, token: int, position: int, left: int) -> torch.Tensor:
        """Logits [1, vocabulary] of what follows a token; the next pass may overwrite them. `Reading.begin` was called for it.

        Args:
            left: tokens of the answer that may follow the next one.

        Raises:
            Interrupted: as `Reading.attend`; a replay looks once, before it begins.
        """
        reading, recording, graphs = self._reading, self._recording, self._graphs
        place = None if graphs is None or graphs.off else reading.place()
        self._passes = self._passes + 1 if place == self._place else 1
        self._place = place
        if recording is not None and recording.place == place and recording.replay is graphs.newest:
            reading.check_cancelled()
            self._give(recording.given, token, position)
            recording.replay()
            reading.note(recording.noted)
            graphs.replays += 1
            return recording.logits
        self._recording = None
        logits = self._backbone.logits(self._backbone.forward(self._backbone.embed([token], position), reading)[:, -1])
        if place is not None and self._passes >= graphs.recorded_at <= left:
            self._record(token, position, place, logits)
        return logits

    def _record(self, token: int, position: int, place: tuple, logits: torch.Tensor) -> None:
        """Record a pass that has just been run eagerly; whatever happens, the reading stays as that left it."""
        reading, given = self._reading, torch.zeros(3, dtype=torch.int64, device=self._backbone.device)
        self._give(given, token, position)
        row, eager = reading.tail.newest(), reading.noted()
        try:
            replay, (said, noted) = self._graphs.record(lambda: self._pass(given))
            replay()
            if reading.place() != place:
                raise RuntimeError('what a token attends to moved while it was recorded')
            require_same('token', [said, noted.sums()], [logits, eager.in_few().sums()], 'logits, attention noted')
        except Interrupted:
            raise
        except Exception as error:  # CUDA and the library raise many kinds; eager passes go on after any of them
            self._graphs.failed(error)
        else:
            self._recording = _Recording(place, given, replay, said, noted)
        finally:
            reading.tail.put_back(row)
            reading.note(eager)

    def _pass(self, given: torch.Tensor) -> tuple[torch.Tensor, Noted]:
        """What is recorded: logits, and what is noted."""
        token, position, place = given.split(1)
        self._reading.tail.begin_at(place)
        inputs = self._backbone.embed_there(token[None], position[None])
        logits = self._backbone.logits(self._backbone.forward(inputs, self._reading)[:, -1])
        return logits, self._reading.noted().in_few()

    def _give(self, given: torch.Tensor, token: int, position: int) -> None:
        copy_to_device(torch.tensor([token, position, self._reading.tail.next_place]), given)
