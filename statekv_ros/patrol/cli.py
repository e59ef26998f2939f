"""`statekv-patrol make FOLDER`: patrols as bags of camera size, with a questions file whose right answers are known."""
import argparse
import sys
from pathlib import Path

from statekv_ros.errors import BagError
from statekv_ros.replay.cli import FAILED, INTERRUPTED, parse_size
from statekv_ros.replay.signals import Stopped, stopped_by_signals


def main(argv: list[str] | None = None) -> int:
    """Make the folder; returns the exit code: 0, 2 for a bad input (one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(prog='statekv-patrol', description=__doc__)
    make = parser.add_subparsers(dest='command', required=True).add_parser('make', help='write bags and questions.yaml')
    make.add_argument('folder', type=Path, help='folder to create')
    make.add_argument('--videos', type=int, default=8, help='default: %(default)s')
    make.add_argument('--steps', type=int, default=64, help='seconds of each video, two frames each; default: %(default)s')
    make.add_argument('--seed', type=int, default=0, help='of the first video; the next has the next; default: %(default)s')
    make.add_argument('--size', type=parse_size, default='320x240', metavar='WIDTHxHEIGHT', help='default: %(default)s')
    make.add_argument('--no-bags', action='store_true', help='write only questions.yaml, whose sources are made on the fly')
    make.add_argument('--shift', action='store_true', help='things are rare and passed once, facts of every age are asked for '
                      'at the end; for hours, with --steps 3600')
    args = parser.parse_args(argv)
    try:
        with stopped_by_signals():
            from statekv_ros.patrol.make import make_patrols    # takes seconds: after --help
            make_patrols(args.folder, args.videos, args.steps, args.seed, args.size, not args.no_bags, args.shift)
    except BagError as error:
        print(f'statekv-patrol make: {error}', file=sys.stderr)
        return FAILED
    except (Stopped, KeyboardInterrupt):
        print('statekv-patrol make: interrupted', file=sys.stderr)
        return INTERRUPTED
    print(f'{args.folder / "questions.yaml"}: {args.videos} videos of {args.steps} s')
    return 0

if __name__ == '__main__':
    sys.exit(main())
