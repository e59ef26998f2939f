"""Scored attention of streams whose states differ in length, in one launch, against its definition for each by itself."""
import random
from typing import NamedTuple

import pytest
import torch

from statekv_ros.kernels.scored_attention.configs import CONFIGS, Config, Tile
from statekv_ros.kernels.scored_attention.streams import Stream, entries, new_table, scored_attention_of_streams
from test_scored_attention import TOLERANCE, definition, poisoned_buffers

LAYERS, LAYER, KV_HEADS = 3, 1, 2


class Case(NamedTuple):
    """Tokens of the states, padding before and behind the frames' tokens, and the longest frame's."""
    pasts: tuple[int, ...]
    sides: tuple[tuple[int, int], ...]
    tokens: int
    head_dim: int
    group: int
    dtype: torch.dtype
    splits: int | None = None
    config: Config | None = None

    def __str__(self):
        return f'{"+".join(map(str, self.pasts))}-{self.tokens}-{self.head_dim}-{self.group}-{self.dtype}'.replace('torch.', '')


def made_up_cases() -> list[Case]:
    """Up to eight streams; each dtype, head dim and group, small tiles so that states end within and between them."""
    dice, cases = random.Random(0), []
    small = Config(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
    for number in range(12):
        count, tokens = (1, 2, 3, 5, 8)[number % 5], dice.choice([1, 9, 33])
        pasts = tuple(dice.choice([0, 0, 1, 15, 32, 96, 130]) for _ in range(count))
        sides = tuple((0, 0) if dice.random() < .4 else (before := dice.randrange(tokens), dice.randrange(tokens - before))
                      for _ in range(count))
        cases.append(Case(pasts, sides, tokens, (32, 64, 80, 128)[number % 4], (1, 2, 7)[number % 3],
                          (torch.float32, torch.float16, torch.bfloat16)[number // 4], (None, 1, 3, 40)[number // 2 % 4],
                          small if number % 2 else None))
    return cases


CASES = made_up_cases()


def inputs(case: Case, device: str = 'cpu'):
    """Frames laid out as a model has them; states with room behind them, no two alike, NaN where nothing was written."""
    torch.manual_seed(case.tokens)
    rows, heads = len(case.pasts), KV_HEADS * case.group

    def random_rows(count: int) -> torch.Tensor:
        return torch.randn(rows, case.tokens, count, case.head_dim).to(case.dtype).to(device).transpose(1, 2)

    streams = []
    for index, (past, (before, behind)) in enumerate(zip(case.pasts, case.sides)):
        capacity = -(-(past + case.tokens + index) // 16) * 16
        key, value = (torch.full((LAYERS, KV_HEADS, capacity, case.head_dim), torch.nan, dtype=case.dtype, device=device)
                      for _ in range(2))
        for part in (key, value):
            part[:, :, :past] = torch.randn(LAYERS, KV_HEADS, past, case.head_dim).to(case.dtype)
        importance = torch.full((LAYERS, KV_HEADS, capacity), torch.nan, device=device)
        streams.append(Stream(key, value, importance, past, slice(before, case.tokens - behind)))
    return random_rows(heads), random_rows(KV_HEADS), random_rows(KV_HEADS), streams


def table_of(streams: list[Stream]) -> torch.Tensor:
    table = new_table(streams)
    return table.copy_(entries(streams, table))


def check(case: Case, implementation: str, device: str = 'cpu') -> None:
    query, key, value, streams = inputs(case, device)
    scale = case.head_dim ** -0.5
    before = [(stream.key.clone(), stream.value.clone()) for stream in streams]
    table = table_of(streams)
    with poisoned_buffers():
        if implementation == 'triton' and (case.splits or case.config):
            from statekv_ros.kernels.scored_attention.triton import triton_scored_streams
            output = triton_scored_streams(query, key, value, streams, LAYER, scale, table, case.config, case.splits)
        else:
            output = scored_attention_of_streams(query, key, value, streams, LAYER, scale, table, implementation)
    assert output.shape == query.shape and output.dtype == case.dtype
    for row, (stream, (old_key, old_value)) in enumerate(zip(streams, before)):
        own, live = stream.columns, slice(0, stream.live)
        for held, old, new in ((stream.key, old_key, key), (stream.value, old_value, value)):
            old[LAYER, :, stream.past:stream.live] = new[row, :, own]
            assert torch.equal(held.nan_to_num(7.0), old.nan_to_num(7.0)), 'the frame, behind the state, and nothing else'
        assert stream.importance[[0, 2]].isnan().all() and stream.importance[LAYER, :, stream.live:].isnan().all()
        right, mass = definition(query[row, None, :, own].cpu(), stream.key[LAYER, None, :, live].cpu(),
                                 stream.value[LAYER, None, :, live].cpu(), scale)
        ours, importance = output[row, None, :, own].cpu().double(), stream.importance[LAYER, None, :, live].cpu().double()
        assert (ours - right).norm() <= TOLERANCE[case.dtype] * right.norm()
        assert (importance - mass).norm() <= TOLERANCE[case.dtype] * mass.norm()
        assert not output[row, :, :own.start].any() and not output[row, :, own.stop:].any(), 'padding gives nothing'


def test_the_cases_cover_what_matters():
    assert {len(case.pasts) for case in CASES} == {1, 2, 3, 5, 8} and any(len(set(case.pasts)) > 3 for case in CASES)
    assert {(case.head_dim, case.group) for case in CASES} == {(d, g) for d in (32, 64, 80, 128) for g in (1, 2, 7)}
    assert sum(any(map(any, case.sides)) for case in CASES) > 5


@pytest.mark.parametrize('case', CASES, ids=str)
def test_naive_twin_equals_the_definition_of_each_stream(case):
    check(case, 'naive')


@pytest.mark.timeout(300)
@pytest.mark.parametrize('case', CASES, ids=str)
def test_triton_equals_the_definition_of_each_stream(case, interpreter):
    interpreter(check, case, 'triton')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('case', CASES, ids=str)
def test_triton_equals_the_definition_of_each_stream_on_a_gpu(case):
    check(case, 'triton', 'cuda')


@pytest.mark.timeout(300)
@pytest.mark.parametrize('config', sorted({config for chip in CONFIGS.values() for config in chip.values()}),
                         ids=lambda config: 'x'.join(map(str, config.forward)) + '-' + 'x'.join(map(str, config.mass)))
def test_every_tile_of_the_table_gives_the_same_result(config, interpreter):
    interpreter(check, Case((170, 0, 31), ((0, 0), (3, 5), (1, 0)), 33, 48, 3, torch.float32, 2, config), 'triton')


def arguments(**changes) -> tuple:
    query, key, value, streams = inputs(CASES[1]._replace(pasts=(4, 0), sides=((0, 0), (0, 0)), tokens=9, head_dim=32, group=2))
    given = {'query': query, 'key': key, 'value': value, 'streams': streams} | changes
    return given['query'], given['key'], given['value'], given['streams'], 0, 1.0


@pytest.mark.parametrize('change, words', [
    ({'key': torch.ones(2, 3, 9, 32), 'value': torch.ones(2, 3, 9, 32)}, 'q_heads a multiple of kv_heads'),
    ({'value': torch.ones(2, 2, 8, 32)}, r'query, key and value must be .* \(2, 2, 8, 32\)'),
    ({'streams': []}, 'got 2 rows and 0 streams')])
def test_bad_arguments_are_errors_that_name_them(change, words):
    with pytest.raises(ValueError, match=words):
        scored_attention_of_streams(*arguments(**change))


def test_bad_streams_are_errors_that_name_them():
    streams = arguments()[3]
    for wrong, words in ((streams[1]._replace(key=torch.ones(3, 2, 16, 64)), r'stream 1 must have .*\[layers, 2, capacity, 32\]'),
                         (streams[1]._replace(past=8), 'room for 17 keys, got columns 0 to 9 and room for 16'),
                         (streams[1]._replace(columns=slice(0, 10)), 'columns within 9 tokens')):
        with pytest.raises(ValueError, match=words):
            scored_attention_of_streams(*arguments(streams=[streams[0], wrong]))


def refusals() -> list[str]:
    said = []
    query, key, value, streams, *rest = arguments()
    spread = streams[1]._replace(key=torch.empty_strided((3, 2, 16, 32), (4096, 1024, 64, 1)).copy_(streams[1].key))
    for given, table in ((streams, None), ([streams[0], spread], table_of([streams[0], spread]))):
        with pytest.raises(ValueError) as refused:
            scored_attention_of_streams(query, key, value, given, *rest, table, 'triton')
        said.append(str(refused.value))
    return said


def test_triton_names_what_it_cannot_take(interpreter):
    missing, spread = interpreter(refusals)
    assert 'needs the table of the streams' in missing
    assert 'stream 1 must be contiguous torch.float32, aligned to 64 bytes' in spread
