"""One online job: a bag played through DDS into a live node at a rate, questions asked through the client when they are due."""
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from statekv_ros.backbones.size import ModelSize
from statekv_ros.client import Reply, StateKVClient
from statekv_ros.demo.parts import CAMERA, Watcher, process
from statekv_ros.errors import BagError, EvaluationError
from statekv_ros.evaluation.flops import step_flops
from statekv_ros.evaluation.footage import BagFootage, open_footage
from statekv_ros.evaluation.plan import Job, Settings
from statekv_ros.evaluation.run import answer_entry, token_bytes
from statekv_ros.evaluation.schema import Question
from statekv_ros.memory import parse_answer_policy, parse_prefill_policy
from statekv_ros.replay.bag_reader import BagImage
from statekv_ros.replay.player import PlayOptions, play

READY_S, ANSWER_S = 300.0, 120.0
_LOOK_S = .02           # how often due questions are looked for
_EVERY_HZ = 1000.0      # the largest rate that a node takes
_LOG_LINES = 15


def online(settings: Settings, sizes: Mapping[str, ModelSize], logs: Path, jobs: Sequence[Job]) -> Iterator[list[dict]]:
    """The results of jobs, one after the other, each with a node of its own. Needs `rclpy.init()`.

    Args:
        sizes: of the model, by the job's name, for the FLOPs.
        logs: folder for the nodes' output.

    Raises:
        EvaluationError: a node is already running here, one of ours failed, or no image reached it.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with StateKVClient() as client:
        if jobs and client.wait_until_ready(2.0):
            raise EvaluationError('a node "statekv" is already running in this ROS domain: stop it, or set another '
                                  'ROS_DOMAIN_ID')
    for job in jobs:
        log = logs / f'{job.names[0]}.log'
        with process('-m', 'statekv_ros.node', '--ros-args', *_parameters(settings, job), log=log) as node, \
                StateKVClient() as client:
            live = _LiveJob(settings, job, client, lambda: node.poll() is None)
            try:
                yield [live.result(sizes[job.names[0]])]
            except (EvaluationError, BagError) as error:
                tail = '\n'.join(log.read_text().splitlines()[-_LOG_LINES:])
                raise EvaluationError(f'{job.names[0]}: {error}; the end of {log}:\n{tail}') from error


def require_bag(job: Job) -> None:
    """Raises EvaluationError for a job that only runs offline."""
    if job.policy.is_rlivs:
        raise EvaluationError(f'the node does not run {job.policy.prefill}: leave it out, or leave --online out')
    if parse_prefill_policy(job.policy.watching).kind == 'rekv':
        raise EvaluationError(f'the node does not watch by {job.policy.prefill}, of which nothing could be kept on disk: leave it '
                              'out, or leave --online out')
    if any(question.retrieve_by for question in job.videos[0].questions) and \
            any(parse_answer_policy(answer).kind == 'rekv' for answer in job.policy.answers):
        raise EvaluationError(f'{job.videos[0].place}: a node is asked a question as it is, so rekv(k) cannot retrieve by '
                              '"retrieve_by" there: leave it out of --policies, or leave --online out')
    if not isinstance(open_footage(job.videos[0]), BagFootage):
        raise EvaluationError(f'{job.videos[0].place}: online plays bags only, got {job.videos[0].source!r}: make one with '
                              'statekv-bag make or statekv-patrol make')


def _parameters(settings: Settings, job: Job) -> list[str]:
    """The node's parameters as command line arguments."""
    policy, video = parse_prefill_policy(job.policy.watching), job.videos[0]
    (topic, kind), = open_footage(video).topics.items()
    values = {'model': settings.model, 'device': settings.device, 'dtype': settings.dtype, 'weights': settings.weights,
              'use_sim_time': 'true', 'prefill_policy': policy.kind, 'budget': policy.budget or 1,
              'window_frames': policy.window_frames or 1,
              'max_tokens': settings.max_tokens, 'detailed_format': settings.detailed_format, 'cuda_graph': '"off"',     # bare, it is false in YAML
              'rope_length': settings.watching.length, 'max_frame_pixels': settings.watching.max_frame_pixels,
              'positions': settings.watching.position_policy() or '""',
              'cameras': f'[{CAMERA}]', f'{CAMERA}.topic': topic,
              f'{CAMERA}.transport': 'compressed' if kind.endswith('CompressedImage') else 'raw',
              f'{CAMERA}.rate_hz': float(video.rate_hz or _EVERY_HZ), **job.policy.options}
    return [part for name, value in values.items() for part in ('-p', f'{name}:={value}')]


