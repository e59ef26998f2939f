"""A machine that cannot build or start a Triton kernel gets its naive twin and one sentence that says why."""
import os
import sysconfig
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from statekv_ros.kernels import fitness
from statekv_ros.kernels.paged_attention import paged_attention
from statekv_ros.kernels.scored_attention import default_implementation, scored_attention

CUDA = torch.device('cuda', 0)
pytest.importorskip('triton')


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A chip that the kernels are for; what is known of it is forgotten afterwards."""
    def use(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (major, minor))
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Tesla T4')
        fitness._unfit.cache_clear()
        fitness.forget_failures()

    use(9, 0)
    yield use
    fitness._unfit.cache_clear()
    fitness.forget_failures()


def build(folder) -> None:
    """Triton's own build of its launcher."""
    from triton.runtime.build import _build
    (folder / 'launcher.c').write_text('#include <Python.h>\n')
    _build('launcher', str(folder / 'launcher.c'), str(folder), [], [], [], [])


def no_compiler(monkeypatch, folder):
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setenv('PATH', str(folder))


def a_compiler_that_is_not_there(monkeypatch, folder):
    monkeypatch.setenv('CC', 'arm-gcc')


def no_headers(monkeypatch, folder):
    (folder / 'cc').write_text('#!/bin/sh\necho "fatal error: Python.h: No such file or directory" >&2\nexit 1\n')
    (folder / 'cc').chmod(0o755)
    monkeypatch.setenv('CC', str(folder / 'cc'))
    paths = sysconfig.get_paths() | {'include': str(folder / 'include')}
    monkeypatch.setattr(sysconfig, 'get_paths', lambda *arguments, **options: paths)


@pytest.mark.parametrize('lacks, words', [
    (no_compiler, 'with a C compiler, and none of gcc, clang is there: install one (Debian, Ubuntu: "apt install gcc")'),
    (a_compiler_that_is_not_there, 'CC=arm-gcc is not there'),
    (no_headers, 'Python.h is missing: install them (Debian, Ubuntu: "apt install python3.'),
])
def test_what_a_build_lacks_is_named_and_the_twin_takes_over(lacks, words, monkeypatch, tmp_path):
    lacks(monkeypatch, tmp_path)
    built = []

    def kernel():
        built.append(1)
        build(tmp_path)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        answers = [fitness.run_or_stand_in('scored_attention', CUDA, kernel, lambda: 'naive') for _ in range(3)]
    assert answers == ['naive'] * 3 and built == [1], 'it is not built anew in each layer of each frame'
    [told] = caught
    assert words in str(told.message) and 'scored_attention on cuda:0 is the naive one' in str(told.message)
    assert words in fitness.problem('scored_attention', CUDA) and fitness.problem('paged_attention', CUDA) == ''
    fitness.forget_failures()
    assert fitness.problem('scored_attention', CUDA) == ''


@pytest.mark.filterwarnings('ignore:.*is the naive one')
@pytest.mark.parametrize('triton_error, words', [
    ('OutOfResources', 'out of resource: shared memory, Required: 99999, Hardware limit: 65536'),
    ('PTXASError', 'PTXAS error: sm_110 is unknown'),
])
def test_kernels_that_a_chip_or_an_assembler_refuses_have_a_twin_too(triton_error, words):
    from triton.runtime import errors
    error = errors.OutOfResources(99999, 65536, 'shared memory') if triton_error == 'OutOfResources' \
        else errors.PTXASError('sm_110 is unknown')

    def kernel():
        raise error

    assert fitness.run_or_stand_in('paged_attention', CUDA, kernel, lambda: 'naive') == 'naive'
    assert words in fitness.problem('paged_attention', CUDA)


@pytest.mark.parametrize('error', [ValueError('query must be contiguous'), torch.OutOfMemoryError('GPU is full'),
                                   RuntimeError('CUDA error: an illegal memory access was encountered')])
def test_bad_arguments_a_full_and_a_lost_device_are_no_reason_to_give_up_the_kernel(error):
    def kernel():
        raise error

    with pytest.raises(type(error)):
        fitness.run_or_stand_in('scored_attention', CUDA, kernel, lambda: 'naive')
    assert fitness.problem('scored_attention', CUDA) == ''


def test_a_chip_that_is_too_old_is_refused_with_the_reason(hopper):
    hopper(7, 5)
    with pytest.warns(RuntimeWarning, match='Tesla T4 has compute capability 7.5, and the Triton kernels need 8.0'):
        assert default_implementation(CUDA) == 'naive'
    hopper(8, 0)
    assert default_implementation(CUDA) == 'triton'


@pytest.mark.skipif(torch.cuda.is_available() or 'TRITON_INTERPRET' in os.environ, reason='has a driver')
@pytest.mark.filterwarnings('ignore:.*is the naive one')
def test_both_attentions_go_on_where_a_launch_fails(monkeypatch):
    """Tensors that say they are on a GPU, and launches as they are, which fail on this machine."""
    monkeypatch.setattr('statekv_ros.kernels.scored_attention.naive_scored_attention', lambda *arguments: 'naive output')
    monkeypatch.setattr('statekv_ros.kernels.paged_attention.naive_paged_attention', lambda *arguments: 'naive result')
    with FakeTensorMode():
        query, key = torch.ones(1, 4, 3, 32, device='cuda'), torch.ones(1, 2, 10, 32, device='cuda')
        starts = torch.zeros(2, 1, dtype=torch.int32, device='cuda')
        rows, pool = torch.ones(2, 6, 32, device='cuda'), torch.ones(2, 10, 32, device='cuda')
        for _ in range(2):
            output, importance = scored_attention(query, key, key)
            assert output == 'naive output' and importance.shape == (1, 2, 10)
            assert paged_attention(rows, pool, pool, starts, starts, 1.0) == 'naive result'
    for operation in ('scored_attention', 'paged_attention'):
        assert 'could not build or start its kernel' in fitness.problem(operation, CUDA)
