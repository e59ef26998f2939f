"""Fixtures shared by the tests: real things made small."""
import multiprocessing
import os
import subprocess
from concurrent.futures import ProcessPoolExecutor
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


def entries_at(table, layer: int, places: slice | torch.Tensor) -> torch.Tensor:
    """Index entries of a `PageTable` at some places, or at places [kv_heads, pages] that each KV head has of its own,
    [kv_heads, pages, entry_width]."""
    given = table.layer(layer)
    if isinstance(places, slice):
        places = torch.arange(places.start, places.stop)[None]
    places = places.expand(len(given.exact), -1)
    heads = torch.arange(len(given.exact))[:, None]
    found = given.exact[heads, (places + given.offset).clamp(0, max(0, given.exact.shape[1] - 1))]
    if given.strays.numel():
        strays = given.strays[heads, (~places - given.first_stray).clamp(0, given.strays.shape[1] - 1)]
        found = torch.where((places < 0)[..., None], strays, found)
    if not given.codes.numel():
        return found
    at = (places - given.base).clamp(0, given.codes.shape[1] - 1)
    pairs = given.codes[heads, at]
    levels = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(2)[..., :found.shape[2]] - 7.5
    step = given.steps[heads, at // given.volume] * given.scales[heads, at // given.leaf][..., None]
    leaf = ((places - given.first_leaf) // given.leaf).clamp(0, given.leaves.shape[1] - 1)
    return torch.where(((places >= 0) & (places < given.stop))[..., None], given.leaves[heads, leaf] + step * levels, found)


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


@pytest.fixture(scope='module')
def interpreter():
    """`interpreter(function, *arguments)` calls a function of a test file where Triton interprets its kernels."""
    pytest.importorskip('triton')
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('TRITON_INTERPRET', '1')   # from that process's first import on
            pool.submit(torch.set_num_threads, 1).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture(params=['interpreter', 'cuda'])
def run_triton(request):
    """`run_triton(function, case)` calls function(case, 'triton', device) on a GPU or interpreted."""
    if request.param == 'interpreter':
        run = request.getfixturevalue('interpreter')
        return lambda function, case: run(function, case, 'triton', 'cpu')
    if not torch.cuda.is_available():
        pytest.skip('needs a CUDA device')
    return lambda function, case: function(case, 'triton', 'cuda')
