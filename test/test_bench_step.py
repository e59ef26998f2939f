"""The promise of a flat cost per frame, measured by the command that users run."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from statekv_ros.backbones.random_weights import random_backbone
from statekv_ros.bench import cli, gpu
from statekv_ros.bench.step_floor import step_work, vision_flops
from statekv_ros.memory import VideoStream


@pytest.mark.timeout(300)
def test_statekv_stays_flat_while_full_attention_grows():
    command = [sys.executable, '-m', 'statekv_ros.bench.cli', 'step', '--policy', 'statekv,window,full', '--frames', '280', '--json']
    # A ratio of medians taken in turn, so a slow machine is slow on both sides of it; one that is busy only for a part of it is
    # measured again.
    for _ in range(3):
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        policies = json.loads(output.strip().splitlines()[-1])['policies']
        print(json.dumps(policies, indent=1))
        statekv, window, full = (policies[name] for name in ('statekv(512)', 'window(16)', 'full'))
        if max(statekv['late_over_early'], window['late_over_early']) <= 1.10 and full['late_over_early'] > 1.2:
            break
    assert statekv['late_over_early'] <= 1.10
    assert window['late_over_early'] <= 1.10
    assert full['late_over_early'] > 1.2
    assert statekv['max_state_tokens'] == statekv['budget'] == 512
    assert full['max_state_tokens'] == full['detailed_tokens']


def test_a_whole_step_of_a_published_model_is_measured_on_a_cpu_when_it_is_cut(tmp_path, capsys):
    figure, profile = tmp_path / 'step.png', tmp_path / 'profile.txt'
    arguments = ('step --random-weights --model Qwen3-VL-2B --layers 1 --frames 16 64 --budget 256 2048 --rounds 1 '
                 f'--size 128x128 --device cpu --dtype fp32 --json --plot {figure} --profile {profile}')
    assert cli.main(arguments.split()) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (result['model'], result['layers'], result['dtype'], result['random_weights']) == ('Qwen3-VL-2B', 1, 'fp32', True)
    tokens, rows = result['step_tokens'], {(row['policy'], row['frame']): row for row in result['rows']}
    carried = {key: row['carried_tokens'] for key, row in rows.items()}
    assert tokens == 16 + 9 and result['left_out'] == []
    assert carried == {('statekv(256)', 16): 256, ('statekv(256)', 64): 256, ('statekv(2048)', 16): 16 * tokens,
                       ('statekv(2048)', 64): 64 * tokens, ('full', 16): 16 * tokens, ('full', 64): 64 * tokens}
    for row in rows.values():
        assert min(row['step_ms'], row['vision_ms'], row['prefill_ms'], row['host_ms'], row['floor_ms']) > 0
        assert row['of_floor'] == pytest.approx(row['floor_ms'] / row['step_ms'], rel=.01)
    for policy, ratio in result['ratios'].items():
        assert (ratio['early_frame'], ratio['late_frame']) == (16, 64)
        late = rows[policy, 64]['step_ms']
        assert ratio['late_over_early'] == pytest.approx(late / rows[policy, 16]['step_ms'], rel=.01)
        assert ratio['full_over_this'] == pytest.approx(rows['full', 64]['step_ms'] / late, rel=.01)
    assert figure.read_bytes().startswith(b'\x89PNG\r\n') and 'aten::addmm' in profile.read_text()


def test_the_floor_counts_what_a_step_computes():
    """Against torch's own count of a step whose attention is in plain torch."""
    backbone = random_backbone('InternVL3-1B', layers=1, dtype=torch.float32)
    stream = VideoStream(backbone, 'full')
    frame = np.zeros((448, 448, 3), np.uint8)
    stream.step(frame, 1)
    carried = stream.state_tokens
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        report = stream.step(frame, 2)
    seen = vision_flops(backbone, backbone.stage([backbone.prepare(frame)], [0.0], 0))
    size = backbone.size(448, 448)
    work = step_work(size, False, seen, report.step_tokens, carried, scored=False)
    scored = step_work(size, False, seen, report.step_tokens, carried, scored=True)
    # Torch counts the frame's later keys too, which a causal mask leaves out.
    masked = 4 * size.head_dim * size.q_heads * report.step_tokens * (report.step_tokens - 1) / 2
    # What describes the step's pages: a mean of the keys and one of their squares, as products with a matrix.
    pages = stream.detailed.pages.stop - stream.detailed.pages.first
    described = 2 * 2 * pages // stream.steps * report.step_tokens * size.layers * size.kv_heads * size.head_dim
    assert counter.get_total_flops() == pytest.approx(work.flops + masked + described, rel=1e-6)
    assert scored.flops - work.flops == pytest.approx(
        2 * size.head_dim * size.q_heads * report.step_tokens * (carried + (report.step_tokens + 1) / 2))
    assert size.weights_bytes / 2 < work.bytes < size.weights_bytes
    assert work.floor_ms(1e9, 1e30) == pytest.approx(work.flops / 1e6) and work.floor_ms(1e30, 1e9) == work.bytes / 1e6


