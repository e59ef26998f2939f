"""Scored attention against its definition in float64: the naive twin, and the Triton kernels on a GPU or interpreted.

Triton decides when it is imported whether it interprets, so interpreted cases run in a process of their own.
"""
import itertools
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch

from statekv_ros.kernels.scored_attention import default_implementation, scored_attention
from statekv_ros.kernels.scored_attention.configs import (CONFIGS, SHARED_MEMORY_KB, Config, Tile, choose_splits,
                                                          find_config)

QUERIES, CACHES = (1, 15, 63, 259, 300), (0, 1, 96, 777, 4096)
HEAD_DIMS, GROUPS = (32, 64, 80, 128), (1, 2, 7)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}
BATCH, KV_HEADS = 2, 2


class Case(NamedTuple):
    """Shapes of one call; `config` and `splits` are for Triton alone, None for its own choice. Scores rise by `slope` from the
    first key to the last."""

    queries: int
    cache: int
    head_dim: int
    group: int
    dtype: torch.dtype
    splits: int | None = None
    config: Config | None = None
    slope: float = 0.0

    def __str__(self):
        return '-'.join(map(str, self[:4])) + f'-{self.dtype}'.replace('torch.', '')


def pairwise_cases() -> list[Case]:
    """Every pair of (queries, cache), every pair of (head_dim, group) and each dtype; large groups go to small sizes."""
    sizes = sorted(itertools.product(QUERIES, CACHES), key=lambda size: -size[0] * (size[0] + size[1]))
    heads = [(head_dim, group) for group in GROUPS for head_dim in HEAD_DIMS]
    return [Case(*size, *heads[index * len(heads) // len(sizes)], DTYPES[index % 3], (1, 3, None, 40)[index % 4])
            for index, size in enumerate(sizes)]


CASES = pairwise_cases()


def inputs(case: Case, device: str = 'cpu') -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random queries, keys and values laid out as a model and a state hold them: none of the three is contiguous."""
    torch.manual_seed(case.queries * 10_000 + case.cache)
    keys = case.cache + case.queries
    query = torch.randn(BATCH, case.queries, KV_HEADS * case.group, case.head_dim).to(case.dtype).to(device).transpose(1, 2)
    key = torch.randn(BATCH, KV_HEADS, keys + 7, case.head_dim).to(case.dtype).to(device)[:, :, 3:keys + 3]
    value = torch.randn(BATCH, keys, KV_HEADS, case.head_dim).to(case.dtype).to(device).transpose(1, 2)
    if case.slope:
        query[..., 0], key[..., 0] = case.head_dim ** 0.5, torch.linspace(0, case.slope, keys)
    return query, key, value


def definition(query, key, value, scale):
    """Output and importance in float64, one query of one query head at a time in spirit: masks, softmax, sums."""
    group = query.shape[1] // key.shape[1]
    queries, keys = query.shape[2], key.shape[2]
    outputs, importances = [], []
    for kv_head in range(key.shape[1]):
        k, v = key[:, kv_head].double(), value[:, kv_head].double()
        importance = torch.zeros(key.shape[0], keys, dtype=torch.float64)
        for q_head in range(kv_head * group, (kv_head + 1) * group):
            scores = torch.einsum('btd,bnd->btn', query[:, q_head].double(), k) * scale
            hidden = torch.arange(keys) > (keys - queries + torch.arange(queries))[:, None]
            mass = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
            outputs.append(mass @ v)
            importance += mass.sum(1)
        importances.append(importance)
    return torch.stack(outputs, 1), torch.stack(importances, 1)


@contextmanager
def poisoned_buffers():
    """Everything that torch.empty gives is NaN, so that what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of operations that have no deterministic version on a GPU
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def compute(case: Case, implementation: str, device: str = 'cpu'):
    """Output and importance on the CPU."""
    query, key, value = inputs(case, device)
    scale, keys = case.head_dim ** -0.5, key.shape[2]
    with poisoned_buffers():
        if implementation == 'triton' and (case.splits or case.config):
            from statekv_ros.kernels.scored_attention.triton import triton_scored_attention
            importance = torch.empty(BATCH, KV_HEADS, keys, device=device)
            output = triton_scored_attention(query, key, value, scale, importance, case.config, case.splits)
        else:
            # A part of a larger buffer, as a state has it; its other places must stay as they are.
            buffer = torch.empty(BATCH, KV_HEADS, keys + 5, device=device)
            output, importance = scored_attention(query, key, value, scale, implementation, buffer[..., 2:keys + 2])
            assert importance.data_ptr() == buffer[..., 2:].data_ptr()
            assert buffer[..., :2].isnan().all() and buffer[..., keys + 2:].isnan().all()
    return output.cpu(), importance.cpu()


class Errors(NamedTuple):
    """Relative errors by norm, and the largest relative error of the sum of a head group's importances."""

    output: float
    importance: float
    sums: float


def measure(case: Case, implementation: str, device: str = 'cpu') -> Errors:
    output, importance = compute(case, implementation, device)
    query, key, value = inputs(case)
    right_output, right_importance = definition(query, key, value, case.head_dim ** -0.5)
    assert output.shape == query.shape and output.dtype == case.dtype
    assert importance.shape == key.shape[:3] and importance.dtype == torch.float32
    mass = case.queries * case.group
    return Errors(((output.double() - right_output).norm() / right_output.norm()).item(),
                  ((importance.double() - right_importance).norm() / right_importance.norm()).item(),
                  ((importance.double().sum(-1) - mass).abs().max() / mass).item())


def assert_close(errors: Errors, dtype: torch.dtype) -> None:
    # NaN, a place that was not written, compares false.
    assert errors.output <= TOLERANCE[dtype] and errors.importance <= TOLERANCE[dtype] and errors.sums <= 1e-5, errors


def test_the_cases_cover_every_value_and_pair():
    assert {case[:2] for case in CASES} == set(itertools.product(QUERIES, CACHES))
    assert {case[2:4] for case in CASES} == set(itertools.product(HEAD_DIMS, GROUPS))
    assert {case.dtype for case in CASES} == set(DTYPES)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_naive_twin_equals_the_definition(case):
    assert_close(measure(case, 'naive'), case.dtype)


@pytest.mark.timeout(300)
@pytest.mark.parametrize('case', CASES, ids=str)
def test_triton_equals_the_definition_and_writes_every_element(case, run_triton):
    assert_close(run_triton(measure, case), case.dtype)


@pytest.mark.timeout(300)
@pytest.mark.parametrize('config', sorted({config for chip in CONFIGS.values() for config in chip.values()}),
                         ids=lambda config: 'x'.join(map(str, config.forward)) + '-' + 'x'.join(map(str, config.mass)))
def test_every_tile_of_the_table_gives_the_same_result(config, interpreter):
    case = Case(33, 170, 48, 3, torch.float32, splits=2, config=config)
    assert_close(interpreter(measure, case, 'triton'), case.dtype)


@pytest.mark.parametrize('splits', [1, 2, 3, 7, 100])
def test_splitting_the_keys_changes_nothing(splits, run_triton):
    small = Config(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1))
    assert_close(run_triton(measure, Case(40, 55, 64, 2, torch.float32, splits, small)), torch.float32)


@pytest.mark.parametrize('splits', [1, 3])
@pytest.mark.parametrize('dtype, slope', [(torch.float32, 400.0), (torch.bfloat16, 400.0), (torch.float16, 40.0)], ids=str)
def test_scores_that_outgrow_those_of_the_first_keys_by_more_than_sums_have_room_are_summed_anew(dtype, slope, splits,
                                                                                               run_triton):
    errors = run_triton(measure, Case(40, 300, 64, 3, dtype, splits, slope=slope))
    # In fp32 a score of 400 is off by 2e-5 itself.
    assert max(errors.output, errors.importance) <= max(TOLERANCE[dtype], 1e-4) and errors.sums <= 1e-5, errors


def test_a_group_larger_than_the_rows_of_a_tile_is_still_whole_queries(run_triton):
    small = Config(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1))
    assert_close(run_triton(measure, Case(5, 33, 32, 40, torch.float32, 2, small)), torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_gpu_and_interpreter_agree(dtype, interpreter):
    case = Case(63, 777, 128, 7, dtype)
    for ours, interpreted in zip(compute(case, 'triton', 'cuda'), interpreter(compute, case, 'triton')):
        assert (ours.double() - interpreted.double()).norm() <= TOLERANCE[dtype] * interpreted.double().norm()


@pytest.mark.parametrize('change, words', [
    ({'query': (2, 6, 4)}, 'query must be .batch, heads, tokens, head_dim., got 3 dimensions'),
    ({'key': (2, 2, 0, 32), 'value': (2, 2, 0, 32)}, r'key must not be empty, got shape \(2, 2, 0, 32\)'),
    ({'value': (2, 2, 10, 16)}, r'key and value must have the same shape, got \(2, 2, 12, 32\) and \(2, 2, 10, 16\)'),
    ({'query': (3, 6, 4, 32)}, 'differ in batch or head_dim'),
    ({'query': (2, 6, 4, 64)}, 'differ in batch or head_dim'),
    ({'query': (2, 5, 4, 32)}, 'q_heads must be a multiple of kv_heads, got 5 and 2'),
    ({'query': (2, 6, 13, 32)}, 'at least 13 of them, got 12'),
    ({'query': torch.float64}, 'query must be float32, float16 or bfloat16, got torch.float64'),
    ({'key': torch.int32}, 'key must be float32, float16 or bfloat16, got torch.int32'),
    ({'value': torch.float16}, 'value is torch.float16 on cpu rather than torch.float32 on cpu'),
    ({'scale': -1.0}, 'scale must be a positive number, got -1.0'),
    ({'importance_out': (2, 2, 12, 1)}, r'importance_out must be float32 \(2, 2, 12\) .* got torch.float32 \(2, 2, 12, 1\)'),
    ({'importance_out': torch.float64}, r'importance_out must be float32 .* got torch.float64 \(2, 2, 12\)'),
    ({'implementation': 'cuda'}, "implementation must be one of naive, triton, got 'cuda'"),
])
def test_bad_arguments_are_errors_that_name_them(change, words):
    shapes = {'query': (2, 6, 4, 32), 'key': (2, 2, 12, 32), 'value': (2, 2, 12, 32), 'importance_out': (2, 2, 12)}
    arguments = {'implementation': 'naive'}
    for name, shape in shapes.items():
        new = change.get(name)
        arguments[name] = torch.ones(new if isinstance(new, tuple) else shape,
                                     dtype=new if isinstance(new, torch.dtype) else torch.float32)
    arguments |= {name: change[name] for name in ('scale', 'implementation') if name in change}
    with pytest.raises(ValueError, match=words):
        scored_attention(**arguments)


def refusal(head_dim: int, name: str, stride: tuple[int, ...]) -> str:
    """What Triton says of [1, 1, 4, head_dim] tensors, `name` with those strides; meta tensors have no data to reserve."""
    tensors = {each: torch.empty(1, 1, 4, head_dim, device='meta') for each in ('query', 'key', 'value')}
    tensors[name] = torch.empty_strided((1, 1, 4, head_dim), stride, device='meta')
    with pytest.raises(ValueError) as refused:
        scored_attention(**tensors, implementation='triton')
    return str(refused.value)


def test_triton_names_what_it_cannot_take(interpreter):
    for (head_dim, name, stride), words in {
            (512, 'query', (2048, 2048, 512, 1)): 'head_dim up to 256, got 512',
            (32, 'key', (128, 128, 1, 4)): 'key must be contiguous along head_dim (stride 1), got strides (128, 128, 1, 4)',
            (32, 'value', (2**32, 2**32, 2**30, 1)): 'value must span less than 2**31 elements in a head'}.items():
        assert words in interpreter(refusal, head_dim, name, stride)


@pytest.mark.skipif('TRITON_INTERPRET' in os.environ, reason='TRITON_INTERPRET is set')
def test_triton_on_a_cpu_is_an_error_that_says_what_to_set():
    pytest.importorskip('triton')
    tensor = torch.ones(1, 1, 4, 32)
    assert default_implementation(tensor.device) == 'naive'
    with pytest.raises(ValueError, match='needs tensors on a CUDA device, got cpu: .*TRITON_INTERPRET=1'):
        scored_attention(tensor, tensor, tensor, implementation='triton')


def test_works_without_triton_and_imports_it_only_when_asked():
    program = """
import sys
import torch
if sys.argv[1] == 'missing':
    sys.modules['triton'] = None
from statekv_ros.kernels.scored_attention import default_implementation, scored_attention
import statekv_ros.kernels.scored_attention.configs, statekv_ros.kernels.state_update
tensor = torch.ones(1, 1, 4, 32)
scored_attention(tensor, tensor, tensor)
print(sys.modules.get('triton'))
try:
    scored_attention(tensor, tensor, tensor, implementation='triton')
except ValueError as error:
    print(error)
torch.cuda.get_device_capability = lambda device: (9, 0)
print(default_implementation(torch.device('cuda')))
"""
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    for state, words, default in (('missing', 'pip install triton', 'naive'),
                                  ('unused', 'needs tensors on a CUDA', 'triton')):
        if state == 'unused':
            pytest.importorskip('triton')
        run = subprocess.run([sys.executable, '-c', program, state], capture_output=True, text=True, check=True,
                             env=environment)
        assert run.stdout.splitlines()[0] == 'None' and run.stdout.splitlines()[2] == default
        assert words in run.stdout.splitlines()[1]
        assert ('many times slower' in run.stderr) == (state == 'missing')


def test_every_configuration_belongs_to_a_chip_with_a_known_limit():
    assert set(CONFIGS) == set(SHARED_MEMORY_KB)
    for configs in CONFIGS.values():
        assert set(configs) == set(itertools.product((32, 64, 128, 256), (2, 4)))
    assert find_config(75, 80, 2) == find_config(89, 128, 2)


def test_keys_are_split_only_while_processors_are_idle():
    tile = Tile(128, 64, 8, 3)
    assert choose_splits(programs=60, keys=4355, tile=tile, processors=132) == 2
    assert choose_splits(programs=32, keys=4301, tile=tile, processors=132) == 4
    assert choose_splits(programs=132, keys=4355, tile=tile, processors=132) == 1
    assert choose_splits(programs=1, keys=50, tile=tile, processors=132) == 1
    assert choose_splits(programs=1, keys=10**6, tile=tile, processors=132) <= 32
