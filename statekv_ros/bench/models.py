"""The model that a benchmark measures: one that is loaded, or a published one's shapes with random weights."""
import argparse

import torch

from statekv_ros.backbones import load_backbone
from statekv_ros.backbones.family import Family
from statekv_ros.backbones.published import PUBLISHED
from statekv_ros.backbones.random_weights import random_backbone
from statekv_ros.bench.hardware import DTYPES, parse_device
from statekv_ros.errors import ParameterError


def find_backbone(args: argparse.Namespace, on_a_cpu: str = '--layers 1') -> Family:
    """By the arguments --model, --random-weights, --layers, --dtype, --weights and --device.

    Args:
        on_a_cpu: arguments to try the command with where there is no GPU.

    Raises:
        ParameterError, ModelError: an argument that cannot work.
    """
    if args.random_weights:
        return random_model(args, on_a_cpu)
    for name in ('layers', 'dtype'):
        if getattr(args, name):
            raise ParameterError(f'--{name} goes with --random-weights only, got {getattr(args, name)}')
    return load_backbone(args.model, device=args.device, weights=args.weights)


def random_model(args: argparse.Namespace, on_a_cpu: str) -> Family:
    """A published model's shapes with random weights, cut to `--layers`; raises as `find_backbone`."""
    if args.weights != 'auto':
        raise ParameterError(f'--weights is for a model that is loaded, got {args.weights!r}: leave --random-weights out')
    name = args.device
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    device = parse_device(name, on_a_cpu)
    if device.type == 'cpu' and not args.layers:
        raise ParameterError('a CPU is too slow for a whole published model: cut it with --layers 1, or run on a machine with '
                             'a GPU')
    if args.model not in PUBLISHED:
        raise ParameterError(f'--model must be among {", ".join(PUBLISHED)} with --random-weights, got {args.model!r}')
    return random_backbone(args.model, device, DTYPES[args.dtype or 'bf16'], args.layers)
