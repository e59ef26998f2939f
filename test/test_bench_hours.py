"""Hours of watching as a benchmark: what its short form shows, without looking at a clock."""
import json
import tracemalloc

import numpy as np
import pytest

from statekv_ros.bench import cli
from statekv_ros.bench.hours import QUESTIONS, _as_long, _rss_slope, _Rows

_BOUND_MB = .5
_BYTES_PER_TOKEN = 5120     # of the patrol model in fp32


def test_a_bounded_memory_is_as_large_in_the_last_ten_minutes_as_in_minutes_5_to_15(capsys):
    arguments = f'--hours 0.45 --rate 0.05 --every 120 --policy sparse(72) --beside all --device-cache-mb {_BOUND_MB} --json'
    assert cli.main(['hours', *arguments.split()]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    early, late = result['windows'][0], result['windows'][-1]
    assert (early['from_s'], early['to_s'], late['from_s'], late['to_s']) == (300, 900, 1020, 1620)
    assert result['steps'] == 81 and result['forgotten_frames'] > 0
    assert early['detailed_bytes'] == late['detailed_bytes']
    assert result['peak_bytes']['device'] <= _BOUND_MB * 1e6
    assert result['detailed_tokens'] * _BYTES_PER_TOKEN <= _BOUND_MB * 1e6
    for window in (early, late, result['young']):
        assert window['answers']['sparse(72)']['n'] == 5 * len(QUESTIONS) and window['step_ms_p50'] > 0
    assert late['answers']['all']['n'] == len(QUESTIONS), 'asked in every tenth round only'
    for compared in ('over_early', 'in_turn'):
        ratios = result['ratios']['sparse(72)'][compared]
        assert set(ratios) == {'first_token_ms_p50', 'first_token_ms_p90', 'total_ms_p50', 'total_ms_p90'}
    assert 0 < result['ratios']['sparse(72)']['as_long']['n'] <= 5 * len(QUESTIONS)
    assert result['ratios']['all']['over_early'] is None


def test_most_of_a_memory_lies_on_disk_and_every_tier_keeps_to_its_bound(capsys):
    arguments = '--hours 0.45 --rate 0.2 --every 300 --policy sparse(72) --detailed-format int4 --device-cache-mb 1 ' \
                '--host-cache-mb .5 --disk-cache-gb .05 --json'
    assert cli.main(['hours', *arguments.split()]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result['steps'] == 324 and result['forgotten_frames'] == 0
    assert result['steps_below_device'] > 200
    assert result['peak_bytes']['device'] <= 1e6 and 0.4e6 < result['peak_bytes']['host'] <= 0.5e6
    assert 0 < result['disk_bytes'] <= .05e9
    assert result['windows'][-1]['answers']['sparse(72)']['n'] == 2 * len(QUESTIONS)


def test_answers_that_are_longer_are_not_said_to_be_dearer():
    young = np.array([[0, 30, 50, 2], [0, 31, 50, 2], [0, 30, 40, 1], [0, 29, 50, 2.]])
    late = np.array([[0, 33, 55, 2], [0, 34, 90, 4], [0, 33, 44, 1], [0, 32, 55, 2.]])
    found = _as_long(late, young)
    assert found['n'] == 3 and found['total_ms_p50'] == found['total_ms_p90'] == pytest.approx(1.1)
    assert _as_long(late[1:2], young[1:2]) is None


def test_the_process_is_not_said_to_grow_by_the_young_memory_that_it_holds_in_the_end():
    sizes = _Rows(3)
    for second in range(0, 4 * 3600, 60):
        filling, joined = min(second, 1800), second >= 4 * 3600 - 900
        sizes.add(second, 0, 300e6 + 5e6 * second / 3600 + 10e6 * filling / 1800 + 20e6 * joined)
    assert _rss_slope(sizes, 4 * 3600 - 900) == pytest.approx(5, abs=.01)
    assert _rss_slope(sizes, 1900) is None


def test_what_is_measured_of_a_step_takes_few_bytes():
    rows, count = _Rows(2), 20_000
    tracemalloc.start()
    for second in range(count):
        rows.add(second / 3, second * 1.5)
    assert tracemalloc.get_traced_memory()[0] < 24 * count
    tracemalloc.stop()
    assert rows.cut(10, 11).tolist() == [[second / 3, second * 1.5] for second in (30, 31, 32)]
    assert _Rows(2).cut(0, 10).shape == (0, 2)


@pytest.mark.parametrize('arguments, word', [
    ('--hours 0.4', '--hours'), ('--hours nan', '--hours'), ('--rate 0', '--rate'), ('--every -1', '--every'),
    ('--device-cache-mb -1', '--device-cache-mb'), ('--device-cache-mb nan', '--device-cache-mb'),
    ('--host-cache-mb -1', '--host-cache-mb'), ('--disk-cache-gb inf', '--disk-cache-gb'), ('--detailed-format int3', 'int3'), ('--size 64', '--size'),
    ('--policy magic', 'magic'), ('--beside sparse(0)', 'sparse(0)'), ('--prefill-policy magic', 'magic')])
def test_bad_arguments_are_named(arguments, word, capsys):
    assert cli.main(['hours', *arguments.split()]) == 2
    errors = capsys.readouterr().err
    assert word in errors and 'Traceback' not in errors
