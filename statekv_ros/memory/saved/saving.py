"""What every frame step changes in a memory, brought to the host for whoever keeps it: its keys and values as the model
computed them, where it stands, and what became of the carried context."""
from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch

from statekv_ros.backbones.base import TokenInputs
from statekv_ros.memory.carried.recent import RecentFrames
from statekv_ros.memory.carried.state import CompressedState
from statekv_ros.memory.detailed.pages import Stretch
from statekv_ros.memory.intake import PendingFrames
from statekv_ros.memory.pose import Pose
from statekv_ros.memory.records import StepRecord
from statekv_ros.memory.saved.needs import Needs

PREFIX, WAITING = -1, -2        # step numbers of what comes before the first frame, and of frames that wait for a step
LONGEST_CYCLE = 256


@dataclass(frozen=True)
class SavedStep:
    """One step's number, what is known of it (JSON), and its tensors on the host."""
    step: int
    header: dict
    parts: dict[str, torch.Tensor]

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


class Saving:
    """Belongs to one stream, which calls `catch` before a step's commit and `finish` after it.

    With each step goes what it changed in the carried context, and a share of that context in full, so that all of it is
    written once per `cycle` steps and nothing large is ever written at once.

    Attributes:
        cycle: see above.
        whole: the next step is to be saved with all of the carried context, because what was saved before does not lead there.
        oldest_ns: oldest header stamp that the stream has seen; None before the first.
        needs: from which step on saved steps lead to the newest one.
    """

    def __init__(self):
        self.cycle = LONGEST_CYCLE
        self.clear()

    def clear(self) -> None:
        """The stream has forgotten everything."""
        self.whole = True
        self.oldest_ns: int | None = None
        self.needs = Needs()
        self._next_slot = 0
        self._steps: list[SavedStep] = []
        self._packed: list[tuple[int, torch.Tensor]] = []
        self._poses: list[tuple[int, Pose]] = []

    def catch(self, record: StepRecord, inputs: TokenInputs, position: int, frames: int,
              carried: CompressedState | RecentFrames, stretch: Stretch | None) -> SavedStep:
        """The begun step's part, while its keys and values still lie side by side.

        Args:
            inputs: at their true positions; position: where the stream stood before them.
            frames: camera frames before it.
            stretch: of the detailed cache, that it stands in; None for the prefix.
        """
        key, value = carried.frame()[:2]
        header = {'record': _plain(record), 'position': position, 'shift': carried.shift, 'before': {
            'frames': frames, 'oldest_ns': self.oldest_ns}}
        if stretch is not None:
            header |= {'stretch': [stretch.position, stretch.shift], 'first_stamp_ns': record.first_stamp_ns,
                       'last_stamp_ns': record.last_stamp_ns}
        if record.pose is not None:
            header['pose'] = record.pose.saved()
        return SavedStep(record.step, header, _on_host({'key': key, 'value': value, 'positions': inputs.positions}))

    def finish(self, caught: SavedStep, carried: CompressedState | RecentFrames, detailed: dict[str, torch.Tensor],
               progress: dict) -> None:
        """The step was committed; `detailed`: what the detailed cache made of it; `progress`: where the stream stands now."""
        record = caught.header['record']
        if caught.step >= 0:
            self.oldest_ns = min(self.oldest_ns or record['first_stamp_ns'], record['first_stamp_ns'])
        whole, self.whole = self.whole, True    # should anything below fail, this step is missing
        header, parts = carried.change(record['first_ordinal'], record['tokens'])
        share, slots = None, self._slots(carried, whole)
        if slots is not None:
            share, more = carried.share(slots)
            parts |= more
            self._next_slot = slots.stop
        self.needs.note(caught.step, record['first_ordinal'], header, share)
        self._steps.append(SavedStep(caught.step, {
            **caught.header, 'carried': header, 'share': share, 'needs': self.needs.first, 'after': progress},
            {**caught.parts, **_on_host(parts), **_on_host(detailed)}))
        self.whole = carried.rewritten = False

    def take(self) -> list[SavedStep]:
        """The steps since the last call; two when the prefix was among them."""
        steps, self._steps = self._steps, []
        return steps

    def pack(self, step: int, packed: torch.Tensor) -> None:
        """The detailed cache has put a step into few bits."""
        self._packed.append((step, packed.to('cpu', copy=True)))

    def take_packed(self) -> list[tuple[int, torch.Tensor]]:
        """Number and part `packed` of each step that was put into few bits since the last call, oldest first."""
        packed, self._packed = self._packed, []
        return packed

    def place(self, step: int, pose: Pose) -> None:
        """Where a step was seen is told after it was saved; `WAITING`: the frames that wait."""
        self._poses.append((step, pose))

    def take_poses(self) -> list[tuple[int, Pose]]:
        """What `place` was told since the last call."""
        poses, self._poses = self._poses, []
        return poses

    def packed_already(self, steps: set[int]) -> None:
        """These are kept in few bits already."""
        self._packed = [(step, packed) for step, packed in self._packed if step not in steps]

    def snapshot(self, carried: CompressedState | RecentFrames, stretch: Stretch | None, progress: dict) -> SavedStep:
        """All of the carried context, so that no step so far is needed any more; `stretch` of the newest step."""
        share, parts = carried.share(slice(0, carried.tokens))
        self.needs.begin_at(progress['steps'], progress['next_ordinal'], carried.tokens)
        return SavedStep(progress['steps'] - 1, {'shift': carried.shift, 'share': share, 'oldest_ns': self.oldest_ns,
                                                 'stretch': stretch and [stretch.position, stretch.shift],
                                                 'after': progress}, _on_host(parts))

    def resume(self, share: dict | None, oldest_ns: int | None) -> None:
        """Go on behind a step that was saved with this share; `needs` is the caller's."""
        self.whole, self.oldest_ns = False, oldest_ns
        self._next_slot = share['share'][1] if share else 0

    def _slots(self, carried: CompressedState | RecentFrames, whole: bool) -> slice | None:
        if whole or carried.rewritten:
            return slice(0, carried.tokens)
        if not carried.budget:      # frames are carried whole: the steps have all of it
            return None
        begin = self._next_slot if self._next_slot < carried.tokens else 0
        return slice(begin, min(carried.tokens, begin - (-carried.tokens // self.cycle)))


def waiting(pending: PendingFrames, progress: dict) -> SavedStep:
    """The frames that wait for a step."""
    header = {name: value for name, value in vars(pending).items() if name not in ('frames', 'pose', 'settled')}
    return SavedStep(WAITING, {'waiting': header, 'pose': pending.pose and pending.pose.saved(), 'after': progress},
                     {'frames': torch.from_numpy(np.stack(pending.frames))})


def _plain(record: StepRecord) -> dict:
    """Without the pose, which is a part of the header: versions of this package that know no poses then read the rest."""
    values = asdict(record)
    del values['pose']
    return values


def _on_host(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: part.detach().to('cpu', copy=True, memory_format=torch.contiguous_format) for name, part in parts.items()}