class _BagClock:
    """Seconds after the bag's first frame that are on show now; told by the player's thread, read by the asking one."""

    def __init__(self, rate: float, end_s: float):
        self._rate, self._end_s = rate, end_s
        self._first_ns: int | None = None
        self._newest = 0.0, 0.0     # (seconds in the bag, monotonic time); one tuple, so that both change at once

    @property
    def first_ns(self) -> int | None:
        """Header stamp of the first frame; None before it."""
        return self._first_ns

    def note(self, image: BagImage) -> None:
        """An image was just published."""
        self._first_ns = image.stamp_ns if self._first_ns is None else self._first_ns
        self._newest = (image.stamp_ns - self._first_ns) / 1e9, time.monotonic()

    def now_s(self) -> float:
        """Goes on between images, and stands still at the end of the last."""
        shown_s, since = self._newest
        return min(self._end_s, shown_s + (time.monotonic() - since) * self._rate) if self._first_ns is not None else -1.0


class _LiveJob:
    """One bag through one node."""

    def __init__(self, settings: Settings, job: Job, client: StateKVClient, node_runs):
        self._settings, self._job, self._client, self._node_runs = settings, job, client, node_runs
        self._footage = open_footage(job.videos[0])
        self._clock = _BagClock(settings.rate, self._footage.extent().duration_s)
        self._watcher = Watcher(client)
        self._stop, self._error = threading.Event(), None
        self._answers: list[dict] = []

    def result(self, size: ModelSize) -> dict:
        """Play, ask, and say what came of it."""
        if not self._watcher.wait(READY_S, self._node_runs):
            raise EvaluationError(f'the node is not ready after {READY_S:.0f} s' if self._node_runs() else 'the node ended')
        player = threading.Thread(target=self._play, name='player', daemon=True)
        player.start()
        try:
            self._ask_while(player.is_alive)
        finally:
            self._stop.set()
            player.join()
        if self._error is not None:
            raise self._error
        self._watcher.drain()
        if not self._watcher.steps:
            raise EvaluationError('the node watched no frame')
        health, steps, video = self._watcher.health, self._watcher.steps, self._job.videos[0]
        carried = [0, *(step.state_tokens for step in steps)]
        scored = parse_prefill_policy(self._job.policy.watching).kind == 'statekv'
        return {'job': self._job.names[0], 'source': video.title, 'video': video.source,
                'prefill_policy': self._job.policy.prefill, 'mode': 'online',
                'rate': self._settings.rate, 'frames': int(health['frames_processed']), 'steps': len(steps),
                'step_ms': [round(step.total_ms, 3) for step in steps], 'step_tokens': [step.step_tokens for step in steps],
                'step_flops': [step_flops(size, step.step_tokens, before, scored) for step, before in zip(steps, carried)],
                'state_tokens': steps[-1].state_tokens, 'detailed_bytes': steps[-1].detailed_bytes,
                'token_bytes': token_bytes(size, self._job.policy, self._settings.detailed_format, steps[-1].step_tokens),
                'dropped': int(health['dropped']), 'lost': int(health['lost']), 'rejected': int(health['rejected']),
                'answers': sorted(self._answers, key=lambda answer: answer['question'])}

    def _play(self) -> None:
        options = PlayOptions(rate=self._settings.rate, wait_s=READY_S)
        try:
            play(self._footage.info, self._footage.topics, options, stop=self._stop, on_frame=self._clock.note)
        except Exception as error:      # reported by the thread that waits for this one
            self._error = error

    def _ask_while(self, playing) -> None:
        """Ask what is due while the bag plays, and the rest at its end."""
        waiting = sorted(enumerate(self._job.videos[0].questions), key=lambda numbered: numbered[1].ask_at)
        while playing() or (waiting and self._error is None):
            if not self._node_runs():
                raise EvaluationError('the node ended')
            if waiting and (waiting[0][1].ask_at <= self._clock.now_s() or not playing()):
                self._ask(*waiting.pop(0))
            else:
                self._client.spin_for(_LOOK_S)

    def _ask(self, number: int, question: Question) -> None:
        for answer_policy in self._job.policy.answers:
            asked_s, begun = self._clock.now_s(), time.monotonic()
            reply = self._client.ask(question.text, camera=CAMERA, timeout_s=ANSWER_S, answer_policy=answer_policy)
            total_ms, told_s = (time.monotonic() - begun) * 1e3, self._clock.now_s()
            self._answers.append(answer_entry(number, question, answer_policy, reply.answer.text, self._spans_s(reply)) | {
                'in_window': question.valid[0] <= told_s <= question.valid[1], 'asked_s': round(asked_s, 3),
                'told_s': round(told_s, 3), 'result': reply.result.value, 'error': reply.error,
                'first_token_ms': round(reply.answer.timing.first_token_ms, 3), 'total_ms': round(total_ms, 3),
                'context_tokens': reply.answer.timing.context_tokens})

    def _spans_s(self, reply: Reply) -> list[list[float]]:
        """As `run.spans_s`, of a message."""
        def seconds(stamp) -> float:
            return (stamp.sec * 10**9 + stamp.nanosec - (self._clock.first_ns or 0)) / 1e9
        return [[seconds(step.first_stamp), seconds(step.last_stamp), round(step.share, 6)] for step in reply.answer.evidence]
