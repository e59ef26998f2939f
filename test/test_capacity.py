"""The plan's numbers, checked by hand, and the refusal of what cannot fit."""
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from statekv_ros import plan as command
from statekv_ros.backbones.published import PUBLISHED
from statekv_ros.errors import ParameterError
from statekv_ros.memory import VideoStream, parse_prefill_policy
from statekv_ros.memory.capacity import available_memory, detailed_bound, make_plan, require_fit
from statekv_ros.memory.detailed.cache import EXACT_STEPS, PAGE_TOKENS
from statekv_ros.memory.detailed.formats import find_format
from statekv_ros.memory.detailed.sizes import step_bytes

STATEKV = parse_prefill_policy('statekv(4096)')


def test_qwen3_vl_2b_by_hand():
    size = PUBLISHED['Qwen3-VL-2B'].size(448, 448)
    assert size.kv_bytes_per_token == 2 * 28 * 8 * 128 * 2 == 114_688
    assert size.step_tokens == 14 * 14 + 9 == 205
    plan = make_plan(size, STATEKV, rate_hz=2.0, hours=8)
    assert plan.detailed_bytes_per_hour == 3600 * 205 * (114_688 + 1)   # one step a second; is a token visual?
    assert plan.detailed_bytes == 8 * plan.detailed_bytes_per_hour
    leaves = 28 * 8 * (4 + 512 // 32) + 28 * 8 * (4 + 512) // 32        # and one page of 32, which is a stray
    assert plan.index_bytes_per_hour == 3600 * 4 * (28 * 8 * (128 + 1) + leaves + 16)   # and the table
    newest = 28 * 8 * (2 * 128 * 2 - 128 - 1)       # what entries that are not in 4 bits yet take more
    assert plan.index_bytes == 8 * plan.index_bytes_per_hour + (4096 + 2 * 1024) * newest
    assert make_plan(size, STATEKV, rate_hz=2.0, hours=.25).index_bytes == plan.index_bytes_per_hour // 4 + 900 * 4 * newest
    four = make_plan(size, STATEKV, rate_hz=2.0, detailed_format='int4')
    # Half a byte a number, a visual mark and three positions a token; for each of 4 pages, scale and zero of K and V in fp16.
    assert four.detailed_bytes_per_hour == 3600 * (205 * (28_672 + 1 + 3 * 4) + 4 * 28 * 8 * 128 * 4 * 2)
    assert four.detailed_bytes_per_token == pytest.approx(four.detailed_bytes_per_hour / 3600 / 205)
    assert plan.state_bytes == (4096 + 205) * (114_688 + 28 * 8 * (12 + 32))
    native = make_plan(size, STATEKV, rate_hz=2.0, hours=8, positions='native')
    assert native.state_bytes == (4096 + 205) * (114_688 + 28 * 8 * 12)
    assert plan.weights_bytes == pytest.approx(2 * 2.127e9, rel=0.01)


def test_the_reserve_covers_recorded_steps_of_each_camera_and_one_answer():
    size = PUBLISHED['Qwen3-VL-2B'].size(448, 448)
    one, four = (make_plan(size, STATEKV, rate_hz=2.0, cameras=cameras) for cameras in (1, 4))
    vision, product = 205 * 2**17, 32 * 2**20
    answer = 3 * 4 * 16 * 64 * (4096 + 205) + one.state_bytes   # 16 heads' scores, exponentials, fp32 keys; the state
    assert one.workspace_bytes < vision, 'so it is the vision tower that a recording needs most memory for'
    selection = 28 * 8 * (4096 + 205) * 4 * 8 + 205 * 28 * 8 * 128 * 2      # ranks, and the rows of keys that move
    # Logits; keys and values in fp32 of 8192 tokens, three times 16 heads' scores, and 28 layers' masses of 8 heads.
    token = product + 4 * size.vocabulary + 8192 * 4 * (2 * 8 * 128 + 3 * 16 + 28 * 8)
    assert one.reserve_bytes == (vision + product + selection + token) + product + vision + answer
    batch = 7 * vision + product        # of four as one, and recorded
    assert four.reserve_bytes - one.reserve_bytes == 3 * (vision + product + selection + token) + batch
    assert one.at_start_bytes == one.weights_bytes + one.state_bytes + one.workspace_bytes + one.reserve_bytes
    # Whatever the memory holds, an answer's scores are bounded.
    full = make_plan(size, parse_prefill_policy('full'), rate_hz=2.0)
    assert full.reserve_bytes == 2 * (vision + product) + 3 * 4 * 2**25 + token
    with pytest.raises(ParameterError, match='a reserve for 99 camera.*"cameras"'):
        require_fit(make_plan(PUBLISHED['Qwen3-VL-2B'].size(448, 448), parse_prefill_policy('none'), 2.0, cameras=99),
                    5 * 10**9, 'a GPU')


@pytest.mark.skipif(not Path('/proc/meminfo').exists(), reason='not Linux')
@pytest.mark.parametrize('integrated', [True, False])
def test_page_cache_counts_as_free_where_the_gpu_computes_in_main_memory(integrated, monkeypatch):
    """A Jetson's mem_get_info tells what nobody uses, which is little after a checkpoint was read."""
    properties = SimpleNamespace(is_integrated=integrated)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (10**6, 8 * 10**9))
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: properties)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Orin')
    told = [int(line.split()[1]) * 1024 for line in Path('/proc/meminfo').read_text().splitlines() if 'MemAvailable' in line][0]
    free, name = available_memory(torch.device('cuda', 0))
    assert name == 'Orin' and (free == pytest.approx(told, rel=.2) if integrated else free == 10**6)
    assert available_memory(torch.device('cpu'))[0] == pytest.approx(told, rel=.2)


