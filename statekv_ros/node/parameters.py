"""The node's parameters: one table that declares them, and that README.md and config/statekv.yaml are checked against."""
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

from statekv_ros.errors import ParameterError, StateKVError
from statekv_ros.images import LARGEST_MAX_PIXELS, MAX_PIXELS
from statekv_ros.memory import parse_answer_policy, parse_prefill_policy
from statekv_ros.memory.carried.positions import POSITIONS
from statekv_ros.memory.detailed.formats import FORMATS, RAW
from statekv_ros.memory.graphs import CUDA_GRAPH
from statekv_ros.node.memory_folder import RESTORE
from statekv_ros.node.poses.topic import KINDS

LARGE = 2**31 - 1
_TAKEN = 'all', 'pose'          # by requests, and by parameters
_TAKEN_NAMES = ' or '.join(f'"{name}"' for name in _TAKEN)
MAX_TOKENS = 65536      # of an answer, also where the question says how many
_NAME_REMEDY = 'camera names are letters, digits and "_", beginning with a letter'


@dataclass(frozen=True)
class Spec:
    """One parameter.

    Attributes:
        default: its value when nobody sets it; the type follows from it.
        low, high: range of a number, both ends included.
        runtime: may change while the node runs; else it is read-only.
        check: raises StateKVError for a value that cannot work.
    """
    name: str
    default: Any
    description: str
    low: float | None = None
    high: float | None = None
    runtime: bool = False
    choices: tuple[str, ...] = ()
    check: Callable[[Any], Any] | None = None

    def descriptor(self) -> ParameterDescriptor:
        """As ROS shows it (`ros2 param describe`)."""
        descriptor = ParameterDescriptor(name=self.name, description=self.description, read_only=not self.runtime,
                                         additional_constraints=f'one of {self._listed()}' if self.choices else '')
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
            raise ParameterError(f'{self.name} must be a list of strings, got {value!r} {where}')
        if wanted is not list and type(value) is not wanted:
            raise ParameterError(f'{self.name} must be of type {wanted.__name__}, got {value!r} {where}')
        if wanted is float and not math.isfinite(value):
            raise ParameterError(f'{self.name} must be a finite number, got {value} {where}')
        if self.low is not None and not (self.low <= value <= self.high):
            bounds = f'at least {self.low:g}'
            if self.high < LARGE:
                bounds += f' and at most {self.high:.10g}'
            raise ParameterError(f'{self.name} must be {bounds}, got {value} {where}')
        if self.choices and value not in self.choices:
            raise ParameterError(f'{self.name} must be one of {self._listed()}, got {value!r} {where}')
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
    for name in names:
        if not (name.isascii() and name.replace('_', 'a').isalnum() and name[0].isalpha()) or name in _TAKEN:
            raise ParameterError(f'camera name {name!r} cannot be used: {_NAME_REMEDY}, and not {_TAKEN_NAMES}')
    if len(set(names)) < len(names):
        raise ParameterError(f'camera names must differ, got {list(names)}')


def _check_topic(name: str) -> None:
    try:
        validate_full_topic_name(expand_topic_name(name, 'statekv', '/'))
    except (ValueError, InvalidTopicNameException) as error:
        why = str(error).splitlines()[0].split('invalid: ')[-1].removeprefix('Invalid topic name: ').split(', at /')[0]
        raise ParameterError(f'{name!r} is not a topic name: {why.rstrip(":")}') from error


