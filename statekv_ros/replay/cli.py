"""`statekv-bag`: make a rosbag2 from a video or a folder of images, look into one, play one through DDS."""
import argparse
import contextlib
import json
import math
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from statekv_ros.errors import BagError
from statekv_ros.replay.bag_options import ENCODINGS, FOLDER_RATE_HZ, STORAGES, BagOptions
from statekv_ros.replay.signals import Stopped, stop_on_signals, stopped_by_signals
from statekv_ros.terminal import narrow_table
from statekv_ros.transport import ProfileSource, shared_memory_problem, use_shipped_profile

if TYPE_CHECKING:   # rosbags takes its time to import: --help comes before it
    from statekv_ros.replay.bag_reader import BagInfo

FAILED, INTERRUPTED = 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; returns the exit code: 0, 2 for a bad input (one line on stderr), 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except BagError as error:
        print(f'statekv-bag {args.command}: {error}', file=sys.stderr)
        return FAILED
    except (Stopped, KeyboardInterrupt):
        print(f'statekv-bag {args.command}: interrupted', file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='statekv-bag', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)

    make = commands.add_parser('make', help='write a bag from a video file or a folder of images')
    make.set_defaults(run=_make)
    make.add_argument('source', type=Path, help='video file, or folder of images (in the order of their names)')
    make.add_argument('out', type=Path, help='bag folder to create')
    make.add_argument('--topic', default=BagOptions.topic, help='default: %(default)s (/compressed is added for jpeg)')
    make.add_argument('--storage', choices=STORAGES, default=BagOptions.storage, help='default: %(default)s')
    make.add_argument('--rate', type=float, metavar='HZ', help='images per second of video time; default: the '
                      f"video's own, {FOLDER_RATE_HZ:g} for a folder")
    make.add_argument('--encoding', choices=ENCODINGS, default=BagOptions.encoding, help='default: %(default)s')
    make.add_argument('--jpeg-quality', type=int, default=BagOptions.jpeg_quality, metavar='1..100')
    make.add_argument('--frame-id', default=BagOptions.frame_id, help='default: %(default)s')
    make.add_argument('--max-frames', type=int, metavar='N')
    make.add_argument('--size', type=parse_size, metavar='WIDTHxHEIGHT', help='resize to this many pixels')
    make.add_argument('--start-stamp', dest='start_ns', type=_nanoseconds, default=BagOptions.start_ns,
                      metavar='SECONDS', help=f'header stamp of the start; default: {BagOptions.start_ns / 1e9:g}')
    make.add_argument('--overwrite', action='store_true', help='replace a bag at OUT')

    info = commands.add_parser('info', help='topics, types, counts and duration of a bag')
    info.set_defaults(run=_info)

    play = commands.add_parser('play', help='publish the images of a bag through DDS, with the poses in it and /clock')
    play.set_defaults(run=_play)
    play.add_argument('--rate', type=_rate, default=1.0, help='bag seconds per second, or "max": as fast as reliable '
                      'subscribers receive (one that then works longer on an image needs a queue); default: 1')
    play.add_argument('--loop', action='store_true', help='begin again at the end; header stamps go back then')
    play.add_argument('--topics', nargs='+', metavar='TOPIC', help='only these image topics')
    play.add_argument('--remap', nargs='+', type=_remapping, default=[], metavar='/A:=/B', help='other topic names')
    play.add_argument('--no-clock', dest='clock', action='store_false', help='do not publish /clock')
    play.add_argument('--no-poses', dest='poses', action='store_false', help='do not publish odometry and other poses')
    play.add_argument('--restamp', action='store_true', help='stamp messages with the time of publishing')
    offered = play.add_mutually_exclusive_group()
    offered.add_argument('--reliable', action='store_true', default=True,
                         help='offer reliable (default; best-effort subscribers match too)')
    offered.add_argument('--best-effort', dest='reliable', action='store_false', help='offer best-effort only')
    play.add_argument('--wait-subscribers', type=int, default=1, metavar='N',
                      help='begin when every topic has N subscribers, 0: at once; default: %(default)s')
    play.add_argument('--wait-timeout', type=float, default=30.0, metavar='SECONDS', help='default: %(default)s')

    for command in (info, play):
        command.add_argument('bag', type=Path, help='bag folder, or one .mcap or .db3 file')
        command.add_argument('--allow-truncated', action='store_true', help='use what is left of a cut-off bag')
        command.add_argument('--json', action='store_true', help='print one JSON object as the last line')
    return parser


def _make(args: argparse.Namespace) -> int:
    from statekv_ros.replay.bag_writer import write_bag
    from statekv_ros.replay.sources import Source
    source = Source(args.source, args.rate, args.size, args.max_frames)
    options = BagOptions(topic=args.topic, storage=args.storage, encoding=args.encoding, jpeg_quality=args.jpeg_quality,
                         frame_id=args.frame_id, start_ns=args.start_ns, overwrite=args.overwrite)
    expected = source.expected_frames()
    with stopped_by_signals(), _progress() as progress:
        task = progress.add_task('writing', total=expected)
        count = write_bag(args.out, source.frames(), options, on_frame=lambda: progress.advance(task))
    if expected and count < 0.95 * expected:
        print(f'statekv-bag make: {args.source} promises {expected} images, but only {count} could be read: it may be '
              'cut off', file=sys.stderr)
    print(f'{args.out}: {count} images on {options.full_topic}')
    return 0


