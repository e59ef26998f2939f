"""What a token of an answer costs as a recorded graph and eagerly, over ten minutes and an hour of made-up memory."""
import argparse
import contextlib
import statistics
import time

import torch
from rich.console import Console

from statekv_ros.bench.hardware import versions
from statekv_ros.bench.made_up import made_up
from statekv_ros.bench.models import find_backbone
from statekv_ros.bench.sizes import parse_size
from statekv_ros.bench.tiered import check_bounds
from statekv_ros.device_name import device_name
from statekv_ros.errors import ParameterError
from statekv_ros.memory import Answering, VideoStream, parse_answer_policy
from statekv_ros.memory.recorded_decode import RECORDED_AT
from statekv_ros.terminal import narrow_table

_QUESTION = 'when did you last see the red box that stood beside the door?'
_WARM_UP = 2 * RECORDED_AT      # tokens, in which one is recorded
_NUMBERS = 'eager_ms', 'replayed_ms', 'eager_host_ms', 'replayed_host_ms'


def run(args: argparse.Namespace) -> dict:
    """Decode two answers side by side at each number of steps, a token of each in turn, and take medians.

    Returns:
        {'benchmark', 'model', 'random_weights', 'layers' (None: all), 'device', 'versions', 'dtype', 'answer_policy',
        'detailed_format', 'rounds', 'rows': [{steps, eager_ms, replayed_ms (each for a token; None where none was replayed),
        replayed_over_eager, eager_host_ms, replayed_host_ms (CPU time of the host's thread), recording_ms (the longest that a
        token took which was recorded), replayed, recorded (so many), why_not, steps_below_device, forgotten_frames}]}.

    Raises:
        ParameterError, PolicyError, ModelError: an argument that cannot work.
    """
    counts, size = sorted(set(args.steps)), parse_size('--size', args.size)[::-1]
    if counts[0] < 1 or args.rounds < 1:
        raise ParameterError(f'--steps and --rounds must be positive, got {counts[0]} and {args.rounds}')
    check_bounds(args)
    policy = str(parse_answer_policy(args.policy))
    if args.device in ('auto', 'cpu'):
        torch.set_num_threads(1)    # small matrices: more threads only add noise
    backbone = find_backbone(args, '--layers 2 --steps 100')
    backbone.stop_token_ids = frozenset()   # answers shall be as long as they may be
    with contextlib.ExitStack() as folders:
        rows = [{'steps': steps, **_measure(memory.stream, policy, args.rounds)}
                for steps, memory in made_up(backbone, args, counts, size, folders)]
    result = {
        'benchmark': 'decode', 'model': args.model, 'random_weights': args.random_weights, 'layers': args.layers,
        'device': device_name(backbone.device), 'versions': versions(), 'dtype': str(backbone.dtype).removeprefix('torch.'),
        'answer_policy': policy, 'detailed_format': args.detailed_format, 'rounds': args.rounds, 'rows': rows,
    }
    if not args.json:
        _print(result)
    return result


def _measure(stream: VideoStream, policy: str, rounds: int) -> dict:
    graphs, times = stream.decodes, {name: [] for name in _NUMBERS}
    ours, eager = (_asked(stream, policy, _WARM_UP + rounds, decodes) for decodes in (graphs, None))
    stream.decodes, recording_ms, replayed = graphs, [], 0
    for turn in range(_WARM_UP + rounds - 1):
        before = (graphs.newest, graphs.replays) if graphs else None
        took, host = _timed(ours)
        if graphs and graphs.newest is not before[0]:
            recording_ms.append(took)
        elif graphs and graphs.replays > before[1] and turn >= _WARM_UP:
            times['replayed_ms'].append(took)
            times['replayed_host_ms'].append(host)
            replayed += 1
        took, host = _timed(eager)
        if turn >= _WARM_UP:
            times['eager_ms'].append(took)
            times['eager_host_ms'].append(host)
    found = {name: round(statistics.median(kept), 4) if kept else None for name, kept in times.items()}
    return {**found, 'replayed_over_eager': round(found['replayed_ms'] / found['eager_ms'], 4) if replayed else None,
            'recording_ms': round(max(recording_ms), 4) if recording_ms else None, 'replayed': replayed,
            'recorded': len(recording_ms), 'why_not': graphs.problem if graphs else 'a CPU has no graphs',
            'steps_below_device': stream.detailed.steps_below, 'forgotten_frames': stream.forgotten_frames}


def _asked(stream: VideoStream, policy: str, tokens: int, decodes) -> Answering:
    """An answer of so many tokens that has its first one; `decodes` as of a stream."""
    stream.decodes = decodes
    answering = stream.begin_answer(_QUESTION, policy, max_tokens=tokens)
    while not answering.token_ids:
        answering.advance(1)
    return answering


def _timed(answering: Answering) -> tuple[float, float]:
    """Milliseconds of its next token, by the clock and of the host's thread."""
    begun, host = time.perf_counter(), time.thread_time()
    answering.advance(1)
    return (time.perf_counter() - begun) * 1e3, (time.thread_time() - host) * 1e3


def _print(result: dict) -> None:
    table = narrow_table(
        f'a token of an answer on {result["device"]}, {result["answer_policy"]}, {result["detailed_format"]}, model '
        f'{result["model"]}; ms', 'hours', 'steps', 'eager', 'replayed', 'of it', 'host,\neager', 'host,\nreplayed',
        'one that is\nrecorded', text=0)
    for row in result['rows']:
        numbers = [row[name] for name in ('eager_ms', 'replayed_ms', 'replayed_over_eager', 'eager_host_ms', 'replayed_host_ms',
                                          'recording_ms')]
        table.add_row(f'{row["steps"] / 3600:.2f}', str(row['steps']),
                      *('' if number is None else f'{number:.2f}' for number in numbers))
    console = Console()
    console.print(table)
    for row in result['rows']:
        if row['why_not']:
            console.print(f'{row["steps"]} steps: {row["why_not"]}')
