"""The ROS 2 node: parameters, topics and services around the engine. No callback computes or waits."""
import gc
import threading
import time
import traceback
from functools import partial
from pathlib import Path

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import QoSProfile

from statekv_ros.backbones import Backbone, load_backbone
from statekv_ros.errors import Code, QuestionError, StateKVError
from statekv_ros.memory import StepReport, VideoStream
from statekv_ros.memory.detailed.formats import find_format
from statekv_ros.memory.detailed.room import give_back_free_memory
from statekv_ros.memory.trial import demonstration_warning, try_out
from statekv_ros.msg import Answer, FrameTiming
from statekv_ros.node import diagnostics, messages
from statekv_ros.node.accelerator import Accelerator, prepare
from statekv_ros.node.bonding import LifecycleBond
from statekv_ros.node.camera import Camera
from statekv_ros.node.camera_input import CameraInput, decoder, message_type
from statekv_ros.node.device_loss import Recovery, free_device_memory, is_lost
from statekv_ros.node.disk import Disk
from statekv_ros.node.engine import STOPPING, Engine
from statekv_ros.node.goals import NOT_ACTIVE, Goals
from statekv_ros.node.memory_folder import identity_of, open_memory
from statekv_ros.node.parameters import Parameters
from statekv_ros.node.pictures import Darkroom
from statekv_ros.node.pictures.begin import open_album
from statekv_ros.node.pictures.evidence import EvidenceImage
from statekv_ros.node.pictures.frames import FramesService
from statekv_ros.node.pictures.markers import EvidenceMarkers
from statekv_ros.node.planning import ASSUMED_FRAME, require_memory
from statekv_ros.node.poses import PoseSource, make_source
from statekv_ros.node.services import Services
from statekv_ros.node.transitions import Transitions
from statekv_ros.node.twins import Twins
from statekv_ros.node.watches.begin import begin_watches
from statekv_ros.node.watches.services import WatchServices
from statekv_ros.store.tier import DiskTier
from statekv_ros.transport import TransportProfile

SUCCESS, FAILURE, ERROR = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE, TransitionCallbackReturn.ERROR


