"""The node's parameters: one table that declares them, that config/statekv.yaml is checked against and docs/reference is made from."""
import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.exceptions import InvalidTopicNameException
from rclpy.expand_topic_name import expand_topic_name
from rclpy.parameter import Parameter
from rclpy.validate_full_topic_name import validate_full_topic_name

from statekv_ros.backbones.weights import WEIGHTS
from statekv_ros.conditions import parse_condition
from statekv_ros.errors import ParameterError, StateKVError, quoted
from statekv_ros.images import LARGEST_MAX_PIXELS, MAX_PIXELS
from statekv_ros.memory import parse_answer_policy, parse_prefill_policy
from statekv_ros.memory.carried.positions import POSITIONS
from statekv_ros.memory.detailed.formats import FORMATS, RAW
from statekv_ros.memory.graphs import CUDA_GRAPH
from statekv_ros.node.memory_folder import RESTORE
from statekv_ros.node.names import allowed, check_names
from statekv_ros.node.poses.topic import KINDS
from statekv_ros.node.watches.configured import PREFIX, configured
from statekv_ros.node.watches.watch import MOST_DEBOUNCE, MOST_SECONDS, MOST_STEPS, MOST_TOKENS

LARGE = 2**31 - 1
_TAKEN = 'all', 'pose', 'thumbnail', PREFIX     # by requests, and by parameters
_TAKEN_OF_WATCHES = 'all',
MAX_TOKENS = 65536      # of an answer, also where the question says how many
_ANSWER_POLICIES = 'all, sparse(n), retrieve(k), rekv(k), state or last(n), with n and k of at least 1'


@dataclass(frozen=True)
class Spec:
    """One parameter.

    Attributes:
        default: its value when nobody sets it; the type follows from it.
        low, high: range of a number, both ends included.
        fixed: read-only, as the process was started with it.
        runtime: may change at any time. What is neither may change while the node is unconfigured.
        check: raises StateKVError for a value that cannot work.
        constraints: what `check` allows, in words.
    """
    name: str
    default: Any
    description: str
    low: float | None = None
    high: float | None = None
    fixed: bool = False
    runtime: bool = False
    choices: tuple[str, ...] = ()
    check: Callable[[Any], Any] | None = None
    constraints: str = ''

    def descriptor(self) -> ParameterDescriptor:
        """As ROS shows it (`ros2 param describe`)."""
        descriptor = ParameterDescriptor(name=self.name, description=self.description, read_only=self.fixed,
                                         additional_constraints=f'one of {self._listed()}' if self.choices else self.constraints)
        if self.low is not None and isinstance(self.default, int):
            descriptor.integer_range = [IntegerRange(from_value=int(self.low), to_value=int(self.high), step=0)]
        elif self.low is not None:
            descriptor.floating_point_range = [FloatingPointRange(from_value=float(self.low), to_value=float(self.high))]
        return descriptor

    def verified(self, value: Any) -> Any:
        """The value, a whole number turned into a float where one is wanted.

        Raises:
            ParameterError: it cannot work; names the value, what was expected and the parameter to change.
        """
        where = f'(parameter "{self.name}"; its default is {self.default!r})'
        wanted = type(self.default)
        if wanted is float and type(value) is int:
            value = float(value)
        if wanted is list and value is None:
            value = []  # rcl hands over an empty list as a parameter without a value
        if wanted is list and not (isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)):
            raise ParameterError(f'{self.name} must be a list of strings, got {quoted(value)} {where}')
        if wanted is not list and type(value) is not wanted:
            raise ParameterError(f'{self.name} must be of type {wanted.__name__}, got {quoted(value)} {where}')
        if wanted is float and not math.isfinite(value):
            raise ParameterError(f'{self.name} must be a finite number, got {value} {where}')
        if self.low is not None and not (self.low <= value <= self.high):
            bounds = f'at least {self.low:g}'
            if self.high < LARGE:
                bounds += f' and at most {self.high:.10g}'
            raise ParameterError(f'{self.name} must be {bounds}, got {value} {where}')
        if self.choices and value not in self.choices:
            raise ParameterError(f'{self.name} must be one of {self._listed()}, got {quoted(value)} {where}')
        if self.check is not None:
            try:
                self.check(value)
            except StateKVError as error:
                raise ParameterError(f'{error} {where}') from error
        return value

    def _listed(self) -> str:
        return ', '.join(choice or '""' for choice in self.choices)