def test_the_gpu_run_says_what_it_needs_and_keeps_earlier_results(tmp_path, monkeypatch, capsys):
    assert cli.main(['gpu', '--device', 'cpu', '--out', str(tmp_path / 'new')]) == 2
    assert 'only a GPU' in capsys.readouterr().err and not (tmp_path / 'new').exists()
    monkeypatch.setattr(gpu, 'parse_device', lambda name, hint: torch.device('cuda'))
    assert cli.main(['gpu', '--out', str(tmp_path)]) == 2
    assert 'is there already' in capsys.readouterr().err


def test_the_gpu_run_goes_on_when_a_part_fails_and_writes_what_each_said(tmp_path, monkeypatch, capsys):
    def say(text: str, code: int) -> list[str]:
        return [sys.executable, '-c', f'print("noise"); print({text!r}); raise SystemExit({code})']

    parts = [('tests', say('1 failed', 1), tmp_path / 'out/tests.txt'),
             ('kernel', say('{"a": 1}', 0), tmp_path / 'out/kernel.json')]
    monkeypatch.setattr(gpu, 'parse_device', lambda name, hint: torch.device('cuda'))
    monkeypatch.setattr(gpu, 'device_name', lambda device: 'some GPU')
    monkeypatch.setattr(gpu, 'commands', lambda *args: parts)
    assert cli.main(['gpu', '--out', str(tmp_path / 'out'), '--json']) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result['failed'] == ['tests'] and [part['exit_code'] for part in result['parts']] == [1, 0]
    assert (tmp_path / 'out/tests.txt').read_text() == 'noise\n1 failed\n'
    assert json.loads((tmp_path / 'out/kernel.json').read_text()) == {'a': 1}
    assert json.loads((tmp_path / 'out/summary.json').read_text()) == result


def test_the_gpu_runs_tests_and_arguments_exist(tmp_path, capsys):
    for name, command, _ in gpu.commands(['InternVL3-8B'], 'cuda:99', tmp_path):
        if name == 'tests':
            assert all(Path(file).is_file() for file in command if file.endswith('.py'))
        else:
            assert cli.main(command[3:]) == 2
            assert '--device cuda:99 is not there' in capsys.readouterr().err


@pytest.mark.parametrize('arguments, word', [
    ('--policy magic', 'magic'), ('--frames 3', '--frames'), ('--budget 0', 'budget'), ('--budget 1 2', 'one number'),
    ('--plot a.png', 'is for --random-weights'),
    ('--random-weights --model InternVL3-1B --weights int8', "a model that is loaded, got 'int8'"),
    ('--random-weights --device cpu --layers 1 --model GPT-2', 'among Qwen3-VL-2B, Qwen3-VL-4B'),
    ('--random-weights --device cpu --layers 1 --model InternVL3-1B --frames 0', 'must be positive'),
    ('--random-weights --device cpu --model InternVL3-1B', '--layers 1'), ('--random-weights --device toaster', 'toaster')])
def test_bad_arguments_are_named(arguments, word, capsys):
    assert cli.main(['step', *arguments.split()]) == 2
    errors = capsys.readouterr().err
    assert word in errors and 'Traceback' not in errors
