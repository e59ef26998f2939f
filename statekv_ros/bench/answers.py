"""What an answer costs over ten minutes, an hour and a shift of memory, wherever its pages lie.

The memory is filled with noise of the model's shapes rather than watched: what an answer costs depends on nothing else.
"""
import argparse
import contextlib
import statistics
import time

import numpy as np
import torch
from rich.console import Console

from statekv_ros.bench.hardware import versions
from statekv_ros.bench.made_up import made_up
from statekv_ros.bench.models import find_backbone
from statekv_ros.bench.sizes import parse_size
from statekv_ros.bench.tiered import TieredMemory, check_bounds
from statekv_ros.device_name import device_name
from statekv_ros.errors import ParameterError
from statekv_ros.memory import VideoStream, parse_answer_policy
from statekv_ros.memory.detailed.cache import PAGE_TOKENS
from statekv_ros.memory.detailed.formats import find_format
from statekv_ros.memory.detailed.sizes import step_bytes
from statekv_ros.terminal import narrow_table

QUESTIONS = ('what is in view?', 'when did you last see the red box that stood beside the door?', 'where are the keys?')
_SLICE_TOKENS = 8


def run(args: argparse.Namespace) -> dict:
    """Fill the memory and ask at each number of steps, one step a second.

    Returns:
        {'benchmark', 'model', 'random_weights', 'layers' (None: all), 'device', 'versions', 'dtype', 'answer_policy',
        'detailed_format', 'step_tokens', 'rounds', 'planned_step_bytes' (rows and index of a step on the device), 'rows':
        [{steps, first_token_ms_p50, first_token_ms_p90, token_ms_p50 (each further token), total_ms_p50, tokens,
        steps_below_device, tier_bytes, disk_bytes, disk_planned_bytes, forgotten_frames}], 'last_over_first' (of these times)}.

    Raises:
        ParameterError, PolicyError, ModelError: an argument that cannot work.
    """
    counts = sorted(set(args.steps))
    if counts[0] < 1 or args.rounds < 1 or args.tokens < 1:
        raise ParameterError(f'--steps, --rounds and --tokens must be positive, got {counts[0]}, {args.rounds} and {args.tokens}')
    check_bounds(args)
    policy, (width, height) = str(parse_answer_policy(args.policy)), parse_size('--size', args.size)
    if args.device in ('auto', 'cpu'):
        torch.set_num_threads(1)    # small matrices: more threads only add noise
    backbone = find_backbone(args, '--layers 2 --steps 100')
    backbone.stop_token_ids = frozenset()   # all answers are equally long
    with contextlib.ExitStack() as folders:
        rows = [{'steps': steps, **_ask(memory.stream, policy, args.rounds, args.tokens), **_sizes(memory)}
                for steps, memory in made_up(backbone, args, counts, (height, width), folders)]
    step_tokens = backbone.step_tokens(height, width)
    planned = step_bytes(backbone.layout, find_format(args.detailed_format), backbone.position_axes, step_tokens, PAGE_TOKENS)
    result = {
        'benchmark': 'answers', 'model': args.model, 'random_weights': args.random_weights, 'layers': args.layers,
        'device': device_name(backbone.device), 'versions': versions(), 'dtype': str(backbone.dtype).removeprefix('torch.'),
        'answer_policy': policy, 'detailed_format': args.detailed_format, 'step_tokens': step_tokens, 'rounds': args.rounds,
        'planned_step_bytes': planned._asdict(), 'rows': rows,
        'last_over_first': {key: round(rows[-1][key] / rows[0][key], 4) for key in rows[0] if '_ms_' in key and rows[0][key]},
    }
    if not args.json:
        _print(result)
    return result


def _ask(stream: VideoStream, policy: str, rounds: int, tokens: int) -> dict:
    first, further, total = [], [], []
    for turn in range(-1, rounds):      # once before, to compile and to make room
        for question in QUESTIONS:
            begun = time.perf_counter()
            answering = stream.begin_answer(question, policy, max_tokens=tokens)
            begin_ms = (time.perf_counter() - begun) * 1e3
            while not answering.advance(_SLICE_TOKENS):
                pass
            total_ms = (time.perf_counter() - begun) * 1e3
            if turn < 0:
                continue
            first.append(begin_ms + answering.result().first_token_ms)
            total.append(total_ms)
            if tokens > 1:
                further.append((total_ms - first[-1]) / (tokens - 1))
    return {'first_token_ms_p50': round(statistics.median(first), 3),
            'first_token_ms_p90': round(float(np.percentile(first, 90)), 3),
            'token_ms_p50': round(statistics.median(further), 3) if further else None,
            'total_ms_p50': round(statistics.median(total), 3), 'tokens': tokens}


def _sizes(memory: TieredMemory) -> dict:
    detailed = memory.stream.detailed
    return {'steps_below_device': detailed.steps_below, 'tier_bytes': detailed.tier_bytes,
            'disk_bytes': memory.store.file_bytes() if memory.store else 0, 'disk_planned_bytes': memory.planned_disk_bytes(),
            'forgotten_frames': memory.stream.forgotten_frames}


def _print(result: dict) -> None:
    table = narrow_table(
        f'answers of {result["rows"][0]["tokens"]} tokens on {result["device"]}, {result["answer_policy"]}, '
        f'{result["detailed_format"]}, model {result["model"]}; ms', 'hours', 'steps', 'below the\ndevice',
        'first token,\np50 / p90', 'each\nfurther', 'whole', text=0)
    for row in result['rows']:
        further = '' if row['token_ms_p50'] is None else f'{row["token_ms_p50"]:.1f}'
        table.add_row(f'{row["steps"] / 3600:.2f}', str(row['steps']), str(row['steps_below_device']),
                      f'{row["first_token_ms_p50"]:.1f} / {row["first_token_ms_p90"]:.1f}', further, f'{row["total_ms_p50"]:.1f}')
    Console().print(table)
