"""`statekv-bench`: measurements as commands, each with a readable table and `--json`."""
import argparse
import importlib
import json
import sys

from statekv_ros.bench import arguments
from statekv_ros.errors import StateKVError

# One module per benchmark with run(args) -> dict, imported only when asked for; its arguments are in `arguments`.
BENCHMARKS = {
    'step': 'cost of frame steps over a stream, or of one whole step of a published model (--random-weights)',
    'cameras': 'frame steps of several cameras as one batch, beside one after the other',
    'answers': 'answers over ten minutes, an hour and a shift of made-up memory, on every tier',
    'decode': 'tokens of an answer as recorded graphs and eagerly, over made-up memory',
    'questions': 'tokens of several answers found together, beside one answer after the other',
    'hours': 'frame steps and answers over hours of a made-up patrol at simulated time',
    'kernel': 'scored attention against attention alone, on the shapes of published models (needs a GPU)',
    'gpu': 'everything that only a GPU can say, in one go: its tests, the kernel, whole steps, cameras, tokens, answers',
    'aot': 'compile every launch configuration for every architecture, without a GPU',
    'floor': 'what a frame step and a token of an answer cannot beat on a board, counted; the board need not be here',
    'transport': 'camera images between two processes, with and without the shipped Fast DDS profile',
}


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog='statekv-bench', description=__doc__)
    commands = parser.add_subparsers(dest='benchmark', required=True)
    for name, what in BENCHMARKS.items():
        command = commands.add_parser(name, help=what, description=what)
        arguments.ADD[name](command)
        command.add_argument('--json', action='store_true', help='print one JSON object as the last line of output')
    args = parser.parse_args(argv)
    try:
        result = importlib.import_module(f'statekv_ros.bench.{args.benchmark}').run(args)
    except StateKVError as error:
        print(f'statekv-bench {args.benchmark}: {error}', file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result))
    return 1 if result.get('failed') else 0


if __name__ == '__main__':
    sys.exit(main())
