"""`statekv-bench aot` and `statekv-bench kernel` as a user runs them."""
import json
import os
import subprocess
import sys

import pytest
import torch

from statekv_ros.bench import cli
from statekv_ros.kernels.scored_attention.configs import SHARED_MEMORY_KB


def python(*arguments: str) -> subprocess.CompletedProcess:
    """Run Python where Triton compiles rather than interprets."""
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def bench(*arguments: str) -> subprocess.CompletedProcess:
    return python('-m', 'statekv_ros.bench.cli', *arguments)


@pytest.mark.timeout(900)  # nothing when they are in Triton's cache
@pytest.mark.parametrize('chip, shapes', [(87, ((64, 7),)), (90, ((128, 4),))])
def test_kernels_compile_for_a_robots_chip_and_a_servers_without_spills_and_within_their_shared_memory(chip, shapes):
    """Of a small model and of 8B ones; the command compiles all for all chips, in minutes."""
    pytest.importorskip('triton')
    run = python('-c', f"""
import sys
from statekv_ros.bench import aot, cli
aot.MODEL_SHAPES = {shapes}
sys.exit(cli.main('aot --chips {chip} --loops --json'.split()))
""")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result['failed'] == [] and {chip} == {row['capability'] for row in result['rows']}
    paged, votes = ([row for row in result['rows'] if row['kernel'].startswith(name)] for name in ('paged ', 'votes '))
    assert {(row['head_dim'], row['group']) for row in result['rows'] if row not in paged + votes} == set(shapes)
    assert {(head_dim, f'paged {pool} {rows}{moved}') for head_dim, _ in shapes for pool in ('raw', 'int8', 'int4')
            for rows in ('few', 'many') for moved in ('', ' moved')} <= {(row['head_dim'], row['kernel']) for row in paged}
    of_votes = 'score lines', 'score leaves', 'open', 'votes', 'votes twice', 'places', 'places split'
    assert {row['kernel'] for row in votes} == {f'votes {name}' for name in of_votes}
    for row in result['rows']:
        assert row['stack_bytes'] == 0 and 0 < row['registers'] <= 255
        assert 0 <= row['shared_bytes'] <= SHARED_MEMORY_KB[chip] * 1024 == row['shared_limit_bytes']
        check_loops(row)


def check_loops(row: dict) -> None:
    """Every kernel has its loops, which multiply their tile, and scored attention's keep what was taken out of them out."""
    tile, loops, kernel = row['tile'], row['loops'], row['kernel'].removesuffix(' of streams')
    if kernel == 'put':         # once
        assert not loops
        return
    # Scored attention's: with and without masks. The compiler may have unrolled another, and left a loop for the rest.
    assert len(loops) == 2 if kernel in ('split forward', 'mass') else loops
    for loop in loops:
        assert loop['bound'] in loop['cycles'] and all(cycles >= 0 for cycles in loop['cycles'].values())
        assert loop['cycles']['issue'] == sum(loop['instructions'].values()) * tile['warps'] / 4
        if kernel in ('split forward', 'mass'):
            products = 4 if kernel == 'split forward' else 2
            rate = {87: 2048, 90: 4096}[row['capability']]
            assert loop['cycles']['tensor'] == products * tile['rows'] * tile['keys'] * row['head_dim'] / rate
    scores = tile['rows'] * tile['keys'] / (32 * tile['warps'])     # of one thread
    if kernel == 'mass':
        unmasked = loops[1]['instructions']
        assert unmasked['integer'] + unmasked['move'] <= 90 / 64 * scores and unmasked['fp32'] <= 2.4 * scores
    elif kernel == 'split forward':
        # Two of a score: its exponent, and the sum. The largest score and what follows from it are jumped over.
        assert all(loop['aside'] >= scores for loop in loops) and loops[0]['instructions']['fp32'] <= 2.4 * scores


def test_a_kernel_above_its_chips_shared_memory_fails_the_command_by_name():
    pytest.importorskip('triton')
    program = """
import sys
from statekv_ros.bench import aot, cli
from statekv_ros.kernels.scored_attention.configs import CONFIGS, Config, Tile
aot.MODEL_SHAPES = ((64, 7),)
every = aot._cases
aot._cases = lambda chip, everything: [case for case in every(chip, everything) if case.kernel.startswith('split forward')]
CONFIGS[89][64, 2] = Config(Tile(128, 64, 8, 9), Tile(64, 128, 4, 3))  # nine stages of pipeline, 16 KB each
sys.exit(cli.main(['aot', '--chips', '89', '--processes', '1', '--json']))
"""
    run = python('-c', program)
    assert run.returncode == 1, run.stderr
    assert 'sm_89 split forward, head dim 64, group 7, bf16: ' in run.stderr and 'above the limit of 101376' in run.stderr
    assert 'mass' not in run.stderr
    failed = json.loads(run.stdout.splitlines()[-1])['failed']
    assert [row['kernel'] for row in failed] == ['split forward', 'split forward of streams']
    assert all(row['shared_bytes'] > row['shared_limit_bytes'] for row in failed)


@pytest.mark.parametrize('command, interpret, words', [
    ('aot --chips 75', '0', '--chips must be among 80, 86'),
    ('aot --processes 0', '0', '--processes must be at least 1, got 0'),
    ('aot', '1', "TRITON_INTERPRET is '1'"),
    ('kernel --device cpu --models GPT-2', '0', "got 'GPT-2'"),
    ('kernel --device cpu --budgets 0', '0', 'must be positive, got 0 and 0'),
    ('kernel --device cpu --implementation triton', '0', 'take --implementation naive'),
    ('kernel --device toaster', '0', "--device must be cuda, cuda:<number> or cpu, got 'toaster'"),
    ('kernel --device cuda:99', '0', '--device cuda:99 is not there'),
])
def test_bad_arguments_are_named(command, interpret, words, monkeypatch, capsys):
    pytest.importorskip('triton')
    monkeypatch.setenv('TRITON_INTERPRET', interpret)
    assert cli.main(command.split()) == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_the_kernel_benchmark_says_that_it_needs_a_gpu():
    run = bench('kernel', '--json')
    assert run.returncode == 2 and 'run on a machine with a GPU' in run.stderr and run.stdout == ''


def test_the_kernel_benchmark_measures_on_a_cpu_when_told():
    run = bench('kernel', '--device', 'cpu', '--dtype', 'fp32', '--implementation', 'naive', '--models', 'InternVL3-1B',
                '--tokens', '8', '--budgets', '16', '64', '--json')
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert [row['budget'] for row in result['rows']] == [16, 64] and result['failed'] == []
    assert result['matmul_tflops'] > 0 and result['copy_gb_per_s'] > 0 and result['versions']['torch'] == torch.__version__
    for row in result['rows']:
        assert min(row[name] for name in ('scored_ms', 'sdpa_ms', 'eager_ms', 'floor_ms')) > 0
        assert row['over_sdpa'] == pytest.approx(row['scored_ms'] / row['sdpa_ms'], rel=0.05)