def _check_cameras(names: list[str]) -> None:
    if not names:
        raise ParameterError('cameras must name at least one camera, got an empty list')
    check_names('camera', names, _TAKEN)


def _check_watches(names: list[str]) -> None:
    check_names('watch', names, _TAKEN_OF_WATCHES)


def _check_topic(name: str) -> None:
    try:
        validate_full_topic_name(expand_topic_name(name, 'statekv', '/'))
    except (ValueError, InvalidTopicNameException) as error:
        why = str(error).splitlines()[0].split('invalid: ')[-1].removeprefix('Invalid topic name: ').split(', at /')[0]
        raise ParameterError(f'{quoted(name)} is not a topic name: {why.rstrip(":")}') from error


NODE = (
    Spec('autostart', True, 'configure and activate without a lifecycle manager', fixed=True),
    Spec('bond_heartbeat_period', 0.1, 'seconds between two heartbeats for Nav2\'s lifecycle manager, where the package bondpy is and '
         'autostart is off; 0: no bond', low=0.0, high=3.0, fixed=True),
    Spec('model', 'patrol', 'checkpoint directory in Transformers\' format, hub id, or patrol: the small one that comes along'),
    Spec('device', 'auto', 'auto, cpu, cuda or cuda:<n>'),
    Spec('dtype', 'auto', 'auto: bfloat16 on a GPU, float32 on a CPU', choices=('auto', 'float32', 'bfloat16', 'float16')),
    Spec('weights', 'auto', 'the language model\'s weights: as the checkpoint has them (as_stored, and auto), or quantised at '
         'load, in 8 or 4 bits', choices=WEIGHTS),
    Spec('cpu_threads', 0, 'threads of PyTorch on the CPU; 0: half the cores, at most OMP_NUM_THREADS', low=0, high=1024,
         fixed=True),
    Spec('system_prompt', '', 'text before the video; none when empty'),
    Spec('rope_length', 0, 'positions to scale a checkpoint with dynamic-NTK RoPE (InternVL3) for, once; 0: as trained', low=0,
         high=LARGE),
    Spec('max_frame_pixels', 0, 'largest height x width of a frame as the model sees it; sets tokens per step; 0: as the '
         'model advises, or 200704', low=0, high=LARGE),
    Spec('min_frame_pixels', 0, 'smallest height x width of a frame as the model sees it; 0: as the model advises, or 4096',
         low=0, high=LARGE),
    Spec('max_image_pixels', MAX_PIXELS, 'camera images of a larger height x width are refused before they are decoded', low=1,
         high=LARGEST_MAX_PIXELS),
    Spec('prefill_policy', 'statekv', 'what the past looks like to a new frame',
         choices=('statekv', 'window', 'full', 'none')),
    Spec('budget', 4096, 'B of statekv: tokens carried per layer and KV head', low=1, high=LARGE),
    Spec('window_frames', 16, 'frames that the policy window carries', low=1, high=LARGE),
    Spec('positions', '', 'positions for the model once the stream outgrows its trained context; empty: lazy_shift, native for '
         'full', choices=('', *POSITIONS)),
    Spec('cuda_graph', 'auto', 'auto: on a GPU, frame steps are replayed as CUDA graphs once the state is full, and so are '
         'tokens of longer answers',
         choices=CUDA_GRAPH),
    Spec('device_cache_mb', 0, 'bound on each camera\'s keys and values on the device in MB (10^6 bytes); past it the oldest steps '
         'move down; 0: each camera\'s share of half of what is free at start', low=0, high=LARGE),
    Spec('host_cache_mb', -1, 'the same in main memory, for what leaves the device; 0: none; -1: each camera\'s share of a quarter '
         'of what is free at start, none where device and main memory are one', low=-1, high=LARGE),
    Spec('detailed_format', RAW.name, 'how the detailed cache is stored, but for its newest 4 steps: in the model\'s own dtype '
         '(bf16), or in 8 or 4 bits a number', choices=tuple(form.name for form in FORMATS)),
    Spec('memory_dir', '', 'folder on a local disk that keeps what was seen, for answers and for the next start to go on; empty: '
         'nothing is written'),
    Spec('disk_cache_gb', 20.0, 'bound on what lies there in GB (10^9 bytes); past it the oldest steps are forgotten; 0: nothing '
         'is written', low=0.0, high=10**6),
    Spec('sync_period_s', 2.0, 'what a power cut may cost, in seconds; a killed process costs the step in progress; 0: each '
         'step is flushed before the next', low=0.0, high=3600.0),
    Spec('restore', 'auto', 'auto: go on where the memory stood, begin a new one beside it where that cannot be; require: do '
         'not start then; never: begin a new one', choices=RESTORE),
    Spec('answer_policy', 'sparse(8192)', 'what a question may read unless it says so itself: all, sparse(n), retrieve(k), '
         'rekv(k), state or last(n)', runtime=True, check=parse_answer_policy, constraints=_ANSWER_POLICIES),
    Spec('max_tokens', 64, 'tokens of an answer unless the question says so itself', low=1, high=MAX_TOKENS, runtime=True),
    Spec('answer_timeout_s', 30.0, 'time limit of a question that gives none, in seconds', low=0.001, high=86400.0,
         runtime=True),
    Spec('evidence_frames', 8, 'how many of the most attended frame steps an answer names', low=0, high=1000, runtime=True),
    Spec('slice_tokens', 4, 'tokens of answers, counted over all that are decoded together, or four times as many of a question, '
         'between two looks for new images', low=1,
         high=4096, runtime=True),
    Spec('max_question_chars', 8192, 'longer questions are refused', low=1, high=10**6, runtime=True),
    Spec('max_queued_questions', 16, 'questions that may wait or be answered at once', low=1, high=10000),
    Spec('stale_after_s', 2.0, 'a camera without a new image for this long (node time) is stale', low=0.01,
         high=86400.0, runtime=True),
    Spec('diagnostics_period_s', 1.0, 'seconds between two messages on /diagnostics', low=0.01, high=3600.0, fixed=True),
    Spec('hang_limit_s', 120.0, 'the process is ended, for respawn to start it again, when executor or engine make no progress '
         'for this long; 0: never', low=0.0, high=86400.0, fixed=True),
    Spec('rate_hz', 2.0, 'images to watch per second of header time, for cameras without a rate of their own', low=0.001,
         high=1000.0),
    Spec('reliability', 'best_effort', 'QoS of image subscriptions, for cameras without one of their own',
         choices=('best_effort', 'reliable')),
    Spec('pose.topic', '', 'topic that tells where the robot is, for the poses of what was seen; empty: none, or tf2 where '
         'pose.target_frame is given', check=lambda name: name and _check_topic(name)),
    Spec('pose.type', 'auto', 'its message: nav_msgs/Odometry, geometry_msgs/PoseStamped or PoseWithCovarianceStamped; auto: as '
         'its publisher has it', choices=('auto', *KINDS)),
    Spec('pose.target_frame', '', 'frame that poses are told in, map say; those of the topic in another one are refused; without '
         'a topic tf2 is asked'),
    Spec('pose.source_frame', '', 'what tf2 is asked for, base_link say, for poses that a planner can drive to; empty: the '
         'image\'s own frame'),
    Spec('pose.tolerance_s', 0.5, 'how far from an image\'s stamp the nearest pose may be, in seconds; no image waits for one',
         low=0.0, high=3600.0),
    Spec('thumbnail.width', 240, 'largest width in pixels of the picture that is kept of each frame step, at most twice as tall; '
         '0: none', low=0, high=1920),
    Spec('thumbnail.quality', 75, 'quality of its JPEG', low=1, high=100),
    Spec('watches', [], 'names of standing questions that are there from the start, each with a block of its own, watch.<name>',
         check=_check_watches, constraints=allowed('watch', _TAKEN_OF_WATCHES)),
    Spec('max_watches', 32, 'standing questions that there may be at once', low=1, high=1000),
    Spec('watch_share', 0.25, 'of the engine\'s time, what standing questions may take at most', low=0.01, high=1.0,
         runtime=True),
    Spec('watch_answer_policy', 'last(4)', 'what a standing question may read unless it says so itself; as answer_policy',
         runtime=True, check=parse_answer_policy, constraints=_ANSWER_POLICIES),
    Spec('cameras', ['camera'], 'names of the cameras; each has a memory of its own', check=_check_cameras,
         constraints=f'at least one; {allowed("camera", _TAKEN)}'),
)


