"""What a camera's frame step costs when several cameras are stepped as one batch, beside stepping them one after the other."""
import argparse

import numpy as np
import torch
from rich.console import Console

from statekv_ros.backbones.family import Family
from statekv_ros.bench.hardware import versions
from statekv_ros.bench.in_turn import WeightReads, in_turn
from statekv_ros.bench.models import find_backbone
from statekv_ros.bench.sizes import parse_size
from statekv_ros.device_name import device_name
from statekv_ros.errors import ParameterError
from statekv_ros.memory import VideoStream, parse_prefill_policy
from statekv_ros.memory.together import Given, Together
from statekv_ros.terminal import narrow_table

_FRAMES = 16        # pictures, shown in turn
_MOST_WARM_UP = 400


class Cameras:
    """So many streams of one policy, and the frames that they see."""

    def __init__(self, backbone: Family, policy: str, count: int, size: tuple[int, int]):
        self.each, self.seen = backbone.frames_per_step, 0
        self.streams = [VideoStream(backbone, policy) for _ in range(count)]
        self._together = Together()
        self._frames = np.random.default_rng(0).integers(0, 256, (_FRAMES, *size, 3), dtype=np.uint8)

    def step_alone(self) -> None:
        """One step of each, one after the other."""
        for given in self._next():
            for stream, frame, stamp_ns, _ in given:
                stream.step(frame, stamp_ns)

    def step_together(self) -> None:
        """One step of each, as one batch."""
        for given in self._next():
            for outcome in self._together.step(given):
                if isinstance(outcome, Exception):
                    raise outcome

    def _next(self) -> list[list[Given]]:
        first, self.seen = self.seen, self.seen + self.each
        return [[Given(stream, self._frames[(index + 5 * number) % _FRAMES], (index + 1) * 10**9 // self.each)
                 for number, stream in enumerate(self.streams)] for index in range(first, self.seen)]


def run(args: argparse.Namespace) -> dict:
    """Measure both ways in turn, so that a machine that slows down slows both, and take medians.

    Returns:
        {'benchmark', 'model', 'device', 'versions', 'dtype', 'weights', 'prefill_policy', 'step_tokens', 'rounds',
        'rows': [{cameras, single_ms, batched_ms (each for one step of one camera), batched_over_single, single_launches,
        batched_launches (that read weights), single_weight_mb, batched_weight_mb (that they read), each for one step of all
        cameras}]}.

    Raises:
        ParameterError, PolicyError, ModelError: an argument that cannot work.
    """
    if min(args.cameras) < 1 or args.rounds < 1:
        raise ParameterError(f'--cameras and --rounds must be positive, got {min(args.cameras)} and {args.rounds}')
    policy = str(parse_prefill_policy(args.prefill_policy))
    width, height = parse_size('--size', args.size)
    if args.device in ('auto', 'cpu'):
        torch.set_num_threads(1)    # small matrices: more threads only add noise
    backbone = find_backbone(args)
    rows = [_measure(backbone, policy, count, (height, width), args.rounds, args.json) for count in args.cameras]
    result = {
        'benchmark': 'cameras', 'model': args.model, 'device': device_name(backbone.device), 'versions': versions(),
        'dtype': str(backbone.dtype).removeprefix('torch.'), 'weights': backbone.weights, 'prefill_policy': policy,
        'step_tokens': backbone.step_tokens(height, width), 'rounds': args.rounds, 'rows': rows,
    }
    if not args.json:
        _print(result)
    return result


def _measure(backbone: Family, policy: str, count: int, size: tuple[int, int], rounds: int, quiet: bool) -> dict:
    cameras = [Cameras(backbone, policy, count, size) for _ in range(2)]
    ways = cameras[0].step_alone, cameras[1].step_together
    budget, stream = parse_prefill_policy(policy).budget, cameras[0].streams[0]
    warm_up = min(_MOST_WARM_UP, 4 + budget // backbone.step_tokens(*size))     # until the state is full
    single_ms, batched_ms = in_turn(ways, warm_up, rounds, count, f'{count} cameras', quiet)
    reads = []
    for way in ways:
        with WeightReads(backbone.model) as counted:
            way()
        reads.append(counted)
    return {'cameras': count, 'single_ms': round(single_ms, 4), 'batched_ms': round(batched_ms, 4),
            'batched_over_single': round(batched_ms / single_ms, 4),
            'single_launches': reads[0].launches, 'batched_launches': reads[1].launches,
            'single_weight_mb': round(reads[0].bytes / 1e6, 3), 'batched_weight_mb': round(reads[1].bytes / 1e6, 3),
            'state_tokens': stream.state_tokens}


def _print(result: dict) -> None:
    table = narrow_table(
        f'one frame step of one camera on {result["device"]}, {result["prefill_policy"]}, model {result["model"]}; MB of '
        'weights read for a step of all', 'cameras', 'one by one, ms', 'as a batch, ms', 'batch / one by one',
        'MB,\none by one', 'MB,\nas a batch', text=0)
    for row in result['rows']:
        table.add_row(str(row['cameras']), f'{row["single_ms"]:.2f}', f'{row["batched_ms"]:.2f}',
                      f'{row["batched_over_single"]:.2f}', f'{row["single_weight_mb"]:.1f}', f'{row["batched_weight_mb"]:.1f}')
    Console().print(table)
