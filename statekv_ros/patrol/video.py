"""A patrol as camera frames with their times, at any size."""
from collections.abc import Iterator

import numpy as np

from statekv_ros.patrol.render import FRAMES_PER_STEP, render
from statekv_ros.patrol.world import Patrol

FRAME_NS = 10**9 // FRAMES_PER_STEP       # a step is one second


def patrol_frames(patrol: Patrol, seed: int, width: int = 320, height: int = 240) -> Iterator[tuple[int, np.ndarray]]:
    """(time since the start in ns, uint8 [height, width, 3] RGB) of every frame; the same for the same seed."""
    for index, step in enumerate(patrol.steps):
        for half, frame in enumerate(render(step, np.random.default_rng([seed, index]), width, height)):
            yield (FRAMES_PER_STEP * index + half) * FRAME_NS, frame
