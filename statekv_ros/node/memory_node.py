"""The ROS 2 node: parameters, topics and services around the engine. No callback computes or waits."""
import gc
import traceback

import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import QoSProfile
from rclpy.task import Future

from statekv_ros.backbones import Backbone, load_backbone
from statekv_ros.errors import QuestionError, StateKVError
from statekv_ros.memory import PrefillPolicy, StepReport, VideoStream
from statekv_ros.memory.capacity import available_memory, gigabytes, make_plan, require_fit
from statekv_ros.memory.trial import demonstration_warning, try_out
from statekv_ros.msg import Answer, FrameTiming
from statekv_ros.node import diagnostics, messages
from statekv_ros.node.camera_input import CameraInput, decoder, message_type
from statekv_ros.node.engine import STOPPING, Camera, Engine
from statekv_ros.node.parameters import Parameters
from statekv_ros.node.questions import Outcome, Question
from statekv_ros.srv import Query, Reset
from statekv_ros.transport import TransportProfile

# Images come after the memory is planned; this size, height x width, stands for them.
_ASSUMED_FRAME = (480, 640)
SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE
# ROS's default keeps 10 requests and 10 responses: of more questions at once, some would never get a reply.
_SERVICES = QoSProfile(depth=1000)


class MemoryNode(LifecycleNode):
    """A robot's visual memory: watches cameras, publishes ~/timing and ~/answer, serves ~/query and ~/reset.

    The services exist from the start and say why they cannot answer; so does /diagnostics.
    """

    def __init__(self, profile: TransportProfile, **options):
        """profile: what `use_shipped_profile` did before rclpy was initialised."""
        super().__init__('statekv', **options)
        self._profile = profile
        self._settings = Parameters(self)
        for sentence in self._settings.unknown:
            self.get_logger().warning(sentence)
        self._reason = ''
        self._backbone: Backbone | None = None
        self._engine: Engine | None = None
        self._inputs: list[CameraInput] = []
        self._diagnosis: diagnostics.Diagnosis | None = None
        self._active = False
        self._timing = self.create_lifecycle_publisher(FrameTiming, '~/timing', QoSProfile(depth=100))
        self._answers = self.create_lifecycle_publisher(Answer, '~/answer', QoSProfile(depth=10))
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', QoSProfile(depth=10))
        # A group of their own: while one waits for its answer, the others and all subscriptions go on.
        services = ReentrantCallbackGroup()
        self.create_service(Query, '~/query', self._query, qos_profile=_SERVICES, callback_group=services)
        self.create_service(Reset, '~/reset', self._reset, qos_profile=_SERVICES, callback_group=services)
        # Health must be told and the node must start also while a simulated clock stands still.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(self._settings['diagnostics_period_s'], self._diagnose, clock=steady)
        self.add_post_set_parameters_callback(self._apply_rates)
        if self._settings['autostart']:
            self._start = self.create_timer(0.0, self._autostart, clock=steady)

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Model loaded, memories empty, engine waiting; no images yet. On failure the node stays unconfigured."""
        try:
            if self._settings.problems:
                raise StateKVError('; '.join(self._settings.problems))
            self._load()
        except Exception as error:  # whatever it is: the node lives on, unconfigured, and tells
            if not isinstance(error, StateKVError):
                self.get_logger().error(traceback.format_exc())
            self._reason = str(error) or type(error).__name__
            self._release()
            self.get_logger().error(f'cannot be configured: {self._reason}')
            return FAILURE
        self._reason = ''
        return SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Images are watched, timing and answers are published."""
        for source in self._inputs:
            source.open()
        self._active = True
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """No image is taken any more; the memory is kept and questions are still answered, by the service only."""
        for source in self._inputs:
            source.close()
        self._active = False
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Model, memories and GPU memory are gone; parameters are as they were."""
        self._release()
        return SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """As after cleanup, for good."""
        self.stop()
        return SUCCESS

    def stop(self) -> None:
        """End work in progress and free everything; waiting questions get an error. May be called more than once."""
        self.on_deactivate(None)
        self._release()
        self._reason = STOPPING

    def stuck_s(self) -> float:
        """Seconds since the engine, at work, last made progress; 0 while it waits for work or there is none."""
        return self._engine.stuck_s() if self._engine is not None else 0.0

    def _load(self) -> None:
        get = self._settings
        self.get_logger().info(f'loading model {get["model"]!r} ...')
        self._backbone = backbone = load_backbone(
            get['model'], get['device'], get['dtype'], get['max_frame_pixels'], get['min_frame_pixels'], get['system_prompt'],
            get['rope_length'])
        try_out(backbone)
        if backbone.demonstration:
            self.get_logger().warning(demonstration_warning(backbone))
        policy = get.prefill_policy()
        self._require_memory(backbone, policy)
        cameras, kinds = [], {}
        for name in get['cameras']:
            stream = VideoStream(backbone, policy, 'all', get['chunk_tokens'], get['max_detailed_mb'] * 10**6,
                                 positions=get['positions'], cuda_graph=get['cuda_graph'])
            kinds[name] = message_type(get[f'{name}.topic'], get[f'{name}.transport'])
            cameras.append(Camera(name, stream, decoder(kinds[name], get['max_image_pixels'], backbone.frame_size)))
        self._engine = Engine(cameras, self._publish_step, lambda: get['slice_tokens'], get['max_queued_questions'],
                              self.get_logger().error)
        self._inputs = [CameraInput(self, camera, get[f'{camera.name}.topic'], kinds[camera.name],
                                    get[f'{camera.name}.rate_hz'], get[f'{camera.name}.reliability'], self._engine.notify)
                        for camera in cameras]
        self._diagnosis = diagnostics.Diagnosis(self._engine, {
            'model': backbone.name, 'device': backbone.device, 'dtype': backbone.dtype, 'prefill_policy': policy,
            'kv_bytes_per_token': backbone.kv_bytes_per_token, 'demonstration': demonstration_warning(backbone)})
        self._engine.start()
        topics = ', '.join(f'{source.camera.name} on {source.topic}' for source in self._inputs)
        self.get_logger().info(f'{policy} on {backbone.device} ({backbone.dtype}), {backbone.kv_bytes_per_token} bytes per '
                               f'token; cameras: {topics}')

    def _require_memory(self, backbone: Backbone, policy: PrefillPolicy) -> None:
        """Say what watching will need, and raise ParameterError when it cannot fit."""
        get, names = self._settings, self._settings['cameras']
        rate_hz = sum(get[f'{name}.rate_hz'] for name in names) / len(names)
        plan = make_plan(backbone.size(*_ASSUMED_FRAME), policy, rate_hz, len(names),
                         max_detailed_bytes=get['max_detailed_mb'] * 10**6, positions=get['positions'])
        free, where = available_memory(backbone.device)
        free += plan.weights_bytes      # they are loaded already
        self.get_logger().info(
            f'memory, for camera images of {_ASSUMED_FRAME[1]}x{_ASSUMED_FRAME[0]} ({plan.size.step_tokens} tokens per step): '
            f'weights {gigabytes(plan.weights_bytes)}, state {gigabytes(plan.state_bytes)}, workspace about '
            f'{gigabytes(plan.workspace_bytes)}; detailed cache {gigabytes(plan.detailed_bytes_per_hour)} per hour'
            + (f', bounded at {get["max_detailed_mb"]} MB per camera' if get['max_detailed_mb'] else
               f': {where} is full after about {plan.hours_until_full(free):.1f} h (max_detailed_mb bounds it)'))
        require_fit(plan, free, where)

    def _release(self) -> None:
        if self._engine is not None and not self._engine.stop():
            self.get_logger().warning('the engine is still in a library call; leaving without it')
        for source in self._inputs:
            source.close()
        self._engine = self._backbone = self._diagnosis = None
        self._inputs = []
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _autostart(self) -> None:
        self._start.cancel()
        if self.trigger_configure() == SUCCESS:
            self.trigger_activate()

    def _publish_step(self, camera: Camera, report: StepReport, wait_ms: float) -> None:
        source = next(source for source in self._inputs if source.camera is camera)
        self._diagnosis.note_step(report.total_ms)
        self._timing.publish(messages.frame_timing(camera.name, camera.frame_id, report, wait_ms, source.counts()))

    async def _query(self, request: Query.Request, response: Query.Response) -> Query.Response:
        asked = self.get_clock().now().to_msg()
        answered = Future()
        try:
            self._require_engine()
            engine = self._engine
            engine.ask(self._question(request, lambda outcome: self._complete(answered, outcome)))
        except StateKVError as error:
            response.error = str(error)
            return response
        outcome: Outcome = await answered
        response.success, response.error = not outcome.error, outcome.error
        response.answers = [messages.answer(a, asked, engine.cameras[a.camera].frame_id) for a in outcome.answers]
        if response.answers:
            response.answer = messages.joined(response.answers)
        for answer in response.answers:
            self._answers.publish(answer)
        return response

    async def _reset(self, request: Reset.Request, response: Reset.Response) -> Reset.Response:
        forgotten = Future()
        try:
            self._require_engine()
            self._engine.reset(self._named(request.camera), lambda frames: self._complete(forgotten, frames))
        except StateKVError as error:
            response.error = str(error)
            return response
        response.frames_forgotten = await forgotten
        response.success = True
        return response

    def _question(self, request: Query.Request, done) -> Question:
        """The engine's question from a request. Raises StateKVError when it cannot be asked."""
        limit = self._settings['max_question_chars']
        if len(request.question) > limit:
            raise QuestionError(f'question has {len(request.question)} characters, {limit} are allowed: shorten it, or raise '
                                'the parameter "max_question_chars"')
        if not 0 <= request.timeout_s < float('inf'):
            raise QuestionError(f'timeout_s must be 0 (the default) or a positive number of seconds, got {request.timeout_s}')
        span = tuple(messages.to_ns(stamp) or None for stamp in (request.from_stamp, request.to_stamp))
        options = {'answer_policy': request.answer_policy or self._settings['answer_policy'], 'span': span,
                   'max_tokens': request.max_tokens or self._settings['max_tokens'], 'temperature': request.temperature,
                   'seed': request.seed, 'evidence': self._settings['evidence_frames']}
        return Question(request.question, self._named(request.camera), options,
                        request.timeout_s or self._settings['answer_timeout_s'], done)

    def _require_engine(self) -> None:
        if self._engine is None:
            raise QuestionError(f'the node is not configured: {self._reason or "wait until it is, or call its lifecycle "}'
                                + ('' if self._reason else 'service change_state'))

    def _named(self, camera: str) -> list[str]:
        names = list(self._engine.cameras)
        if camera in ('', 'all'):
            return names
        if camera not in names:
            raise QuestionError(f'unknown camera {camera!r}: the cameras are {", ".join(names)}, or "all"')
        return [camera]

    def _complete(self, future: Future, value) -> None:
        future.set_result(value)
        if self.executor is not None:
            self.executor.wake()

    def destroy_node(self) -> None:
        """Take the node off the graph. rclpy's lifecycle state machine holds on to the DDS participant, whose 70 MB of shared memory
        would then outlive the process; there is no public way to let go of it."""
        super().destroy_node()
        self._state_machine.destroy_when_not_in_use()

    def _diagnose(self) -> None:
        now = self.get_clock().now()
        array = DiagnosticArray()
        array.header.stamp = now.to_msg()
        array.status = [diagnostics.transport(self._profile)]
        if self._diagnosis is None:
            array.status.append(diagnostics.not_configured(self._reason))
        else:
            array.status.append(self._diagnosis.engine('active' if self._active else 'inactive'))
            array.status += [self._diagnosis.camera(source, now.nanoseconds, self._settings['stale_after_s'], self._active)
                             for source in self._inputs]
        for status in array.status:         # several nodes of one machine tell of themselves on this topic
            status.name = f'{self.get_fully_qualified_name()[1:]}: {status.name}'
        self._diagnostics.publish(array)

    def _apply_rates(self, parameters: list[rclpy.Parameter]) -> None:
        for parameter in parameters:
            for source in self._inputs:
                if parameter.name == f'{source.camera.name}.rate_hz':
                    source.sampler.set_rate(float(parameter.value))
