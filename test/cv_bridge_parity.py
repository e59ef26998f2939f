"""What cv_bridge and OpenCV make of every encoding, as JSON; for any Python that has cv_bridge."""
import json
import sys
from types import SimpleNamespace

import cv2
import numpy as np

from statekv_ros import images

SIZES = (8, 6), (34, 20), (640, 480)        # width, height


def message(name: str, width: int, height: int, padding: int, big: bool) -> SimpleNamespace:
    """A message of random bytes whose rows are padded."""
    layout = images.ENCODINGS[name]
    rows = height * layout.rows_per_height[0] // layout.rows_per_height[1]
    step = width * layout.channels * layout.sample_bytes + padding
    data = np.random.default_rng(width).integers(0, 256, rows * step, dtype=np.uint8)
    return SimpleNamespace(encoding=name, width=width, height=height, step=step, is_bigendian=big, data=data.tobytes())


def compare(name: str) -> dict:
    """Whether cv_bridge did it, and the largest difference between it, OpenCV, and cv_bridge without our checks."""
    told = {'bridge': images.bridge_for(name) is not None, 'apart': 0, 'apart_unchecked': None}
    for width, height in SIZES:
        for padding, big in ((0, False), (0, True), (16, False), (16, True)):
            sent = message(name, width, height, padding, big)
            made = images.decode_image(sent).astype(int)
            remembered, images.bridge_for = images.bridge_for, lambda name: None
            by_opencv = images.decode_image(sent)
            images.bridge_for = remembered
            told['apart'] = max(told['apart'], int(abs(made - by_opencv).max()))
        if told['bridge']:
            plain = images._bridge().imgmsg_to_cv2(message(name, width, height, 0, False), 'rgb8').astype(int)
            told['apart_unchecked'] = max(told['apart_unchecked'] or 0,
                                          int(abs(plain - images.decode_image(message(name, width, height, 0, False))).max()))
    return told


if __name__ == '__main__':
    print(json.dumps({'versions': [sys.version.split()[0], np.__version__, cv2.__version__],
                      'installed': images._bridge() is not None,
                      'encodings': {name: compare(name) for name in images.ENCODINGS}}))
