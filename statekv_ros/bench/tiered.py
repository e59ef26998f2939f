"""One memory on all its tiers, as a node keeps one; what a thread of its own does there is done here between the steps."""
import argparse
import contextlib
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

from statekv_ros.backbones import Backbone
from statekv_ros.errors import ParameterError
from statekv_ros.memory import VideoStream
from statekv_ros.memory.detailed.cache import PAGE_TOKENS
from statekv_ros.memory.detailed.formats import find_format
from statekv_ros.memory.records import StepReport
from statekv_ros.memory.saved.saving import Saving
from statekv_ros.store import MemoryStore
from statekv_ros.store.kept import KeptCamera
from statekv_ros.store.sizes import disk_step
from statekv_ros.store.tier import DiskTier

BOUNDS = ('device_cache_mb', 'host_cache_mb', 'disk_cache_gb')


class TieredMemory:
    """A stream and, where a part of it goes to disk, a folder that is removed again.

    Attributes:
        stream: the memory.
        store: what is on disk; None without such a tier.
        peak_bytes: the most that the detailed cache took after a step, by tier.
    """

    def __init__(self, backbone: Backbone, args: argparse.Namespace, folders: contextlib.ExitStack):
        """
        Args:
            args: prefill_policy, detailed_format and BOUNDS.
            folders: removes the folder in the end.
        """
        self._form = find_format(args.detailed_format)
        tier = DiskTier(packed=not self._form.rotated) if args.disk_cache_gb else None
        self.stream = VideoStream(
            backbone, args.prefill_policy, device_cache_bytes=round(args.device_cache_mb * 1e6),
            detailed_format=args.detailed_format, host_cache_bytes=round(args.host_cache_mb * 1e6), below=[tier] if tier else [])
        self.store: MemoryStore | None = None
        if tier:
            folder = folders.enter_context(tempfile.TemporaryDirectory(prefix=f'statekv-{args.benchmark}-'))
            self.store = folders.enter_context(MemoryStore.open(folder, {'benchmark': args.benchmark},
                                                                round(args.disk_cache_gb * 1e9)))
            self._kept = KeptCamera(self.store, 'camera', tier)
            self.stream.saving = Saving()
        self.peak_bytes: dict[str, int] = defaultdict(int)

    def watch(self, frames: Iterable[tuple[int, np.ndarray]]) -> StepReport:
        """Take the frames of one step, (stamp in ns, frame) each."""
        for stamp_ns, frame in frames:
            report = self.stream.step(frame, stamp_ns)
        if self.store:
            saving, kept = self.stream.saving, self._kept
            for _, step in kept.save(saving.take(), saving.take_packed(), saving.needs.first):
                kept.left(step)
        for tier, size in self.stream.detailed.tier_bytes.items():
            self.peak_bytes[tier] = max(self.peak_bytes[tier], size)
        return report

    def planned_disk_bytes(self) -> int:
        """Of the file, by what is planned for steps of the lengths of those held; without a store 0."""
        if self.store is None:
            return 0
        backbone, policy = self.stream.backbone, self.stream.prefill_policy
        budget = policy.budget if policy.kind == 'statekv' else 0
        lengths = Counter(record.tokens for record in self.stream.detailed.records())
        return sum(times * disk_step(backbone.layout, self._form, backbone.position_axes, tokens, budget, PAGE_TOKENS).kept
                   for tokens, times in lengths.items())


def check_bounds(args: argparse.Namespace) -> None:
    """Raises ParameterError where a bound is none."""
    for name in BOUNDS:
        if not 0 <= getattr(args, name) < float('inf'):
            raise ParameterError(f'--{name.replace("_", "-")} must be a number of at least 0, got {getattr(args, name)}')