NODE = (
    Spec('autostart', True, 'configure and activate without a lifecycle manager'),
    Spec('model', 'patrol', 'checkpoint directory in Transformers\' format, hub id, or patrol: the small one that comes along'),
    Spec('device', 'auto', 'auto, cpu, cuda or cuda:<n>'),
    Spec('dtype', 'auto', 'auto: bfloat16 on a GPU, float32 on a CPU', choices=('auto', 'float32', 'bfloat16', 'float16')),
    Spec('cpu_threads', 0, 'threads of PyTorch on the CPU; 0: half the cores, at most OMP_NUM_THREADS', low=0, high=1024),
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
    Spec('cuda_graph', 'auto', 'auto: on a GPU, frame steps are replayed as CUDA graphs once the state is full',
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
    Spec('answer_policy', 'sparse(8192)', 'what a question may read unless it says so itself: all, sparse(n), retrieve(k), state '
         'or last(n)', runtime=True, check=parse_answer_policy),
    Spec('max_tokens', 64, 'tokens of an answer unless the question says so itself', low=1, high=MAX_TOKENS, runtime=True),
    Spec('answer_timeout_s', 30.0, 'time limit of a question that gives none, in seconds', low=0.001, high=86400.0,
         runtime=True),
    Spec('evidence_frames', 8, 'how many of the most attended frame steps an answer names', low=0, high=1000, runtime=True),
    Spec('slice_tokens', 4, 'tokens of an answer, or four times as many of a question, between two looks for new images', low=1,
         high=4096, runtime=True),
    Spec('max_question_chars', 8192, 'longer questions are refused', low=1, high=10**6, runtime=True),
    Spec('max_queued_questions', 16, 'questions that may wait or be answered at once', low=1, high=10000),
    Spec('stale_after_s', 2.0, 'a camera without a new image for this long (node time) is stale', low=0.01,
         high=86400.0, runtime=True),
    Spec('diagnostics_period_s', 1.0, 'seconds between two messages on /diagnostics', low=0.01, high=3600.0),
    Spec('hang_limit_s', 120.0, 'the process is ended, for respawn to start it again, when executor or engine make no progress '
         'for this long; 0: never', low=0.0, high=86400.0),
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
    Spec('cameras', ['camera'], 'names of the cameras; each has a memory of its own', check=_check_cameras),
)


def camera_specs(name: str, rate_hz: float, reliability: str) -> tuple[Spec, ...]:
    """The parameters of one camera, `<name>.topic` and so on; rate and reliability default to the node's."""
    return (
        Spec(f'{name}.topic', f'{name}/image_raw', f'image topic of camera {name}', check=_check_topic),
        Spec(f'{name}.transport', 'auto', 'message type; auto: compressed when the topic ends in /compressed',
             choices=('auto', 'raw', 'compressed')),
        Spec(f'{name}.rate_hz', rate_hz, f'images of camera {name} to watch per second of header time', low=0.001, high=1000.0,
             runtime=True),
        Spec(f'{name}.reliability', reliability, f'QoS of the subscription of camera {name}',
             choices=('best_effort', 'reliable')),
    )


_OF_A_CAMERA = {spec.name.removeprefix('x.') for spec in camera_specs('x', 1.0, 'reliable')}
_DEFAULT_CAMERAS = next(spec.default for spec in NODE if spec.name == 'cameras')


class Parameters:
    """Declares the table on a node and keeps what is wrong with the values that the node was started with.

    A bad value must not end the process: the parameter then has its default, and `problems` says why the node cannot be
    configured.

    Attributes:
        problems: one sentence per value that cannot work.
        unknown: one sentence per given parameter that this node does not have. No reason to stop: a parameter file for every
            node (`/**`) names those of others too.
    """

    def __init__(self, node):
        self._node = node
        self._specs: dict[str, Spec] = {}
        self.problems: list[str] = []
        for spec in NODE:
            self._declare(spec)
        for name in self['cameras']:
            for spec in camera_specs(name, self['rate_hz'], self['reliability']):
                self._declare(spec)
        if 0 < self['max_frame_pixels'] < self['min_frame_pixels']:
            self.problems.append(f'min_frame_pixels must be at most max_frame_pixels, got {self["min_frame_pixels"]} and '
                                 f'{self["max_frame_pixels"]}')
        self.unknown = [self._about_unknown(name) for name in _given_names(node)
                        if not (node.has_parameter(name) or self._is_of_camera_not_in_use(name))]
        node.add_on_set_parameters_callback(self._verify)

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
            self.problems.append(str(error))
        self._node.declare_parameter(spec.name, value, spec.descriptor(), ignore_override=True)

    def _is_of_camera_not_in_use(self, name: str) -> bool:
        """Whether it belongs to a camera's block, as in a parameter file that `cameras` names only some blocks of.

        The block of the default camera stands in the shipped file whatever the cameras are. A name close to one in use is a
        typo.
        """
        camera, _, rest = name.rpartition('.')
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
            except ParameterError as error:
                return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)


def _given_names(node) -> list[str]:
    """Names given on the command line or in a parameter file; rclpy shows those that nobody declares only in private."""
    return [name for name in getattr(node, '_parameter_overrides', {}) if not name.startswith('qos_overrides.')]