def camera_specs(name: str, rate_hz: float, reliability: str) -> tuple[Spec, ...]:
    """The parameters of one camera, `<name>.topic` and so on; rate and reliability default to the node's."""
    return (
        Spec(f'{name}.topic', f'{name}/image_raw', f'image topic of camera {name}', check=_check_topic,
             constraints='a topic name'),
        Spec(f'{name}.transport', 'auto', 'message type; auto: compressed when the topic ends in /compressed',
             choices=('auto', 'raw', 'compressed')),
        Spec(f'{name}.rate_hz', rate_hz, f'images of camera {name} to watch per second of header time', low=0.001, high=1000.0,
             runtime=True),
        Spec(f'{name}.reliability', reliability, f'QoS of the subscription of camera {name}',
             choices=('best_effort', 'reliable')),
    )


def watch_specs(name: str) -> tuple[Spec, ...]:
    """The parameters of one standing question, `watch.<name>.question` and so on."""
    block = f'{PREFIX}.{name}'
    return (
        Spec(f'{block}.question', '', 'what is asked again and again'),
        Spec(f'{block}.camera', '', 'of which camera; empty where there is only one'),
        Spec(f'{block}.condition', 'changes', 'what its answers are held to: changes, equals TEXT, matches REGEX, rises above NUMBER '
             'or falls below NUMBER', check=parse_condition),
        Spec(f'{block}.every_steps', 0, 'frame steps of the camera between two checks; 0 with every_s 0: each step', low=0,
             high=MOST_STEPS),
        Spec(f'{block}.every_s', 0.0, 'or seconds of header time between two checks', low=0.0, high=MOST_SECONDS),
        Spec(f'{block}.debounce', 1, 'checks in a row in which the condition must hold', low=1, high=MOST_DEBOUNCE),
        Spec(f'{block}.max_tokens', 0, 'tokens of an answer; 0: max_tokens', low=0, high=MOST_TOKENS),
        Spec(f'{block}.answer_policy', '', 'what an answer may read; empty: watch_answer_policy',
             check=lambda policy: policy and parse_answer_policy(policy)),
    )


