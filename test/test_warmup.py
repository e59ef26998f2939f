"""The warm-up runs each variant of the kernels that a configuration needs, and a kernel that cannot run is no error."""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from statekv_ros.kernels import fitness
from statekv_ros.memory import VideoStream, parse_prefill_policy, warmup
from statekv_ros.memory.warmup import warm_up

POLICY = parse_prefill_policy('statekv(48)')


def launches(several: bool) -> tuple[list[tuple[str, int]], list[str]]:
    """Kernels in the order in which a model of 4 heads launches them, each with its splits, and what is said of it; Triton
    interprets them."""
    from statekv_ros.kernels.scored_attention import triton, variants
    launched = []

    def noted(name):
        kernel = getattr(triton, name)

        class Noted:
            def __getitem__(self, grid):
                launched.append((name, grid[1] if name == 'forward_kernel' else 0))
                return kernel[grid]

        return Noted()

    for name in ('forward_kernel', 'combine_kernel', 'mass_kernel', 'put_kernel'):
        setattr(triton, name, noted(name))
    said = variants.run_variants(4, 2, 32, torch.float32, torch.device('cpu'), [9, 20, 9], 200, several)
    return launched, said


@pytest.fixture
def interpreted(monkeypatch):
    """A function: `launches` in a process of its own."""
    pytest.importorskip('triton')
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        yield lambda several: pool.submit(launches, several).result()


def test_one_and_several_splits_of_each_step_shape_are_run_on_an_empty_and_on_a_full_state(interpreted):
    launched, said = interpreted(several=False)
    assert len(said) == 8 == len(set(said)) and said[-1] == '20 tokens on a state of 200, several splits'
    one, several = ('forward_kernel', 1), ('forward_kernel', 2)
    assert launched.count(('mass_kernel', 0)) == 8
    # So few keys that they are one tile have one split whatever is asked for.
    assert launched.count(several) == launched.count(('combine_kernel', 0)) >= 2 and launched.count(one) >= 4
    assert launched[-3:] == [several, ('combine_kernel', 0), ('mass_kernel', 0)] and ('put_kernel', 0) not in launched


def test_with_several_cameras_each_variant_is_run_for_several_streams_too(interpreted):
    launched, said = interpreted(several=True)
    assert len(said) == 16 == len(set(said)) and said[-1] == '20 tokens on a state of 200, several splits, of two streams'
    assert launched.count(('put_kernel', 0)) == 8 and launched.count(('mass_kernel', 0)) == 16
    assert launched[-4:] == [('put_kernel', 0), ('forward_kernel', 2), ('combine_kernel', 0), ('mass_kernel', 0)]


class OnAGpu:
    """A backbone that says it is on a GPU and computes where it is: all but the device's own part."""

    def __init__(self, backbone):
        self._backbone, self.device = backbone, torch.device('cuda', 0)

    def __getattr__(self, name):
        return getattr(self._backbone, name)


@pytest.fixture
def gpu(backbone, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: None)
    # Streams compute on the CPU; only what the warm-up itself asks of the device is the stand-in's.
    monkeypatch.setattr(warmup, 'VideoStream',
                        lambda gpu, *arguments, **options: VideoStream(gpu._backbone, *arguments, **options))
    monkeypatch.setattr(warmup, 'run_vote_variants', lambda *arguments: [])
    fitness._unfit.cache_clear()
    fitness.forget_failures()
    yield OnAGpu(backbone)
    fitness._unfit.cache_clear()
    fitness.forget_failures()


def test_a_cpu_has_nothing_to_warm_up(backbone):
    assert warm_up(backbone, POLICY, (64, 64)) is None


@pytest.mark.filterwarnings('ignore:.*is the naive one')
@pytest.mark.parametrize('detailed_format', ['', 'int4'])
def test_a_kernel_that_cannot_be_built_is_told_and_steps_and_answers_are_run_all_the_same(detailed_format, gpu, monkeypatch):
    asked = []

    def fails(*arguments):
        asked.append(arguments)
        raise RuntimeError('0 active drivers ([]). There should only be one.')

    monkeypatch.setattr(warmup, 'run_variants', fails)
    result = warm_up(gpu, POLICY, (64, 64), detailed_format=detailed_format)
    [(q_heads, kv_heads, head_dim, dtype, _, queries, state, several)] = asked
    assert (q_heads, kv_heads, head_dim, dtype) == (gpu.q_heads, gpu.layout.kv_heads, gpu.layout.head_dim, torch.float32)
    assert gpu.size(64, 64).step_tokens in queries and state == 48 and not several
    assert result.variants == () and (result.steps, result.answers) == (6, 8)
    [problem] = result.problems
    assert 'scored_attention without its Triton kernel' in problem and 'There should only be one' in problem
    assert problem in str(result)


def test_what_failed_before_is_tried_again_and_told_no_more(gpu, monkeypatch):
    monkeypatch.setattr(warmup, 'run_variants', lambda *arguments: ['9 tokens'])
    with pytest.warns(RuntimeWarning):
        fitness.note_failure('scored_attention', gpu.device, RuntimeError('no compiler that day'))
    result = warm_up(gpu, POLICY, (64, 64))
    assert result.problems == () and result.variants == ('9 tokens',)
    assert str(result).startswith('warmed up in ') and 'runs of the frame step' in str(result)


def test_a_full_gpu_is_not_taken_for_a_kernel_that_fails(gpu, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(warmup, 'run_variants', full)
    with pytest.raises(torch.OutOfMemoryError):
        warm_up(gpu, POLICY, (64, 64))
    assert fitness.problem('scored_attention', gpu.device) == ''


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_on_a_gpu_steps_after_the_warm_up_compile_nothing(tmp_path, frames):
    from statekv_ros.backbones import load_backbone
    from statekv_ros.backbones.tiny import write_tiny_checkpoint
    from statekv_ros.kernels.scored_attention import triton
    backbone = load_backbone(str(write_tiny_checkpoint(tmp_path / 'tiny')), device='cuda')
    result = warm_up(backbone, POLICY, (64, 64))
    assert result.problems == () and result.variants

    def compiled() -> int:
        return sum(len(cache) for kernel in (triton.forward_kernel, triton.combine_kernel, triton.mass_kernel)
                   for cache in [kernel.device_caches[backbone.device.index or 0][0]])

    before, stream = compiled(), VideoStream(backbone, POLICY)
    for index in range(40):
        stream.step(frames[index % 32], (index + 1) * 10**9)
    assert compiled() == before
