"""The node's memory folder at its start: what made the memory there, what is brought back of it, and where a new one begins."""
from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from statekv_ros.backbones.base import Backbone
from statekv_ros.backbones.weights import AS_STORED
from statekv_ros.errors import StoreBusy, StoreError, StoreMismatch
from statekv_ros.memory import VideoStream
from statekv_ros.memory.saved.restoring import restore
from statekv_ros.memory.saved.saving import Saving
from statekv_ros.node.disk import Disk
from statekv_ros.store import MemoryStore
from statekv_ros.store.folder import DATA
from statekv_ros.store.kept import KeptCamera
from statekv_ros.store.tier import DiskTier

RESTORE = ('auto', 'require', 'never')
SAVED_FORMAT = 2        # of headers and parts of a step
_PLACES = 4             # folders that are looked at for one that this node can use
_BUSY_S = 5.0           # for a process that is ending to let go
_BUSY_TURN_S = 0.1


def identity_of(backbone: Backbone, streams: dict[str, VideoStream], frame_pixels: str, system_prompt: str,
                rope_length: int) -> dict[str, str | int]:
    """What must be the same for a memory to go on.

    Args:
        frame_pixels: the parameters that bound a frame's size, in words.
    """
    stream, layout = next(iter(streams.values())), backbone.layout
    # Said only where it is so: memories that are older than the parameter say nothing of it.
    quantised = {'weights': backbone.weights} if backbone.weights != AS_STORED else {}
    return {'model': backbone.fingerprint, 'dtype': str(backbone.dtype).removeprefix('torch.'),
            'layout': f'{layout.layers}x{layout.kv_heads}x{layout.head_dim}', 'prefill_policy': str(stream.prefill_policy),
            'positions': str(stream.positions), 'frame_pixels': frame_pixels, 'system_prompt': system_prompt,
            'rope_length': rope_length, 'detailed_format': stream.detailed_format, 'cameras': ', '.join(streams),
            'saved_format': SAVED_FORMAT, **quantised}


def open_memory(folder: Path, identity: dict[str, str | int], streams: dict[str, VideoStream], tiers: dict[str, DiskTier],
                quota_bytes: int, sync_period_s: float, mode: str, owner: str, tell: Callable[[str], None],
                log: Callable[[str], None]) -> tuple[Disk | None, str]:
    """Bring back what the folder has for these streams, and write on from there.

    Where that cannot be, a new memory begins in a folder inside, which the next start with the same `identity` finds again;
    what was there stays as it is.

    Args:
        tiers: by camera, the lowest of each stream; they read from the store that is opened.
        mode: 'auto'; 'require': a memory that cannot be brought back is an error; 'never': begin an empty one.
        owner: whom to name to a second writer.
        tell: takes what was brought back; log: what went wrong.

    Returns:
        What writes from now on, None where nothing can be written; and what is wrong, '' when nothing is.

    Raises:
        ParameterError: a quota or period that cannot work.
        StoreBusy: another process writes there.
        StoreError: with `require`, that the folder cannot be used or was made by something else.
    """
    problem = ''
    for place in _places(folder, identity, mode):
        for stream in streams.values():
            stream.reset()
            stream.saving = Saving()
        try:
            store = _open(place, identity, quota_bytes, sync_period_s, owner)
        except StoreError as error:
            if mode == 'require' or isinstance(error, StoreBusy):
                raise
            log(f'{error}')
            if not isinstance(error, StoreMismatch):
                problem = problem or str(error)
            if not (place / DATA).exists():     # it is not for what lies there
                break
            continue
        try:
            kept = {name: KeptCamera(store, name, tiers[name]) for name in streams}
            told = [_bring_back(store, name, stream) for name, stream in streams.items()]
        except StoreError as error:
            store.close()
            if mode == 'require':
                raise
            log(f'{error}')
            problem = problem or str(error)
            continue
        except BaseException:
            store.close()
            raise
        for sentence in filter(None, told):
            tell(sentence)
        if place != folder:
            tell(f'memory on disk: {place}')
            problem = problem and f'{problem}; a new memory was begun in {place}'
        return Disk(store, quota_bytes, streams, kept, log), problem
    for tier in tiers.values():
        tier.detach()
    for stream in streams.values():
        stream.reset()
        stream.saving = None
    return None, f'nothing is kept for a restart: {problem}'


def _places(folder: Path, identity: dict[str, str | int], mode: str) -> list[Path]:
    if mode == 'never':
        began = [folder, *(folder / f'began-{number}' for number in range(1, 10000))]
        return [next((place for place in began if not _in_use(place)), folder)]
    if mode == 'require':
        return [folder]
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return [folder, *(folder / f'other-{name}-{number}' for number in range(1, _PLACES))]


def _in_use(place: Path) -> bool:
    return place.is_dir() and any(place.iterdir())


def _open(place: Path, identity: dict[str, str | int], quota_bytes: int, sync_period_s: float, owner: str) -> MemoryStore:
    end = time.monotonic() + _BUSY_S
    while True:
        try:
            return MemoryStore.open(place, identity, quota_bytes, sync_period_s, owner)
        except StoreBusy:
            if time.monotonic() > end:
                raise
            time.sleep(_BUSY_TURN_S)


def _bring_back(store: MemoryStore, camera: str, stream: VideoStream) -> str:
    restored = restore(stream, store, camera)
    if restored.last_stamp_ns is None:
        return ''
    sentence = (f'camera {camera} goes on behind frame {restored.frames}, of stamp {restored.last_stamp_ns / 1e9:.3f} s, from '
                f'{store.folder}; {restored.held_frames} frames can be asked about')
    return '; '.join([sentence, *restored.damaged])
