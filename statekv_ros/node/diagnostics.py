"""/diagnostics: one status for the engine, one per camera, one each for poses, watches and the transport."""
import time
from collections import deque
from collections.abc import Callable

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from statekv_ros.node.camera_input import CameraInput
from statekv_ros.node.engine import Engine
from statekv_ros.node.poses import PoseSource
from statekv_ros.node.watches.checks import Checks
from statekv_ros.transport import ProfileSource, TransportProfile, shared_memory_problem

OK, WARN, ERROR, STALE = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR, DiagnosticStatus.STALE
_LOST_SHARE = 0.05      # of the images that should have come


def status(name: str, level: bytes, message: str, values: dict) -> DiagnosticStatus:
    """A DiagnosticStatus; the node puts its own name before `name`. Values in any printable form."""
    return DiagnosticStatus(level=level, name=name, hardware_id='statekv', message=message,
                            values=[KeyValue(key=key, value=str(value)) for key, value in values.items()])


def not_configured(state: str, reason: str) -> DiagnosticStatus:
    """The engine's status where there is none; `state`: the lifecycle state's name; `reason` when configuring failed."""
    return status('engine', ERROR if reason else OK, reason or 'not configured yet', {'state': state})


def loading(state: str, model: str, seconds: float) -> DiagnosticStatus:
    """The engine's status while a model loads, for so many seconds so far."""
    return status('engine', OK, f'loading model {model!r} for {seconds:.0f} s',
                  {'state': state, 'model': model, 'loading_s': round(seconds, 1)})


def note_problem(told: DiagnosticStatus, problem: str) -> None:
    """Add to a status what is wrong around it, '' when nothing is."""
    if problem:
        told.level = max(told.level, WARN)
        told.message = f'{told.message}; {problem}'