class MemoryNode(LifecycleNode):
    """A robot's visual memory: watches cameras, publishes ~/timing, ~/answer, ~/evidence_image and ~/evidence_markers, serves
    ~/ask, ~/query, ~/frames and ~/reset, and standing questions (`WatchServices`).

    The action and the services exist from the start and say why they cannot answer; so does /diagnostics. Transitions run in a thread of their
    own (see `Transitions`), all else in the executor's and the engine's.
    """

    def __init__(self, profile: TransportProfile, **options):
        """profile: what `use_shipped_profile` did before rclpy was initialised."""
        super().__init__('statekv', **options)
        self._profile = profile
        self._settings = Parameters(self, lambda: self._state)
        for sentence in self._settings.unknown:
            self.get_logger().warning(sentence)
        self._reason = ''
        self._loading_since: float | None = None    # of `time.monotonic`, while a model loads
        self._life = threading.RLock()      # `stop` may come from another thread than the transition under way
        self._stopped = False
        self._twins = Twins(self)
        self._backbone: Backbone | None = None
        self._engine: Engine | None = None
        self._disk: Disk | None = None
        self._disk_problem = ''     # of its start
        self._inputs: list[CameraInput] = []
        self._poses: PoseSource | None = None
        self._diagnosis: diagnostics.Diagnosis | None = None
        self._accelerator: Accelerator | None = None
        self._timing = self.create_lifecycle_publisher(FrameTiming, '~/timing', QoSProfile(depth=100))
        self._answers = self.create_lifecycle_publisher(Answer, '~/answer', QoSProfile(depth=10))
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', QoSProfile(depth=10))
        # A group of their own: while one waits for its answer, the others and all subscriptions go on.
        group = ReentrantCallbackGroup()
        self._darkroom = Darkroom(self.get_logger().error)
        services = Services(self, group, self._settings, self._require_engine, self._answers.publish, self._darkroom,
                            (EvidenceImage(self, self._darkroom), EvidenceMarkers(self, self._darkroom)))
        self._goals = Goals(self, group, services)
        self._watches = WatchServices(self, group, self._settings, self._require_engine, services.wake, self._darkroom)
        FramesService(self, group, services)
        # Health must be told and the node must start also while a simulated clock stands still.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(self._settings['diagnostics_period_s'], self._diagnose, clock=steady)
        self.add_post_set_parameters_callback(self._apply_rates)
        self._transitions = Transitions(self)
        self._recovery = Recovery(self, lambda: self._state, self._blame, self._transitions.submit)
        # Who activates itself has no manager to be bonded with.
        self._bond = LifecycleBond(self, 0.0 if self._settings['autostart'] else self._settings['bond_heartbeat_period'])
        if self._settings['autostart']:
            self._start = self.create_timer(0.0, self._autostart, clock=steady)

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Model loaded, memories empty or as the memory folder has them, engine waiting; no images yet. On failure the node
        stays unconfigured."""
        self._loading_since = time.monotonic()
        try:
            if self._settings.problems:
                raise StateKVError('; '.join(self._settings.problems))
            self._load()
        except Exception as error:  # whatever it is: the node lives on, unconfigured, and tells
            self._tell('configured', error)
            self._release()
            return FAILURE
        finally:
            self._loading_since = None
        self._reason = ''
        return SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Images are watched, timing and answers are published. On failure the node stays inactive, without subscriptions."""
        with self._life:
            try:
                for source in self._sources:
                    source.open()
            except Exception as error:  # of the middleware: two types on one topic, say
                self._tell('activated', StateKVError(f'{source.about}: {error} (see the parameters {source.parameters})'))
                self._close_inputs()
                return FAILURE
        self._reason = ''
        self._goals.open()
        self._bond.hold()
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """No image is taken any more and goals end with what they have; the memory is kept and questions are still answered, by the
        service only."""
        try:
            self._bond.let_go()
            self._goals.close(*((Code.SHUTTING_DOWN, STOPPING) if self._stopped else NOT_ACTIVE))
            self._close_inputs()
        except Exception as error:
            self._tell('deactivated', error)
            return ERROR
        return super().on_deactivate(state)

    def _close_inputs(self) -> None:
        with self._life:
            for source in self._sources:
                source.close()

    @property
    def _sources(self) -> list[CameraInput | PoseSource]:
        return [*self._inputs, *filter(None, [self._poses])]

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Model, memories and GPU memory are gone, but for what is on disk; parameters are as they were."""
        try:
            self._release()
        except Exception as error:
            self._tell('cleaned up', error)
            return ERROR
        self._reason = ''
        return SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """After a transition that went wrong halfway: as after cleanup, unconfigured, with the reason on /diagnostics."""
        self._reason = self._reason or f'the transition from state {state.label} failed'
        self._release()
        self.get_logger().error(f'everything was freed and the node is unconfigured: {self._reason}')
        return SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """As after cleanup, for good."""
        self.stop()
        return SUCCESS

    def stop(self) -> None:
        """End work in progress and free everything; waiting questions get an error. May be called more than once and from any
        thread: a model that is being loaded is dropped when it is there, without waiting for it."""
        self._stopped = True
        self._transitions.close()
        self.on_deactivate(None)
        self._release()
        self._darkroom.close()
        self._reason = STOPPING

    def stuck_s(self) -> float:
        """Seconds since the engine, at work, last made progress; 0 while it waits for work or there is none."""
        return self._engine.stuck_s() if self._engine is not None else 0.0

    def _blame(self, reason: str) -> str:
        before, self._reason = self._reason, reason
        self.get_logger().error(reason)
        return before

    def _tell(self, done: str, error: Exception) -> None:
        if self._stopped:
            return
        if not isinstance(error, StateKVError):
            self.get_logger().error(traceback.format_exc())
        self._reason = str(error) or type(error).__name__
        self.get_logger().error(f'cannot be {done}: {self._reason}')

    def _load(self) -> None:
        get = self._settings
        self._release()     # nothing is there, unless a transition went wrong in a way that nobody thought of
        self.get_logger().info(f'loading model {get["model"]!r} ...')
        backbone = load_backbone(
            get['model'], get['device'], get['dtype'], get['max_frame_pixels'], get['min_frame_pixels'], get['system_prompt'],
            get['rope_length'], get['weights'])
        try_out(backbone)
        if backbone.demonstration:
            self.get_logger().warning(demonstration_warning(backbone))
        policy = get.prefill_policy()
        device_cache_bytes, host_cache_bytes = require_memory(get, backbone, policy, self._keeps_on_disk, self.get_logger().info)
        warm = prepare(backbone, policy, ASSUMED_FRAME, get['positions'], get['detailed_format'], len(get['cameras']),
                       self.get_logger())
        poses = make_source(self, get['pose.topic'], get['pose.type'], get['pose.target_frame'], get['pose.source_frame'],
                            get['pose.tolerance_s'])
        cameras, kinds = [], {}
        tiers = {name: DiskTier(packed=not find_format(get['detailed_format']).rotated) for name in get['cameras']} \
            if self._keeps_on_disk else {}
        for name in get['cameras']:
            stream = VideoStream(backbone, policy, device_cache_bytes=device_cache_bytes, positions=get['positions'],
                                 cuda_graph=get['cuda_graph'], detailed_format=get['detailed_format'],
                                 host_cache_bytes=host_cache_bytes, below=[tiers[name]] if tiers else [])
            kinds[name] = message_type(get[f'{name}.topic'], get[f'{name}.transport'])
            cameras.append(camera := Camera(name, stream, decoder(kinds[name], get['max_image_pixels'], backbone.frame_size)))
            if poses is not None:
                stream.locate = poses.locate(partial(getattr, camera, 'frame_id'))
        if tiers:
            self._open_memory(backbone, {camera.name: camera.stream for camera in cameras}, tiers)
        disk = self._disk
        checks, kept = begin_watches(get, cameras, disk, Path(get['memory_dir']).expanduser(), backbone,
                                     self._watches.tell, self.get_logger().warning)
        for camera in cameras:
            camera.album = open_album(self._darkroom, camera, disk, get['thumbnail.width'], get['thumbnail.quality'])
        engine = Engine(cameras, self._publish_step, lambda: get['slice_tokens'], get['max_queued_questions'],
                        self.get_logger().error, disk, checks)
        if poses is not None:
            poses.on_pose = engine.note_poses
        engine.is_lost = partial(is_lost, backbone.device)
        engine.on_lost = lambda reason: self._recovery.lost(reason, self._keeps_on_disk, lambda: self._engine is engine)
        accelerator = Accelerator(backbone.device, {camera.name: camera.stream for camera in cameras}, engine.together, warm)
        inputs = [CameraInput(self, camera, get[f'{camera.name}.topic'], kinds[camera.name], get[f'{camera.name}.rate_hz'],
                              get[f'{camera.name}.reliability'], partial(engine.note_image, camera.name)) for camera in cameras]
        diagnosis = diagnostics.Diagnosis(engine, {
            'model': backbone.name, 'device': backbone.device, 'dtype': backbone.dtype, 'weights': backbone.weights,
            'prefill_policy': policy, 'kv_bytes_per_token': backbone.kv_bytes_per_token,
            'demonstration': demonstration_warning(backbone)},
            lambda: {**accelerator.facts(), **(disk.facts() if disk is not None else {}), **self._darkroom.facts()})
        with self._life:
            if self._stopped:
                raise StateKVError(STOPPING)
            self._backbone, self._engine, self._inputs, self._diagnosis, self._poses = backbone, engine, inputs, diagnosis, poses
            self._watches.kept = kept
            self._accelerator = accelerator
            engine.start()
        topics = ', '.join(f'{source.camera.name} on {source.topic}' for source in inputs)
        topics += f'; poses from {poses.name}' if poses is not None else ''
        self.get_logger().info(f'{policy} on {backbone.device} ({backbone.dtype}, weights {backbone.weights}), '
                               f'{backbone.kv_bytes_per_token} bytes per token; cameras: {topics}')

    @property
    def _keeps_on_disk(self) -> bool:
        return bool(self._settings['memory_dir'] and self._settings['disk_cache_gb'])

    def _open_memory(self, backbone: Backbone, streams: dict[str, VideoStream], tiers: dict[str, DiskTier]) -> None:
        """Go on where the memory on disk stood. Raises StoreError where it has to be there and is not,
        or another process writes it."""
        get, log = self._settings, self.get_logger()
        identity = identity_of(backbone, streams, f'{get["min_frame_pixels"]} to {get["max_frame_pixels"]}',
                               get['system_prompt'], get['rope_length'])
        self._disk, self._disk_problem = open_memory(
            Path(get['memory_dir']).expanduser(), identity, streams, tiers, int(get['disk_cache_gb'] * 1e9), get['sync_period_s'],
            get['restore'], self.get_fully_qualified_name(), log.info, log.warning)

    def _release(self) -> None:
        with self._life:
            engine, sources, disk = self._engine, self._sources, self._disk
            self._engine = self._backbone = self._diagnosis = self._disk = self._poses = self._accelerator = None
            self._disk_problem = ''
            self._inputs = []
            if engine is not None and not engine.stop():
                self.get_logger().warning('the engine is still in a library call; leaving without it')
            if engine is not None:
                engine.checks.save_changes(at_once=True)
                self._watches.kept = None
            if disk is not None and not disk.close():
                self.get_logger().warning('the disk is still being written to; leaving without it')
            for source in sources:
                source.close()
        del engine, sources, disk
        gc.collect()
        free_device_memory(self.get_logger().warning)
        give_back_free_memory()

    def _autostart(self) -> None:
        self._start.cancel()
        if self._stopped:   # a signal came first
            return
        self._transitions.submit(self._start_up)

    def _start_up(self) -> None:
        if (self.trigger_configure() != SUCCESS or self.trigger_activate() != SUCCESS) and not self._stopped:
            self.get_logger().error(f'autostart ended: the node is {self._state} (lifecycle service change_state tries again)')

    @property
    def _state(self) -> str:
        """The lifecycle state's name."""
        return self._state_machine.current_state[1]

    def _publish_step(self, camera: Camera, report: StepReport, wait_ms: float) -> None:
        diagnosis = self._diagnosis
        source = next((source for source in self._inputs if source.camera is camera), None)
        if diagnosis is None or source is None:     # freed meanwhile
            return
        diagnosis.note_step(report.total_ms)
        self._timing.publish(messages.frame_timing(camera.name, camera.frame_id, report, wait_ms, source.counts()))

    def _require_engine(self) -> Engine:
        engine, since = self._engine, self._loading_since
        if engine is not None:
            return engine
        if since is not None:
            raise QuestionError(f'the node is loading model {self._settings["model"]!r}, for {time.monotonic() - since:.0f} s '
                                'so far: ask again when /diagnostics says that it is active', Code.NOT_CONFIGURED)
        raise QuestionError(f'the node is not configured: {self._reason or "wait until it is, or call its lifecycle "}'
                            + ('' if self._reason else 'service change_state'),
                            Code.SHUTTING_DOWN if self._stopped else Code.NOT_CONFIGURED)

    def destroy_node(self) -> None:
        """Take the node off the graph. rclpy's lifecycle state machine holds on to the DDS participant, whose 70 MB of shared memory
        would then outlive the process; there is no public way to let go of it."""
        self._goals.destroy()
        super().destroy_node()
        self._state_machine.destroy_when_not_in_use()

    def _diagnose(self) -> None:
        now, state, since = self.get_clock().now(), self._state, self._loading_since
        diagnosis, inputs, poses = self._diagnosis, self._inputs, self._poses
        array = DiagnosticArray()
        array.header.stamp = now.to_msg()
        array.status = [diagnostics.transport(self._profile)]
        if diagnosis is not None:
            array.status.append(diagnosis.engine(state, self._reason))
            array.status += [diagnosis.camera(source, now.nanoseconds, self._settings['stale_after_s'], state == 'active')
                             for source in inputs]
            if poses is not None:
                array.status.append(diagnosis.poses(poses, state == 'active'))
        elif since is not None:
            array.status.append(diagnostics.loading(state, self._settings['model'], time.monotonic() - since))
        else:
            array.status.append(diagnostics.not_configured(state, self._reason))
        self._watches.publish()
        engine, kept = self._engine, self._watches.kept
        if diagnosis is not None and engine is not None and len(engine.checks.table):
            array.status.append(diagnosis.watches(engine.checks, self._settings['watch_share'], state == 'active',
                                                  kept.problem if kept is not None else ''))
        parts = self._disk, self._accelerator, self._recovery
        problems = [self._disk_problem, *(part.problem for part in parts if part is not None)]
        diagnostics.note_problem(array.status[1], '; '.join(filter(None, problems)))
        diagnostics.note_problem(array.status[1], self._twins.look())
        for status in array.status:         # several nodes of one machine tell of themselves on this topic
            status.name = f'{self.get_fully_qualified_name()[1:]}: {status.name}'
        self._diagnostics.publish(array)

    def _apply_rates(self, parameters: list[rclpy.Parameter]) -> None:
        for parameter in parameters:
            for source in self._inputs:
                if parameter.name == f'{source.camera.name}.rate_hz':
                    source.sampler.set_rate(float(parameter.value))
