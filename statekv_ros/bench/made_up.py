"""A memory that is filled with noise of a model's shapes, a step a second, rather than watched."""
import argparse
import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.progress import track

from statekv_ros.backbones.family import Family
from statekv_ros.bench.noise import NoiseSteps
from statekv_ros.bench.tiered import TieredMemory

_NS = 10**9


def made_up(backbone: Family, args: argparse.Namespace, counts: Sequence[int], size: tuple[int, int],
            folders: contextlib.ExitStack) -> Iterator[tuple[int, TieredMemory]]:
    """The memory whenever it has as many steps as one of `counts`, ascending.

    Args:
        args: `tiered.BOUNDS`, detailed_format, seed, benchmark and json (nothing is shown of how far it is).
        size: height and width of frames in pixels.
        folders: removes what was on disk in the end.
    """
    memory = TieredMemory(backbone, argparse.Namespace(**vars(args) | {'prefill_policy': 'none'}), folders)
    memory.stream.graphs = NoiseSteps(backbone, args.seed)
    picture, each = np.zeros((*size, 3), np.uint8), backbone.frames_per_step
    for number in track(range(counts[-1]), 'filling', console=Console(stderr=True), disable=args.json):
        memory.watch([(number * _NS + part * _NS // each + 1, picture) for part in range(each)])
        if number + 1 in counts:
            yield number + 1, memory