class Diagnosis:
    """Turns counters into statuses; notices what changed since the last time."""

    def __init__(self, engine: Engine, facts: dict, changing: Callable[[], dict] = dict):
        """facts: what does not change while configured (model, device, policy); `demonstration`: a warning about the model, or
        empty. changing: more of them, asked for each time."""
        self._engine, self._facts, self._changing = engine, facts, changing
        self._step_ms: deque[float] = deque(maxlen=200)
        self._before: dict[str, tuple[int, ...]] = {}
        self._spent_s, self._looked_at = 0.0, time.monotonic()

    def note_step(self, total_ms: float) -> None:
        """Take one frame step's cost, for the percentiles."""
        self._step_ms.append(total_ms)

    def engine(self, state: str, reason: str) -> DiagnosticStatus:
        """`state`: the lifecycle state's name; `reason`: why the last transition failed, or ''."""
        step_ms = sorted(self._step_ms)
        percentiles = {f'step_ms_p{p}': round(step_ms[min(len(step_ms) - 1, len(step_ms) * p // 100)], 2)
                       for p in (50, 95)} if step_ms else {}
        failures, = self._new('', sum(camera.failures for camera in self._engine.cameras.values()))
        level, message, warning = OK, f'{state}, {self._engine.steps} frame steps', self._facts.get('demonstration', '')
        if reason:
            level, message = ERROR, f'{state}: {reason}'
        elif failures:
            level, message = WARN, f'{message}; {failures} failed just now: see the cameras\' statuses'
        elif warning:
            level, message = WARN, f'{message}; {warning}'
        return status('engine', level, message, {
            'state': state, **self._facts, **self._changing(), 'steps': self._engine.steps, **percentiles,
            'active_questions': len(self._engine.active)})

    def camera(self, source: CameraInput, now_ns: int, stale_after_s: float, active: bool) -> DiagnosticStatus:
        """A camera's health; levels rise with what is newest: silence, refused images, lost images, clock jumps."""
        camera, stream, counts = source.camera, source.camera.stream, source.counts()
        if source.newest_ns is not None:  # a simulated clock may have begun (it was 0) or gone back: silence counts from now on
            source.newest_ns = min(source.newest_ns or now_ns, now_ns)
        silent_s = None if source.newest_ns is None else (now_ns - source.newest_ns) / 1e9
        level, message = OK, 'watching'
        new = self._new(camera.name, counts['frames_in'], counts['lost'], counts['rejected'], camera.failures,
                        source.sampler.restarts)
        frames_in, lost, rejected, failures, restarts = new
        if not active:
            message = 'not active: no images are taken'
        elif silent_s is None:
            level, message = WARN, f'no image yet on {source.topic}{_because(source)}'
        elif silent_s > stale_after_s:
            level, message = STALE, f'stale: no new image for {silent_s:.1f} s on {source.topic}{_because(source)}'
        elif failures:
            level, message = ERROR, f'frame step failed: {camera.last_error}'
        elif rejected:
            level, message = WARN, f'image refused: {camera.last_error}'
        elif lost > _LOST_SHARE * (lost + frames_in):
            level, message = WARN, (f'{lost} of {lost + frames_in} images never came: give the camera\'s process the Fast DDS '
                                    'profile config/fastdds_shm.xml, or set reliability to reliable')
        elif restarts:
            level, message = WARN, 'header stamps went back (looping bag or reset clock): new segment, memory kept'
        elif stream.beyond_trained_context:
            level, message = WARN, ('positions are past the context that the model was trained for: answers may get worse; '
                                    'call ~/reset when the past no longer matters')
        return status(camera.name, level, message, {
            'topic': source.topic, 'silent_s': '' if silent_s is None else round(silent_s, 2), **counts,
            'failed_steps': camera.failures, 'frames_failed': camera.frames_failed, 'segment': stream.segment,
            'frames_held': stream.frames, 'frames_forgotten': stream.forgotten_frames, 'state_tokens': stream.state_tokens,
            'detailed_tokens': stream.detailed_tokens, 'detailed_mb': round(stream.detailed_bytes / 1e6, 2),
            **{f'{tier}_mb': round(size / 1e6, 2) for tier, size in stream.detailed.tier_bytes.items()},
            'steps_below_device': stream.detailed.steps_below,
            'last_error': camera.last_error})

    def poses(self, source: PoseSource, active: bool) -> DiagnosticStatus:
        """Whether it is known where the robot is."""
        unplaced = sum(camera.stream.late.unplaced for camera in self._engine.cameras.values())
        refused, missed, jumps, steps = self._new('pose', source.refused, unplaced, source.jumps, self._engine.steps)
        obstacle = source.obstacle() if active and (missed > 0 or not source.received) else ''
        because = f': {obstacle}' if obstacle else ''
        level, message = OK, f'poses from {source.name}'
        if not active:
            message = 'not active: no poses are taken'
        elif refused:
            level, message = WARN, f'{refused} poses refused: {source.last_error}'
        elif jumps:
            level, message = WARN, (f'the pose jumped {source.newest_jump}: steps keep the pose that was told when they were '
                                    'seen, so what lies before and after may not fit together')
        elif missed > 0:        # less where poses came after their steps
            level, message = WARN, f'{missed} of {steps} frame steps just now have no pose{because}'
        elif not source.received:
            level, message = WARN, f'no pose yet from {source.name}{because}'
        return status('pose', level, message, {
            'source': source.name, 'frame_id': source.frame_id, 'received': source.received, 'refused': source.refused,
            'jumps': source.jumps, 'newest_jump': source.newest_jump, 'steps_without_pose': unplaced,
            'last_error': source.last_error})

    def watches(self, checks: Checks, share: float, active: bool, problem: str) -> DiagnosticStatus:
        """Whether standing questions are checked as often as they want. problem: why they are not kept, or ''."""
        watches, now = checks.table.all(), time.monotonic()
        sums = [sum(getattr(watch, name) for watch in watches) for name in ('checks', 'skipped', 'failed', 'alerts')]
        _, skipped, failed, _ = self._new('watches', *sums)
        taken = (checks.spent_s - self._spent_s) / max(now - self._looked_at, 1e-3)
        self._spent_s, self._looked_at = checks.spent_s, now
        behind = [watch.id for watch in watches if watch.behind]
        idle = [watch.error for watch in watches if watch.error]
        level, message = OK, f'{len(watches)} watches'
        if not active:
            message = f'not active: {len(watches)} watches wait'
        elif skipped > 0:
            level, message = WARN, (f'{len(behind)} of {len(watches)} watches do not keep up, {skipped} checks were skipped just '
                                    f'now: check less often, watch less, or raise the parameter "watch_share" ({share:g})')
        elif failed > 0 or idle:
            level, message = WARN, f'{len(watches)} watches; {idle[0] if idle else "a check failed"}'
        told = status('watches', level, message, {
            'watches': len(watches), **dict(zip(('checks', 'skipped', 'failed', 'alerts'), sums)),
            'share_taken': round(taken, 3), 'share_allowed': share, 'do_not_keep_up': ', '.join(behind[:20])})
        note_problem(told, problem)
        return told

    def _new(self, name: str, *counters: int) -> tuple[int, ...]:
        before = self._before.get(name, (0,) * len(counters))
        self._before[name] = counters
        return tuple(now - then for now, then in zip(counters, before))


def _because(source: CameraInput) -> str:
    obstacle = source.obstacle()
    return f': {obstacle}' if obstacle else ''


def transport(profile: TransportProfile) -> DiagnosticStatus:
    """Whether large images can get through."""
    problem = shared_memory_problem()
    missing = profile.source is ProfileSource.MISSING
    return status('transport', WARN if problem or missing else OK, problem or profile.detail,
                  {'profile': profile.path or '', 'source': profile.source.value})
