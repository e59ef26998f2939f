"""Where-questions about patrols: the pose of an answer is where its thing was seen, also after SIGKILL and a restart."""
import math
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from campaign.record import Record
from campaign.subject import PARAMETERS, Broken
from live import SECOND, Graph, NodeProcess, environment, new_domain
from statekv_ros.msg import Answer, Evidence
from statekv_ros.node.messages import to_ns
from statekv_ros.patrol.path import FRAME, STEP_M, odometry, pose_at
from statekv_ros.patrol.questions import Question, answer_at, evidence_steps
from statekv_ros.patrol.video import FRAME_NS, patrol_frames
from statekv_ros.patrol.world import Patrol, make_patrol
from statekv_ros.replay.bag_writer import BagOptions, write_bag

WANTED = 200            # questions
_STEPS, _PER_PATROL, _SIDE = 64, 40, 64
_RATE = 4               # of playing: what comes 20 ms late is 80 ms late by its stamp
_SILENT_S = 1.0         # after the last image; each waits for less
_FOR_QUESTIONS = 0.6     # of the time, and for a second start
_START_NS = BagOptions.start_ns


@dataclass(frozen=True)
class _Asked:
    """A question about one thing of a camera's patrol, and the steps in which it was in view."""
    camera: str
    text: str
    steps: tuple[int, ...]


def run(record: Record) -> None:
    """A trial is a question; all are asked in two lives of the node."""
    walks, asked = {}, []
    while len(asked) < record.wanted:
        camera = f'walk_{len(walks)}'
        walks[camera] = make_patrol(_STEPS, np.random.default_rng([record.seed, len(walks)]))
        asked += _questions(camera, walks[camera])[:record.wanted - len(asked)]
    seen = _live(record, walks, asked, watch=True)
    again = _live(record, walks, asked[:len(seen)], watch=False)
    evidence_right = pose_right = 0
    errors_m = []
    for number in record.numbers():
        if number >= len(seen):     # there was no time for more
            break
        entry, answer = asked[number], seen[number]
        if (answer.text, answer.pose, answer.evidence) != (again[number].text, again[number].pose, again[number].evidence):
            record.fail('another answer', number, entry.text, f'{answer}, and after the restart {again[number]}')
        if not answer.has_pose or answer.pose.header.frame_id != FRAME or answer.pose != answer.evidence[0].pose:
            record.fail('no pose', number, entry.text, f'{answer}')
            continue
        errors_m.append(_distance(answer, to_ns(answer.pose.header.stamp) - _START_NS))
        shows = any(_shows(answer.evidence[0], step) for step in entry.steps)
        # Within one step's travel of where its thing was in view.
        times_ns = [step * SECOND + half for step in entry.steps for half in (0, FRAME_NS)]
        near = any(_distance(answer, time_ns) <= STEP_M for time_ns in times_ns)
        evidence_right, pose_right = evidence_right + shows, pose_right + near
        if shows and not near:
            record.fail('right evidence at a wrong place', number, entry.text, f'{answer}')
        record.note(f'evidence {"right" if shows else "wrong"}, place {"right" if near else "wrong"}')
    record.figures |= {'evidence_right': evidence_right, 'pose_right': pose_right}
    if pose_right < evidence_right:
        record.fail_whole('fewer places than evidence', f'{pose_right} poses are right, and {evidence_right} pieces of evidence')
    if errors_m:
        middle = sorted(errors_m)[len(errors_m) // 2]
        record.figures |= {'pose_error_m_median': round(middle, 6), 'pose_error_m_max': round(max(errors_m), 6)}


def _questions(camera: str, patrol: Patrol) -> list[_Asked]:
    """About what was passed once, each thing's moment, and what came before and after it."""
    things = [sight.thing for sight in patrol.objects(_STEPS - 1)]
    questions = [Question(kind, thing) for thing in things if things.count(thing) == 1 for kind in ('when', 'before', 'after')]
    return [_Asked(camera, question.text, evidence_steps(patrol, question, _STEPS - 1)) for question in questions
            if answer_at(patrol, question, _STEPS - 1) is not None][:_PER_PATROL]


def _live(record: Record, walks: dict[str, Patrol], asked: list[_Asked], watch: bool) -> list[Answer]:
    """One life of the node, ended by SIGKILL: its answers. watch: with the bags played before, as many as there is time for, and
    only the questions about those."""
    domain = new_domain()
    node = NodeProcess(record.folder, domain, **PARAMETERS | {
        'cameras': f'[{",".join(walks)}]', 'memory_dir': record.folder / 'memory', 'pose.topic': '/odom', 'rate_hz': '1000.0',
        'reliability': 'reliable', 'evidence_frames': 3, 'device_cache_mb': 0, 'diagnostics_period_s': '0.5'})
    graph = Graph(domain)
    try:
        graph.wait_for_state('active')
        played = [] if watch else list(walks)
        for camera, patrol in walks.items() if watch else ():
            if played and record.left_s < _FOR_QUESTIONS * record.seconds:
                break
            played.append(camera)
            _play(record.folder / camera, camera, patrol, domain)
            graph.wait(lambda: _is_through(graph.camera(camera)), f'all images of {camera}')
        answers = []
        for entry in (entry for entry in asked if entry.camera in played):
            response = graph.ask(entry.text, camera=entry.camera, max_tokens=8)
            if not response.success:
                raise Broken('no answer', response.error)
            answers.append(response.answer)
        if watch:
            record.figures |= {'images': sum(int(graph.camera(camera)['frames_processed']) for camera in walks),
                               'steps_without_pose': int(graph.camera('pose')['steps_without_pose'])}
        return answers
    except AssertionError as error:     # what `live` waits for in vain
        raise Broken('lost', f'{error}\n{node.log[-3000:]}') from error
    finally:
        node.stop(signal.SIGKILL)
        graph.close()


def _play(bag: Path, camera: str, patrol: Patrol, domain: int) -> None:
    """Its bag, with the robot's odometry."""
    write_bag(bag, patrol_frames(patrol, len(camera), _SIDE, _SIDE), BagOptions(topic=f'/{camera}/image_raw'),
              poses=odometry(_STEPS * SECOND))
    command = [sys.executable, '-m', 'statekv_ros.replay.cli', 'play', str(bag), '--rate', str(_RATE)]
    done = subprocess.run(command, env=environment(domain), capture_output=True, text=True)
    if done.returncode:
        raise Broken('the bag was not played', done.stderr)


def _is_through(values: dict[str, str]) -> bool:
    """Whether the camera's images are in the memory. On a busy machine a few are not: newer ones took their place."""
    return float(values['silent_s'] or 0) > _SILENT_S and int(values['frames_processed']) > _STEPS


def _shows(evidence: Evidence, step: int) -> bool:
    """Whether the two frames of a patrol's step are among those of the evidence."""
    first_ns, last_ns = to_ns(evidence.first_stamp) - _START_NS, to_ns(evidence.last_stamp) - _START_NS
    return first_ns <= step * SECOND + FRAME_NS and last_ns >= step * SECOND


def _distance(answer: Answer, time_ns: int) -> float:
    """From where it says that the robot was to where the robot was at that time, in metres."""
    told, true = answer.pose.pose.position, pose_at(time_ns).position
    return math.dist((told.x, told.y, told.z), true)
