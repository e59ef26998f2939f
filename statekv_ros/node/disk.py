"""The memory on disk while the node watches: one thread writes what the engine hands over, step by step. No ROS in here."""
from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from statekv_ros.errors import StoreError
from statekv_ros.memory import VideoStream
from statekv_ros.memory.pose import Pose
from statekv_ros.memory.saved.saving import LONGEST_CYCLE, WAITING, SavedStep, waiting
from statekv_ros.node.pictures import Album
from statekv_ros.store import MemoryStore
from statekv_ros.store.kept import KeptCamera
from statekv_ros.store.tier import PICTURE

_MARGIN_STEPS = 8       # a camera's context gets a snapshot when so few steps are left before those that lead to it are dropped
_LONG_S = 2.0           # a write that takes longer is told


class Disk:
    """Owns the store. The engine hands over what a step changed and takes no further image of that camera until it is written
    (`busy`), so that a killed process loses at most the step in progress; answers go on meanwhile.

    What cannot be written is told and costs the steps it concerns: watching goes on, and the next step that can be written
    holds all of the carried context.

    Attributes:
        on_idle: called in the writing thread whenever something was written.
        albums: by camera, of those whose steps are stored with their pictures.
    """

    def __init__(self, store: MemoryStore, quota_bytes: int, streams: dict[str, VideoStream], kept: dict[str, KeptCamera],
                 log: Callable[[str], None]):
        """
        Args:
            streams: by camera; each has its `saving`.
            kept: by camera.
            log: takes what goes wrong, and that it is well again.
        """
        self._store, self._quota, self._streams, self._kept, self._log = store, quota_bytes, streams, kept, log
        self.on_idle: Callable[[], None] = lambda: None
        self.albums: dict[str, Album] = {}
        self._jobs: queue.SimpleQueue[tuple[list[str], Callable[[], None]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = dict.fromkeys(streams, 0)
        self._closed = False
        self._problems: dict[str, str] = {}
        self._uncleared: set[str] = set()
        self._wanted: set[str] = set()              # cameras whose context needs a snapshot
        self._snapshot_at: dict[str, int] = {}      # steps that it holds
        self._begun: float | None = None
        self._written_ms, self._file_bytes = 0.0, store.file_bytes()
        self._thread = threading.Thread(target=self._run, name='statekv-disk', daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str:
        """What is wrong with it just now, '' when nothing is."""
        begun = self._begun
        slow = time.monotonic() - begun if begun is not None else 0.0
        sentences = dict.fromkeys(self._problems.copy().values())
        if slow > _LONG_S:
            sentences[f'{self._store.folder} has been written to for {slow:.0f} s: images wait for it'] = None
        return '; '.join(sentences)

    def facts(self) -> dict:
        """For /diagnostics."""
        return {'memory_folder': self._store.folder, 'disk_mb': round(self._file_bytes / 1e6, 1),
                'disk_write_ms': round(self._written_ms, 2)}

    def busy(self, camera: str) -> bool:
        """Whether something of a camera is still to be written."""
        return self._open[camera] > 0

    def save(self, camera: str) -> None:
        """Write what the camera's newest frame changed; in the engine thread, right after the frame."""
        stream = self._streams[camera]
        steps, packed, needed = stream.saving.take(), stream.saving.take_packed(), stream.saving.needs.first
        if stream.pending:
            steps.append(waiting(stream.pending, stream.progress()))
        if steps or packed:
            self._submit([camera], lambda: self._put(camera, steps, packed, needed))

    def save_poses(self, camera: str) -> None:
        """Write the poses that came after their steps were saved, if any did; in the engine thread."""
        poses = self._streams[camera].saving.take_poses()
        if poses:
            self._submit([camera], lambda: self._put_poses(camera, poses))

    def save_snapshots(self) -> None:
        """Write the whole context of cameras whose steps the quota is about to take; in the engine thread, between steps."""
        for camera in [name for name in self._streams if name in self._wanted]:
            self._wanted.discard(camera)
            stream = self._streams[camera]
            if stream.steps and self._snapshot_at.get(camera) != stream.steps:
                snapshot = stream.saving.snapshot(stream.carried, stream.detailed.stretch, stream.progress())
                self._submit([camera], lambda camera=camera, snapshot=snapshot: self._put_snapshot(camera, snapshot))

    def clear(self, cameras: Iterable[str], done: Callable[[str], None]) -> None:
        """Forget what is on disk of cameras whose streams were reset; `done` gets an error, '' when it is gone. In the engine
        thread; `done` is called in the writing one."""
        cameras = list(cameras)
        self._submit(cameras, lambda: done(self._clear(cameras)))

    def submit(self, work: Callable[[], None]) -> bool:
        """Do something else in the writing thread, after what came before; False when it is closed. From any thread."""
        with self._lock:
            if not self._closed:
                self._jobs.put(([], work))
            return not self._closed

    def picture(self, camera: str, step: int) -> bytes | None:
        """As `KeptCamera.picture`."""
        return self._kept[camera].picture(step)

    def waiting_picture(self, camera: str) -> bytes | None:
        """That of the frame that waits for a step."""
        return self._kept[camera].picture(WAITING)

    def close(self, timeout_s: float = 4.0) -> bool:
        """Write what is waiting, flush and close; True when that was done in time."""
        with self._lock:
            self._closed = True
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _submit(self, cameras: list[str], work: Callable[[], None]) -> None:
        with self._lock:
            for camera in cameras:
                self._open[camera] += 1
        self._jobs.put((cameras, work))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            cameras, work = job
            self._begun = time.monotonic()
            try:
                work()
            except Exception:   # of a callback, or nobody's guess: the thread that writes must outlive it
                self._log(f'writing to {self._store.folder} failed: {traceback.format_exc()}')
                for camera in cameras:
                    self._streams[camera].saving.whole = True
            finally:
                self._written_ms, self._begun = (time.monotonic() - self._begun) * 1e3, None
                with self._lock:
                    for camera in cameras:
                        self._open[camera] -= 1
                self.on_idle()
        try:
            self._store.close()
        except StoreError as error:
            self._log(str(error))

    def _put(self, camera: str, steps: list[SavedStep], packed: list[tuple[int, torch.Tensor]], needed: int) -> None:
        gone, kept = [], self._kept[camera]
        # Waiting frames may still fit where no step does.
        with self._telling(camera, well=any(step.step >= 0 for step in steps)):
            if camera in self._uncleared:
                kept.clear()
                self._uncleared.discard(camera)
            gone += kept.save([self._with_picture(camera, step) for step in steps], packed, needed)
            if camera in self.albums:
                for step in steps:
                    self.albums[camera].wrote(step.step)
        if steps:
            saving, size = self._streams[camera].saving, max(step.bytes for step in steps)
            saving.cycle = max(1, min(LONGEST_CYCLE, self._quota // (2 * len(self._streams) * size)))
        self._file_bytes = self._store.file_bytes()
        self._look_after(gone)

    def _put_poses(self, camera: str, poses: list[tuple[int, Pose]]) -> None:
        gone = []
        if camera not in self._uncleared:       # else what lies there is of steps that were forgotten
            with self._telling(camera, well=False):
                gone += self._kept[camera].place(poses)
        self._look_after(gone)

    def _with_picture(self, camera: str, step: SavedStep) -> SavedStep:
        number = step.header['after']['steps'] if step.step == WAITING else step.step
        picture = self.albums[camera].newest(number) if camera in self.albums else b''
        return replace(step, parts={**step.parts, PICTURE: picture}) if picture else step

    def _put_snapshot(self, camera: str, snapshot: SavedStep) -> None:
        with self._telling(camera):
            self._look_after(self._store.save_state(camera, snapshot.header, snapshot.parts))
            self._snapshot_at[camera] = snapshot.step + 1

    def _look_after(self, gone: list[tuple[str, int]]) -> None:
        for camera, step in gone:
            if camera in self._kept:
                self._kept[camera].left(step)
            if camera in self._streams and step + _MARGIN_STEPS >= self._streams[camera].saving.needs.first:
                self._wanted.add(camera)

    def _clear(self, cameras: list[str]) -> str:
        for camera in cameras:
            self._uncleared.add(camera)
            self._snapshot_at.pop(camera, None)
            try:
                self._kept[camera].clear()
            except StoreError as error:
                return f'what camera {camera} saw is forgotten, but not on disk: {error}'
            self._uncleared.discard(camera)
        return ''

    @contextlib.contextmanager
    def _telling(self, camera: str, well: bool = True) -> Iterator[None]:
        """Around what writes for a camera: an error of the store is told once, and so is that it is over, which success shows
        if `well`."""
        try:
            yield
        except StoreError as error:
            self._streams[camera].saving.whole = True
            sentence = f'what camera {camera} sees is not kept for a restart: {error}'
            if camera not in self._problems:
                self._log(sentence)
            self._problems[camera] = sentence
        else:
            if well and self._problems.pop(camera, None):
                self._log(f'what camera {camera} sees is kept for a restart again')
