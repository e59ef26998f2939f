"""What answers over a made-up memory cost, as a benchmark: what it fills, where that lies, and what it says of it."""
import json

import pytest

from queued import Queued, as_kernels
from statekv_ros.bench import cli
from statekv_ros.memory.recorded_decode import DecodeGraphs


def test_a_memory_of_noise_is_asked_wherever_its_pages_lie(capsys):
    bounds = '--device-cache-mb 1 --host-cache-mb .2 --disk-cache-gb .05'
    assert cli.main(['answers', *f'--steps 12 90 --rounds 1 --tokens 3 --policy sparse(72) {bounds} --json'.split()]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    young, old = result['rows']
    assert (young['steps'], young['steps_below_device'], old['steps'], old['forgotten_frames']) == (12, 0, 90, 0)
    assert old['steps_below_device'] > 20 and old['tier_bytes']['device'] <= 1e6 and old['tier_bytes']['host'] <= .2e6
    assert old['disk_bytes'] > young['disk_bytes'] > 0
    assert old['disk_planned_bytes'] == pytest.approx(7.5 * young['disk_planned_bytes'])
    for row in result['rows']:
        assert 0 < row['first_token_ms_p50'] <= row['first_token_ms_p90'] and 0 < row['token_ms_p50'] < row['total_ms_p50']
    assert result['last_over_first']['total_ms_p50'] == pytest.approx(old['total_ms_p50'] / young['total_ms_p50'], rel=.01)


@pytest.mark.parametrize('benchmark, arguments', [
    ('answers', '--steps 2 4 --rounds 1 --tokens 2'), ('cameras', '--cameras 2 --rounds 1 --prefill-policy statekv(64)')])
def test_a_published_model_is_measured_with_random_weights(benchmark, arguments, capsys):
    model = '--random-weights --model Qwen3-VL-2B --layers 1 --dtype fp32 --size 128x128'
    assert cli.main([benchmark, *arguments.split(), *model.split(), '--json']) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (result['model'], result['dtype'], result['step_tokens']) == ('Qwen3-VL-2B', 'float32', 24)
    assert all(value > 0 for row in result['rows'] for key, value in row.items() if '_ms' in key)


def test_a_token_is_measured_as_a_graph_and_eagerly(capsys, monkeypatch):
    as_kernels(monkeypatch, 'statekv_ros.memory.answering.reading.span_and_pages')
    monkeypatch.setattr('statekv_ros.memory.stream.make_decodes', lambda mode, backbone: DecodeGraphs(Queued))
    assert cli.main('decode --steps 8 30 --rounds 6 --policy sparse(288) --json'.split()) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [row['steps'] for row in result['rows']] == [8, 30]
    for row in result['rows']:
        assert 0 < row['replayed'] <= 5 and row['recorded'] and row['why_not'] == '' and row['recording_ms'] > row['eager_ms'] > 0
        assert row['replayed_over_eager'] == pytest.approx(row['replayed_ms'] / row['eager_ms'], abs=1e-3)


def test_where_nothing_is_recorded_the_benchmark_says_so(capsys):
    assert cli.main('decode --steps 8 --rounds 2 --policy sparse(288)'.split()) == 0
    assert 'a CPU has no graphs' in capsys.readouterr().out
    assert cli.main('decode --rounds 0'.split()) == 2 and '--steps and --rounds must be positive' in capsys.readouterr().err


@pytest.mark.parametrize('arguments, word', [
    ('--steps 0', '--steps, --rounds and --tokens must be positive, got 0'), ('--rounds 0', 'got 600, 0'),
    ('--tokens 0', 'got 600, 10 and 0'),
    ('--policy magic', 'magic'), ('--size 64', '--size must be WIDTHxHEIGHT'), ('--host-cache-mb nan', '--host-cache-mb'),
    ('--layers 2', '--layers goes with --random-weights'), ('--random-weights --layers 1', "got 'patrol'"),
    ('--random-weights --model InternVL3-8B --device cpu', '--layers 1'), ('--detailed-format int3', 'int3')])
def test_bad_arguments_are_named(arguments, word, capsys):
    assert cli.main(['answers', *arguments.split()]) == 2
    errors = capsys.readouterr().err
    assert word in errors and 'Traceback' not in errors
