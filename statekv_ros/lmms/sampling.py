"""Which frames of a video are watched: the harness's rule, and the paper's numbers."""
from fractions import Fraction

import numpy as np


def frame_indices(frames: int, rate_hz: Fraction | float, fps: float, max_frames: int) -> np.ndarray:
    """Evenly spaced from the first frame to the last, `fps` for each second but at most `max_frames`, and at least one; as
    the harness's `read_video` has them. StateKV's protocol is fps 1, max_frames 512.

    Args:
        frames: of the whole video; rate_hz: how many of them to a second.

    Returns:
        Numbers of frames, ascending, int.
    """
    wanted = min(float(max_frames), float(frames / rate_hz * fps))
    return np.linspace(0, frames - 1, min(frames, max(1, int(wanted))), dtype=int)
