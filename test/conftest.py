"""Fixtures shared by the tests: real things made small."""
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from domains import new_domain
from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.tiny import write_tiny_checkpoint

# Tests run side by side, one per core; what they start in the default domain must hear no other worker's nodes.
torch.set_num_threads(1)
os.environ |= {'OMP_NUM_THREADS': '1', 'ROS_DOMAIN_ID': str(new_domain(keep=True))}
SECOND = 10**9


@pytest.fixture(scope='session')
def tiny_model_dir(tmp_path_factory) -> str:
    """Directory of a 3-layer Qwen3-VL with random weights."""
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp('models') / 'tiny'))


@pytest.fixture(scope='session')
def backbone(tiny_model_dir):
    """The tiny model, loaded once, fp32 on the CPU."""
    return load_backbone(tiny_model_dir, device='cpu', dtype='float32')


@pytest.fixture(scope='session')
def frames() -> list[np.ndarray]:
    """32 frames of 64x64 noise with a drifting bright square."""
    random = np.random.default_rng(0)
    pictures = []
    for index in range(32):
        picture = random.integers(0, 90, (64, 64, 3), dtype=np.uint8)
        picture[index:index + 16, 8:40] = (200, 40 + 6 * index, 20)
        pictures.append(picture)
    return pictures


@pytest.fixture
def mounted(tmp_path):
    """mount(options...) of a small tmpfs or a bind mount at tmp_path/mount; skips where that is not permitted."""
    target = tmp_path / 'mount'
    target.mkdir()

    def mount(*options: str) -> Path:
        done = subprocess.run(['mount', *options, str(target)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f'mount is not permitted here: {done.stderr.strip()}')
        return target
    yield mount
    while subprocess.run(['umount', str(target)], capture_output=True).returncode == 0:
        pass
