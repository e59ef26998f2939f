"""What a frame step and a token of an answer cannot beat on a board that need not be here: counts over its maker's figures."""
import argparse

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from statekv_ros.backbones.published import PUBLISHED, PublishedModel
from statekv_ros.backbones.random_weights import random_backbone
from statekv_ros.bench.chips import BOARDS, Board, find_board
from statekv_ros.bench.sizes import parse_size
from statekv_ros.bench.step_floor import step_work, vision_flops
from statekv_ros.errors import ParameterError
from statekv_ros.terminal import narrow_table



def run(args: argparse.Namespace) -> dict:
    """Count each model's step over a full state; nothing is measured, and no weight is ever in memory.

    Returns:
        {'benchmark', 'device_name', 'tflops', 'gb_per_s', 'memory_gb' (the board's), 'budget', 'size', 'read_tokens',
        'rows': [{model, step_tokens, frames_per_step, weights_gb, fits (the weights into the board's memory), vision_tflop,
        text_tflop, moved_gb, compute_ms, memory_ms, floor_ms, bound ('compute' or 'memory'), frames_per_s, token_ms}]}; the
        last is of an answer that reads `read_tokens` tokens.

    Raises:
        ParameterError: an argument that cannot work.
    """
    name = find_board(args.device_name)
    board = BOARDS[name]
    models = list(PUBLISHED) if args.models == ['all'] else args.models
    unknown = sorted(set(models) - set(PUBLISHED))
    if unknown:
        raise ParameterError(f'--models must be all, or among {", ".join(PUBLISHED)}, got {unknown[0]!r}')
    for number in ('budget', 'read_tokens'):
        if getattr(args, number) < 1:
            raise ParameterError(f'--{number.replace("_", "-")} must be a positive number of tokens, got {getattr(args, number)}')
    width, height = parse_size('--size', args.size)
    rows = [_row(model, board, height, width, args.budget, args.read_tokens)
            for model in track(models, 'counting', console=Console(stderr=True), disable=args.json)]
    result = {'benchmark': 'floor', 'device_name': name, **board._asdict(), 'budget': args.budget, 'size': f'{width}x{height}',
              'read_tokens': args.read_tokens, 'rows': rows}
    if not args.json:
        _print(result)
    return result


@torch.inference_mode()
def _row(name: str, board: Board, height: int, width: int, budget: int, read_tokens: int) -> dict:
    published: PublishedModel = PUBLISHED[name]
    backbone = random_backbone(name, 'meta')
    picture = backbone.prepare(np.zeros((height, width, 3), np.uint8))
    each = backbone.frames_per_step
    seen = vision_flops(backbone, backbone.stage([picture] * each, [0.0] * each, 0).on(backbone.device))
    size, tied = published.size(height, width), published.more.get('tie_word_embeddings', False)
    work = step_work(size, tied, seen, size.step_tokens, budget, scored=True)
    rates = board.tflops * 1e12, board.gb_per_s * 1e9
    floor_ms = work.floor_ms(*rates)
    token_bytes = size.decoder_bytes + read_tokens * size.kv_bytes_per_token
    values = {
        'weights_gb': size.weights_bytes / 1e9, 'vision_tflop': seen / 1e12, 'text_tflop': (work.flops - seen) / 1e12,
        'moved_gb': work.bytes / 1e9, 'compute_ms': work.flops / rates[0] * 1e3, 'memory_ms': work.bytes / rates[1] * 1e3,
        'floor_ms': floor_ms, 'frames_per_s': each * 1e3 / floor_ms, 'token_ms': token_bytes / rates[1] * 1e3}
    return {'model': name, 'step_tokens': size.step_tokens, 'frames_per_step': each,
            'fits': size.weights_bytes < board.memory_gb * 1e9,
            'bound': 'compute' if values['compute_ms'] >= values['memory_ms'] else 'memory',
            **{key: round(value, 4) for key, value in values.items()}}


def _print(result: dict) -> None:
    columns = {'step_tokens': 'tokens', 'weights_gb': 'GB', 'vision_tflop': 'vision', 'text_tflop': 'text', 'compute_ms': 'ops',
               'memory_ms': 'bytes', 'floor_ms': 'step', 'frames_per_s': 'fps', 'token_ms': 'token'}
    table = narrow_table(f'{result["device_name"]}: statekv({result["budget"]}), camera frames of {result["size"]}, bf16',
                         'model', *columns.values())
    for row in result['rows']:
        table.add_row(row['model'], *(f'{row[key]:.3g}' if key.endswith('tflop') else f'{row[key]:.1f}' if key != 'step_tokens'
                                      else str(row[key]) for key in columns), style=None if row['fits'] else 'red')
    console = Console(highlight=False)
    console.print(table)
    console.print('GB of weights; TFLOP of a step in vision tower and text model; milliseconds of its operations, of its bytes, '
                  f'of the step, and of a token of an answer that reads {result["read_tokens"]} tokens; camera frames a second.')
    console.print(f'Counted, not measured: a step over a full state at {result["tflops"]} TFLOP/s (bf16, dense) or '
                  f'{result["gb_per_s"]} GB/s, whichever takes longer, as its maker states them; '
                  f'no program quite comes to either. Red: the weights alone do not fit into {result["memory_gb"]} GB.')
