"""A patrol as camera frames with their times, at any size."""
from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np

from statekv_ros.patrol.render import FRAMES_PER_STEP, render
from statekv_ros.patrol.world import Patrol

FRAME_NS = 10**9 // FRAMES_PER_STEP       # a step is one second


def patrol_frames(patrol: Patrol, seed: int, width: int = 320, height: int = 240) -> Iterator[tuple[int, np.ndarray]]:
    """(time since the start in ns, uint8 [height, width, 3] RGB) of every frame; the same for the same seed."""
    return ((time_ns, frame()) for time_ns, frame in patrol_images(patrol, seed, width, height))


def patrol_images(patrol: Patrol, seed: int, width: int, height: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    """As `patrol_frames`, each frame drawn only when it is called: an hour of them takes seconds to draw."""
    for index, step in enumerate(patrol.steps):
        shown = cache(partial(render, step, np.random.default_rng([seed, index]), width, height))
        for half in range(FRAMES_PER_STEP):
            yield (FRAMES_PER_STEP * index + half) * FRAME_NS, lambda shown=shown, half=half: shown()[half]