def test_internvl3_8b_by_hand():
    size = PUBLISHED['InternVL3-8B'].size(480, 640)
    assert size.kv_bytes_per_token == 2 * 28 * 4 * 128 * 2 == 57_344
    assert size.step_tokens == 256 + 8
    plan = make_plan(size, parse_prefill_policy('window(16)'), rate_hz=1.0, cameras=2)
    assert plan.detailed_bytes_per_hour == 2 * 3600 * 264 * 57_345
    assert plan.state_bytes == 2 * 2 * 17 * 264 * 57_344


@pytest.mark.parametrize('policy', ['statekv(64)', 'window(8)', 'rekv(100)', 'none'])
def test_the_plan_covers_what_a_stream_really_holds(policy, backbone, frames):
    plan = make_plan(backbone.size(64, 64), parse_prefill_policy(policy), rate_hz=2.0)
    stream = VideoStream(backbone, policy)
    for index, frame in enumerate(frames):
        report = stream.step(frame, (index + 1) * 10**9 // 2)
    assert 0 <= report.step_tokens - plan.size.step_tokens <= 2, 'the text of later steps may be longer'
    held = stream.carried._key.nbytes + stream.carried._value.nbytes
    assert held <= plan.state_bytes * 1.2 or held <= 256 * backbone.kv_bytes_per_token, (held, plan.state_bytes)


@pytest.mark.parametrize('form', ['bf16', 'int8', 'int4'])
def test_a_step_in_the_detailed_cache_takes_the_bytes_of_the_plan(form, backbone, frames):
    size = backbone.size(64, 64)
    plan = make_plan(size, STATEKV, rate_hz=2.0, detailed_format=form)
    stream = VideoStream(backbone, 'statekv(20)', detailed_format=form)
    for index in range(80):
        stream.step(frames[index % 32], (index + 1) * 10**9 // 2)
    packed = stream.detailed._packed
    pools = (stream.detailed._exact._pool,) if packed is None else (packed._codes, packed._scales)
    steps = stream.steps if packed is None else stream.steps - EXACT_STEPS

    def planned(tokens: int) -> int:
        return step_bytes(backbone.layout, find_format(form), 3, tokens, PAGE_TOKENS).rows

    assert planned(size.step_tokens) == pytest.approx(size.step_tokens * plan.detailed_bytes_per_token)
    taken = sum(pool.row_bytes * pool._live for pool in pools)
    assert taken == sum(planned(record.tokens) for record in list(stream.detailed.records())[:steps])
    pages = stream.detailed.pages
    assert (pages.stop - pages.first) * pages.page_bytes == plan.index_bytes_per_hour * stream.steps // 3600
    assert pages._exact.nbytes + pages._of_pages.nbytes == pages.bytes


def test_a_format_that_is_unknown_is_refused_by_the_plan(capsys):
    assert command.main(['--detailed-format', 'int3']) == 2 and "'int3'" in capsys.readouterr().err


def test_what_cannot_fit_is_refused_with_the_parameter_to_change():
    size = PUBLISHED['Qwen3-VL-2B'].size(480, 640)
    huge = make_plan(size, parse_prefill_policy('statekv(10000000)'), rate_hz=1.0)
    with pytest.raises(ParameterError, match='"budget"'):
        require_fit(huge, 24 * 10**9, 'a GPU')
    with pytest.raises(ParameterError, match='"model"'):
        require_fit(make_plan(size, STATEKV, 1.0), 4 * 10**9, 'a GPU')
    require_fit(make_plan(size, STATEKV, 1.0), 8 * 10**9, 'a GPU')


def test_the_bound_on_the_detailed_cache_is_a_share_of_what_is_left_and_never_more_than_there_is():
    plan = make_plan(PUBLISHED['InternVL3-8B'].size(480, 640), STATEKV, 2.0, cameras=2)
    there = 80 * 10**9
    bound = detailed_bound(plan, 0, there, 'a GPU')
    assert 0 < 2 * bound <= (there - plan.at_start_bytes) / 2
    assert detailed_bound(plan, 10 * 10**9, there, 'a GPU') == 10 * 10**9
    with pytest.raises(ParameterError, match='400.00 GB.*"device_cache_mb"'):
        detailed_bound(plan, 200 * 10**9, there, 'a GPU')
    with pytest.raises(ParameterError, match='does not hold one step'):
        detailed_bound(plan, 10**6, there, 'a GPU')


def test_the_command_prints_every_published_model(capsys):
    assert command.main(['--fps', '1', '--budget', '4096', '--hours', '8', '--json']) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(rows) == len(PUBLISHED) and all(row['total_bytes'] > row['weights_bytes'] for row in rows.values())
    assert command.main(['--model', 'Qwen3-VL-2B']) == 0 and 'Qwen3-VL-2B' in capsys.readouterr().out
    for arguments, words in ((['--fps', '0'], '--fps'), (['--budget', '0'], 'budget'), (['--frame-size', 'big'], 'big'),
                             (['--model', '/nowhere'], '/nowhere')):
        assert command.main(arguments) == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize('columns', [None, 80, 140])
def test_the_table_fits_80_characters_or_the_terminal_and_loses_nothing(columns, monkeypatch, capsys):
    if columns:
        monkeypatch.setenv('COLUMNS', str(columns))     # what rich takes for the terminal's width
        monkeypatch.setattr('sys.stdout.isatty', lambda: True)
    assert command.main([]) == 0
    told = re.sub(r'\x1b\[\d*m', '', capsys.readouterr().out)     # bold
    assert max(map(len, told.splitlines())) <= (columns or 80) and '…' not in told
    for part, cell in zip(told.split('Tiers: '), ('334.6', '46.3'), strict=True):     # a table each, a line for each model
        rows = {line.split()[0]: line for line in part.splitlines() if line.strip()}
        assert rows.keys() >= PUBLISHED.keys() and cell in rows['Qwen3-VL-2B']


def test_the_plan_of_the_shipped_model_is_for_the_frames_that_it_advises(capsys):
    assert command.main(['--model', 'patrol', '--budget', '72', '--json']) == 0
    [plan] = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert plan['step_tokens'] == 9