def _info(args: argparse.Namespace) -> int:
    from statekv_ros.replay.bag_reader import bag_info
    info = bag_info(args.bag, args.allow_truncated)
    table = narrow_table(f'{info.path} ({info.storage}, {info.duration_ns / 1e9:.2f} s, {info.messages} messages'
                         f'{"" if info.complete else ", cut off"})', 'topic', 'type', 'messages', text=2)
    for topic in info.topics:
        table.add_row(topic.name, topic.type, str(topic.count))
    if args.json:
        print(json.dumps(_as_json(info)))
    else:
        Console().print(table)
    return 0


def _play(args: argparse.Namespace) -> int:
    from statekv_ros.replay.bag_reader import bag_info, choose_topics, pose_topics
    info = bag_info(args.bag, args.allow_truncated)
    topics, poses = choose_topics(info, args.topics), pose_topics(info) if args.poses else {}
    profile = use_shipped_profile()     # before anything of ROS is imported and reads the environment
    for problem in (profile.detail if profile.source is ProfileSource.MISSING else None, shared_memory_problem()):
        if problem:
            _warn(problem)
    from statekv_ros.replay.player import PlayOptions, play
    options = PlayOptions(rate=args.rate, loop=args.loop, remap=dict(args.remap), clock=args.clock,
                          reliable=args.reliable, restamp=args.restamp, wait_subscribers=args.wait_subscribers,
                          wait_s=args.wait_timeout)
    if unknown := [name for name in options.remap if name not in topics | poses]:
        raise BagError(f'cannot remap {", ".join(unknown)}: not among the topics that are played '
                       f'({", ".join(topics | poses)})')
    total = None if args.loop else sum(topic.count for topic in info.topics if topic.name in topics)
    with stop_on_signals() as stop, _progress() as progress:
        task = progress.add_task('playing', total=total)
        report = play(info, topics, options, stop=stop, on_frame=lambda image: progress.advance(task), on_warning=_warn,
                      poses=poses)
    print(f'{report.frames} images in {report.wall_s:.2f} s, rate {report.rate:.3f} '
          f'({report.frames_per_s:.1f} images/s){", interrupted" if report.interrupted else ""}')
    if args.json:
        print(json.dumps({'bag': str(info.path), 'frames': report.frames, 'topics': report.topics,
                          'wall_s': round(report.wall_s, 6), 'bag_s': round(report.bag_s, 6),
                          'rate_asked': 'max' if math.isinf(args.rate) else args.rate, 'rate': round(report.rate, 6),
                          'frames_per_s': round(report.frames_per_s, 3), 'interrupted': report.interrupted,
                          'complete': info.complete}))
    return 0


def _as_json(info: 'BagInfo') -> dict:
    return {'bag': str(info.path), 'storage': info.storage, 'files': [str(file) for file in info.files],
            'messages': info.messages, 'start_ns': info.start_ns, 'duration_s': info.duration_ns / 1e9,
            'complete': info.complete, 'topics': [topic._asdict() for topic in info.topics]}


def _warn(text: str) -> None:
    print(f'statekv-bag: warning: {text}', file=sys.stderr)


def _progress() -> Progress:
    """A bar on stderr; nothing where that is not a terminal."""
    console = Console(stderr=True)
    return Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                    console=console, disable=not console.is_terminal)


def _nanoseconds(text: str) -> int:
    # Decimal: a float cannot hold the nanoseconds of a wall time.
    with contextlib.suppress(ArithmeticError, ValueError):
        return int(Decimal(text) * 10**9)
    raise argparse.ArgumentTypeError(f'must be a number of seconds, got {text!r}')


def _rate(text: str) -> float:
    if text == 'max':
        return math.inf
    with contextlib.suppress(ValueError):
        if math.isfinite(rate := float(text)) and rate > 0:
            return rate
    raise argparse.ArgumentTypeError(f'must be a number above 0 or "max", got {text!r}')


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) from an argument like 640x480."""
    if not (match := re.fullmatch(r'(\d+)x(\d+)', text)):
        raise argparse.ArgumentTypeError(f'must be WIDTHxHEIGHT in pixels, for example 640x480, got {text!r}')
    return int(match[1]), int(match[2])


def _remapping(text: str) -> tuple[str, str]:
    old, arrow, new = text.partition(':=')
    if not (arrow and old.startswith('/') and new.startswith('/')):
        raise argparse.ArgumentTypeError(f'must be /old:=/new, got {text!r}')
    return old, new


if __name__ == '__main__':
    sys.exit(main())
