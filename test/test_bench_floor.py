"""Floors on boards that are not here: counts over the makers' figures."""
import json
import re
import sys
from pathlib import Path

import pytest

from statekv_ros import plan
from statekv_ros.bench import cli
from statekv_ros.bench.chips import BOARDS, PROCESSORS, find_board
from statekv_ros.kernels.scored_attention.configs import CONFIGS

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / 'docs/_build'))
import fits  # noqa: E402


def floor(capsys, *arguments: str) -> dict:
    assert cli.main(['floor', *arguments, '--json']) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope='module')
def counted() -> list[dict]:
    """Rows of AGX Orin for the models of README's table."""
    return fits.counted()


@pytest.mark.timeout(300)
def test_a_floor_is_the_work_over_the_boards_figures_and_needs_neither_board_nor_weights(capsys, counted):
    models = ('InternVL3-2B', 'Qwen3-VL-2B')
    h100 = floor(capsys, '--device-name', 'H100', '--models', *models, '--size', '640x480')
    assert h100['device_name'] == 'H100' and [row['model'] for row in counted] == list(fits.MODELS)
    orin = [row for model in models for row in counted if row['model'] == model]
    for small, large in zip(orin, h100['rows']):
        for row, board in ((small, BOARDS['AGX-Orin']), (large, BOARDS['H100'])):
            assert row['compute_ms'] == pytest.approx((row['vision_tflop'] + row['text_tflop']) / board.tflops * 1e3, rel=1e-2)
            assert row['memory_ms'] == pytest.approx(row['moved_gb'] / board.gb_per_s * 1e3, rel=1e-2)
            assert row['floor_ms'] == max(row['compute_ms'], row['memory_ms']) == row[f'{row["bound"]}_ms'] and row['fits']
            assert row['frames_per_s'] == pytest.approx(row['frames_per_step'] * 1e3 / row['floor_ms'], rel=1e-2)
            # A step reads the weights and the state; a token all weights that it goes through.
            assert row['moved_gb'] > row['weights_gb'] / 2 and row['token_ms'] > 0
        assert small['text_tflop'] == large['text_tflop'] and small['floor_ms'] > large['floor_ms']
    assert orin[1]['frames_per_step'] == 2 and orin[0]['step_tokens'] == 256 + 8


def test_a_larger_state_costs_more_and_a_model_that_does_not_fit_is_said_to(capsys):
    small, large = (floor(capsys, '--device-name', 'Orin-NX', '--models', 'InternVL3-8B', '--budget', budget)['rows'][0]
                    for budget in ('256', '16384'))
    assert small['text_tflop'] < large['text_tflop'] and small['moved_gb'] < large['moved_gb']
    assert small['vision_tflop'] == large['vision_tflop'] and small['token_ms'] == large['token_ms']
    assert small['weights_gb'] < BOARDS['Orin-NX'].memory_gb and small['fits']


def test_a_boards_last_part_names_it_where_one_ends_so():
    assert find_board('orin') == 'AGX-Orin' and find_board('4090') == 'RTX-4090' and find_board('l40s') == 'L40S'


def test_processors_are_those_of_the_kernels_table_and_boards_those_of_the_plan(capsys):
    assert set(PROCESSORS) == set(CONFIGS)
    assert plan.main(['--model', 'Qwen3-VL-2B', '--device', 'L40S', '--json']) == 0


def test_readme_says_what_fits_as_plan_and_floor_count_it(counted):
    told = fits.BLOCK.search((ROOT / 'README.md').read_text())
    assert told and told[0] == fits.table(counted), 'write it anew: python docs/_build/fits.py'


@pytest.mark.parametrize('arguments, words', [
    ('--device-name jetson', "--device-name must be one of B200, H200, .* got 'jetson'"),
    ('--device-name h100 --models GPT-2', "--models must be all, or among Qwen3-VL-2B, .* got 'GPT-2'"),
    ('--budget 0', '--budget must be a positive number of tokens, got 0'),
    ('--read-tokens -1', '--read-tokens must be a positive number of tokens, got -1'),
    ('--size 448', "--size must be WIDTHxHEIGHT in pixels, for example 640x480, got '448'"),
])
def test_bad_arguments_are_named(arguments, words, capsys):
    assert cli.main(['floor', *arguments.split()]) == 2
    assert re.search(words, capsys.readouterr().err)
