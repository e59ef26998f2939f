"""From the memory's plain values to the package's messages, and back for stamps."""
import math
from array import array
from collections.abc import Mapping
from types import MappingProxyType

from builtin_interfaces.msg import Time
from geometry_msgs.msg import Point, PoseStamped, Quaternion
from sensor_msgs.msg import CompressedImage
from std_msgs.msg import Header

from statekv_ros.action import Ask
from statekv_ros.memory import Evidence as Looked
from statekv_ros.memory import StepReport
from statekv_ros.memory.pose import Pose
from statekv_ros.msg import Alert as AlertMessage
from statekv_ros.msg import Answer, AnswerTiming, Evidence, FrameTiming, WatchState
from statekv_ros.node.questions import CameraAnswer, Progress
from statekv_ros.node.watches.watch import Alert, Watch

_NS = 10**9
# By camera and step: header stamp in nanoseconds, and a JPEG.
Pictures = Mapping[tuple[str, int], tuple[int, bytes]]
_NONE: Pictures = MappingProxyType({})
_LAST_NS = (2**31 - 1) * _NS    # what a stamp can hold


def to_ns(stamp: Time) -> int:
    """A ROS stamp in nanoseconds."""
    return stamp.sec * _NS + stamp.nanosec


def to_stamp(nanoseconds: int) -> Time:
    """Nanoseconds as a ROS stamp."""
    return Time(sec=nanoseconds // _NS, nanosec=nanoseconds % _NS)


def frame_timing(camera: str, frame_id: str, report: StepReport, wait_ms: float, counts: dict[str, int]) -> FrameTiming:
    """`counts`: frames_in, frames_sampled, frames_processed, dropped, lost, rejected."""
    message = FrameTiming(
        camera=camera, step=report.step, segment=report.segment, wait_ms=wait_ms, preprocess_ms=report.preprocess_ms,
        cameras=report.cameras, vision_ms=report.vision_ms, prefill_ms=report.prefill_ms, select_ms=report.select_ms,
        total_ms=report.total_ms,
        step_tokens=report.step_tokens, budget=report.budget, state_tokens=report.state_tokens,
        detailed_tokens=report.detailed_tokens, detailed_bytes=report.detailed_bytes, **counts)
    message.header.stamp = to_stamp(report.last_stamp_ns)
    message.header.frame_id = frame_id
    return message


def answer(camera_answer: CameraAnswer, asked: Time, frame_id: str, pictures: Pictures = _NONE) -> Answer:
    """One camera's answer; `asked` is the node's time of asking, `pictures` those that its evidence is to carry."""
    result, camera = camera_answer.result, camera_answer.camera
    message = Answer(
        question=result.question, text=result.text, camera=camera, first_stamp=to_stamp(result.first_stamp_ns),
        last_stamp=to_stamp(result.last_stamp_ns), frames_covered=result.frames_covered,
        finish_reason=result.finish_reason, prefill_policy=result.prefill_policy, answer_policy=result.answer_policy,
        demonstration_model=result.demonstration_model,
        evidence=[_evidence(camera, step, pictures, frame_id) for step in result.evidence],
        timing=AnswerTiming(
            queue_ms=camera_answer.queue_ms, prefill_ms=result.prefill_ms, first_token_ms=camera_answer.first_token_ms,
            decode_ms=result.decode_ms, total_ms=camera_answer.total_ms, question_tokens=result.question_tokens,
            answer_tokens=result.answer_tokens, context_tokens=result.context_tokens,
            frame_steps_meanwhile=camera_answer.frame_steps_meanwhile))
    message.header.stamp = asked
    message.header.frame_id = frame_id
    return _with_pose(message)


def feedback(progress: Progress) -> Ask.Feedback:
    """What a goal's client hears while its answer is in the making."""
    return Ask.Feedback(queue_place=progress.place, camera=progress.camera, text=progress.text, answer_tokens=progress.tokens,
                        evidence=[_evidence(progress.camera, step) for step in progress.looked_at])


def joined(answers: list[Answer]) -> Answer:
    """Several cameras' answers as one: a line of text each, the span that they cover together, all their evidence.

    Evidence shares stay those of each camera's own answer.
    """
    if len(answers) == 1:
        return answers[0]
    first, last = answers[0], answers[-1]
    timings = [a.timing for a in answers]
    return _with_pose(Answer(
        header=Header(stamp=first.header.stamp), question=first.question,
        text='\n'.join(f'{a.camera}: {a.text}' for a in answers),
        camera=','.join(a.camera for a in answers), frames_covered=sum(a.frames_covered for a in answers),
        first_stamp=min((a.first_stamp for a in answers), key=to_ns), last_stamp=max((a.last_stamp for a in answers), key=to_ns),
        finish_reason=next((a.finish_reason for a in answers if a.finish_reason != 'stop'), 'stop'),
        prefill_policy=first.prefill_policy, answer_policy=first.answer_policy, demonstration_model=first.demonstration_model,
        evidence=sorted((e for a in answers for e in a.evidence), key=lambda e: -e.share),
        timing=AnswerTiming(
            queue_ms=timings[0].queue_ms, first_token_ms=timings[0].first_token_ms,
            prefill_ms=sum(t.prefill_ms for t in timings), decode_ms=sum(t.decode_ms for t in timings),
            total_ms=last.timing.total_ms, question_tokens=sum(t.question_tokens for t in timings),
            answer_tokens=sum(t.answer_tokens for t in timings), context_tokens=sum(t.context_tokens for t in timings),
            frame_steps_meanwhile=last.timing.frame_steps_meanwhile)))


def alert(told: Alert, now: Time, frame_id: str, pictures: Pictures = _NONE) -> AlertMessage:
    """`now` is the node's time; `pictures` those that its evidence is to carry."""
    definition, result = told.definition, told.result
    message = AlertMessage(
        id=told.id, question=definition.question, camera=definition.camera, condition=definition.condition,
        text_before=told.before, text=result.text, since=to_stamp(told.since_ns), first_stamp=to_stamp(result.first_stamp_ns),
        last_stamp=to_stamp(result.last_stamp_ns), demonstration_model=result.demonstration_model,
        evidence=[_evidence(definition.camera, step, pictures, frame_id) for step in result.evidence])
    message.header.stamp, message.header.frame_id = now, frame_id
    return _with_pose(message)


def watch_state(watch: Watch) -> WatchState:
    """As ~/watches lists it."""
    definition = watch.definition
    ends_ns = 0 if math.isinf(watch.ends_at) else min(int(watch.ends_at * _NS), _LAST_NS)
    return WatchState(
        id=watch.id, question=definition.question, camera=definition.camera, condition=definition.condition,
        every_steps=definition.every_steps, every_s=definition.every_s, debounce=definition.debounce, expires=to_stamp(ends_ns),
        max_tokens=definition.max_tokens, answer_policy=definition.answer_policy, configured=watch.configured, text=watch.text,
        stamp=to_stamp(watch.stamp_ns), checks=watch.checks, skipped=watch.skipped, failed=watch.failed, alerts=watch.alerts,
        keeps_up=not watch.behind, error=watch.error)


def jpeg(stamp_ns: int, data: bytes, frame_id: str) -> CompressedImage:
    """A JPEG as a message; `frame_id`: the camera's."""
    message = CompressedImage(format='jpeg', data=array('B', data))
    message.header.stamp, message.header.frame_id = to_stamp(stamp_ns), frame_id
    return message


def _evidence(camera: str, step: Looked, pictures: Pictures = _NONE, frame_id: str = '') -> Evidence:
    message = Evidence(camera=camera, first_stamp=to_stamp(step.first_stamp_ns), last_stamp=to_stamp(step.last_stamp_ns),
                       share=step.share, has_pose=step.pose is not None, pose=pose_stamped(step.pose))
    if picture := pictures.get((camera, step.step)):
        message.image = jpeg(*picture, frame_id)
    return message


def pose_stamped(pose: Pose | None) -> PoseStamped:
    """As a message; an empty one where it is not known."""
    message = PoseStamped()
    if pose is not None:
        message.header.stamp, message.header.frame_id = to_stamp(pose.stamp_ns), pose.frame_id
        message.pose.position = Point(**dict(zip('xyz', pose.position)))
        message.pose.orientation = Quaternion(**dict(zip('xyzw', pose.orientation)))
    return message


def _with_pose(answer: Answer | AlertMessage) -> Answer | AlertMessage:
    """The pose of its first evidence."""
    if answer.evidence:
        answer.has_pose, answer.pose = answer.evidence[0].has_pose, answer.evidence[0].pose
    return answer
