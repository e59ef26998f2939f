"""What a token of an answer costs when several questions share its pass, beside answering them one after the other."""
import argparse
from collections.abc import Sequence

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
from statekv_ros.memory import Answering, VideoStream, parse_answer_policy, parse_prefill_policy
from statekv_ros.memory.answering.shared import decode_together
from statekv_ros.terminal import narrow_table

_FRAMES = 16        # pictures, shown in turn
_WARM_UP = 4
_TOKENS = 32        # of an answer, before the question is asked anew
_ASKED = ('is there a red ball?', 'where was the blue cube?', 'what is in view now?', 'how many doors were there?')


def ask(stream: VideoStream, count: int) -> list[Answering]:
    """So many questions, each with the first token of its answer."""
    answers = [stream.begin_answer(_ASKED[number % len(_ASKED)], max_tokens=_TOKENS) for number in range(count)]
    for answer in answers:
        while not answer.token_ids:
            answer.advance(1)
    return answers


def one_by_one(answers: Sequence[Answering]) -> None:
    """The next token of each, one after the other."""
    for answer in answers:
        answer.advance(1)


def together(answers: Sequence[Answering]) -> None:
    """The next token of each, in one pass."""
    for error in decode_together(answers, len(answers)):
        if error is not None:
            raise error


def run(args: argparse.Namespace) -> dict:
    """Measure both ways in turn, so that a machine that slows down slows both, and take medians.

    Returns:
        {'benchmark', 'model', 'device', 'versions', 'dtype', 'prefill_policy', 'answer_policy', 'steps', 'rounds', 'rows':
        [{questions, single_ms, shared_ms (each for a token of one answer), shared_over_single, single_launches, shared_launches
        (that read weights), single_operations, shared_operations (all that are queued), single_weight_mb, shared_weight_mb (that
        they read), each for a token of all answers}]}.

    Raises:
        ParameterError, PolicyError, ModelError: an argument that cannot work.
    """
    for name, value in (('--questions', min(args.questions)), ('--rounds', args.rounds), ('--steps', args.steps)):
        if value < 1:
            raise ParameterError(f'{name} must be positive, got {value}')
    policies = str(parse_prefill_policy(args.prefill_policy)), str(parse_answer_policy(args.answer_policy))
    width, height = parse_size('--size', args.size)
    if args.device in ('auto', 'cpu'):
        torch.set_num_threads(1)    # small matrices: more threads only add noise
    backbone = find_backbone(args)
    backbone.stop_token_ids = frozenset()       # answers shall be as long as they may be
    stream = _watched(backbone, policies, (height, width), args.steps)
    rows = [_measure(stream, count, args.rounds, args.json) for count in args.questions]
    result = {
        'benchmark': 'questions', 'model': args.model, 'device': device_name(backbone.device), 'versions': versions(),
        'dtype': str(backbone.dtype).removeprefix('torch.'), 'prefill_policy': policies[0], 'answer_policy': policies[1],
        'steps': stream.steps, 'rounds': args.rounds, 'rows': rows,
    }
    if not args.json:
        _print(result)
    return result


def _watched(backbone: Family, policies: tuple[str, str], size: tuple[int, int], steps: int) -> VideoStream:
    stream = VideoStream(backbone, *policies)
    frames = np.random.default_rng(0).integers(0, 256, (_FRAMES, *size, 3), dtype=np.uint8)
    while stream.steps < steps:
        stream.step(frames[stream.frames % _FRAMES], (stream.frames + 1) * 10**9)
    return stream


def _measure(stream: VideoStream, count: int, rounds: int, quiet: bool) -> dict:
    ways, answers = (one_by_one, together), [[], []]

    def ask_anew(turn: int, number: int) -> None:
        if turn % (_TOKENS - 1) == 0:
            answers[number] = ask(stream, count)

    single_ms, shared_ms = in_turn([lambda: one_by_one(answers[0]), lambda: together(answers[1])], _WARM_UP, rounds, count,
                                   f'{count} questions', quiet, ask_anew)
    reads = []
    for way in ways:
        fresh = ask(stream, count)
        with WeightReads(stream.backbone.model) as counted:
            way(fresh)
        reads.append(counted)
    single, shared = reads
    return {'questions': count, 'single_ms': round(single_ms, 4), 'shared_ms': round(shared_ms, 4),
            'shared_over_single': round(shared_ms / single_ms, 4),
            'single_launches': single.launches, 'shared_launches': shared.launches,
            'single_operations': single.operations, 'shared_operations': shared.operations,
            'single_weight_mb': round(single.bytes / 1e6, 3), 'shared_weight_mb': round(shared.bytes / 1e6, 3)}


def _print(result: dict) -> None:
    table = narrow_table(
        f'a token of one answer on {result["device"]}, {result["prefill_policy"]} x {result["answer_policy"]}, '
        f'model {result["model"]}, after {result["steps"]} steps; MB of weights read and operations for a token of all',
        'questions', 'one by\none, ms', 'together', 'of it', 'one by\none, MB', 'together', 'one by one,\noperations', 'together',
        text=0)
    for row in result['rows']:
        table.add_row(str(row['questions']), f'{row["single_ms"]:.2f}', f'{row["shared_ms"]:.2f}',
                      f'{row["shared_over_single"]:.2f}', f'{row["single_weight_mb"]:.1f}', f'{row["shared_weight_mb"]:.1f}',
                      str(row['single_operations']), str(row['shared_operations']))
    Console().print(table)