_OF_A_CAMERA = {spec.name.removeprefix('x.') for spec in camera_specs('x', 1.0, 'reliable')}
_OF_A_WATCH = {spec.name.removeprefix(f'{PREFIX}.x.') for spec in watch_specs('x')}
_DEFAULT_CAMERAS = next(spec.default for spec in NODE if spec.name == 'cameras')


class Parameters:
    """Declares the table on a node and keeps what is wrong with the values that the node was started with.

    A bad value must not end the process: the parameter then has its default, and `problems` says why the node cannot be
    configured, until a value that can work is set.

    Attributes:
        unknown: one sentence per given parameter that this node does not have. No reason to stop: a parameter file for every
            node (`/**`) names those of others too.
    """

    def __init__(self, node, state: Callable[[], str]):
        """state: the name of the node's lifecycle state at the moment."""
        self._node, self._state = node, state
        self._specs: dict[str, Spec] = {}
        self._problems: dict[str, str] = {}
        for spec in NODE:
            self._declare(spec)
        self._declare_blocks()
        self.unknown = [self._about_unknown(name) for name in _given_names(node)
                        if not (node.has_parameter(name) or self._is_of_block_not_in_use(name))]
        node.add_on_set_parameters_callback(self._verify)
        node.add_post_set_parameters_callback(self._note)

    @property
    def problems(self) -> list[str]:
        """One sentence per value that cannot work."""
        low, high = self['min_frame_pixels'], self['max_frame_pixels']
        return [*self._problems.values(), *configured(self.__getitem__)[1], *(
            [f'min_frame_pixels must be at most max_frame_pixels, got {low} and {high}'] if 0 < high < low else [])]

    def __getitem__(self, name: str) -> Any:
        return self._node.get_parameter(name).value

    def prefill_policy(self):
        """The parsed prefill policy with its argument."""
        kind = self['prefill_policy']
        argument = {'statekv': f'({self["budget"]})', 'window': f'({self["window_frames"]})'}.get(kind, '')
        return parse_prefill_policy(f'{kind}{argument}')

    def _declare(self, spec: Spec) -> None:
        self._specs[spec.name] = spec
        # Declared once without type and range, just to see what was given: a bad value must not raise here.
        given = self._node.declare_parameter(spec.name, spec.default, ParameterDescriptor(dynamic_typing=True)).value
        self._node.undeclare_parameter(spec.name)
        value = spec.default
        try:
            value = spec.verified(given)
        except ParameterError as error:
            self._problems[spec.name] = str(error)
        self._node.declare_parameter(spec.name, value, spec.descriptor(), ignore_override=True)

    def _declare_blocks(self) -> None:
        """Of each camera and each watch that has a name now."""
        cameras = [spec for name in self['cameras'] for spec in camera_specs(name, self['rate_hz'], self['reliability'])]
        for spec in [*cameras, *(spec for name in self['watches'] or () for spec in watch_specs(name))]:
            if spec.name not in self._specs:
                self._declare(spec)

    def _is_of_block_not_in_use(self, name: str) -> bool:
        """Whether it belongs to a camera's block or a watch's, as in a parameter file that `cameras` names only some blocks of.

        The block of the default camera stands in the shipped file whatever the cameras are. A name close to one in use is a
        typo.
        """
        camera, _, rest = name.rpartition('.')
        if camera.startswith(f'{PREFIX}.') and rest in _OF_A_WATCH:
            return True
        return rest in _OF_A_CAMERA and (
            camera in _DEFAULT_CAMERAS or not get_close_matches(camera, self['cameras'], cutoff=0.75))

    def _about_unknown(self, name: str) -> str:
        close = get_close_matches(name, self._specs, n=1)
        return f'parameter "{name}" is not one of this node and has no effect' + (f': is "{close[0]}" meant?' if close else '')

    def _verify(self, parameters: list[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            spec = self._specs.get(parameter.name)
            try:
                if spec is not None:
                    spec.verified(parameter.value)
                    self._require_time(spec)
            except ParameterError as error:
                return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _require_time(self, spec: Spec) -> None:
        if not (spec.runtime or spec.fixed or self._state() == 'unconfigured'):
            raise ParameterError(f'{spec.name} is used when the node is configured, and may change while it is unconfigured; it '
                                 f'is {self._state()} now: do the lifecycle transition "cleanup" first')

    def _note(self, parameters: list[Parameter]) -> None:
        for parameter in parameters:
            self._problems.pop(parameter.name, None)
        self._declare_blocks()


def _given_names(node) -> list[str]:
    """Names given on the command line or in a parameter file; rclpy shows those that nobody declares only in private."""
    return [name for name in getattr(node, '_parameter_overrides', {}) if not name.startswith('qos_overrides.')]
