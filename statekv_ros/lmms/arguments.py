"""`--model_args`: which model watches, how, and how much of a video."""
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from statekv_ros.backbones.family import Family
from statekv_ros.errors import ParameterError
from statekv_ros.evaluation.offline import Offline
from statekv_ros.evaluation.plan import RLIVS, Policy, parse_policies
from statekv_ros.evaluation.run import make_memory
from statekv_ros.lmms.video import DECODERS
from statekv_ros.memory.detailed.formats import RAW
from statekv_ros.memory.trial import try_out


@dataclass(frozen=True)
class Arguments:
    """What may stand in `--model_args`; `--device` and `--batch_size` of the harness come here too.

    Attributes:
        pretrained: checkpoint directory, hub id or 'patrol'; device to system_prompt: as for `load_backbone`.
        layout, rope_length, positions, max_frame_pixels: as of `Offline`.
        prefill: prefill policy, with options behind slashes as in `statekv-eval`, or rlivs.
        answer: answer policy; '' is `all`, and with rlivs the only choice.
        fps, max_frames: frames to watch, per second of a video and in all.
        reuse_video: watch a video once for all of its questions that follow each other.
        batch_size: questions of one video that share passes.
        retrieve_by: field of a task's documents that holds the bare question, by which the answer policy `rekv` retrieves; '':
            the whole prompt.
        detailed_format: as for `VideoStream`, where `prefill` does not say.
        decoder: what reads the videos, 'av' or 'decord'.
        resume: folder that keeps answers as they come, for a run that is started again; '': none.
        seed: of tasks that sample.

    Raises:
        ParameterError, PolicyError: a value that cannot work.
    """
    pretrained: str
    prefill: str = 'statekv(4096)'
    answer: str = ''
    retrieve_by: str = ''
    fps: float = 1.0
    max_frames: int = 512
    reuse_video: bool = True
    batch_size: int = 1
    detailed_format: str = RAW.name
    decoder: str = 'av'
    resume: str = ''
    seed: int = 0
    device: str = 'auto'
    dtype: str = 'auto'
    weights: str = 'auto'
    layout: str = 'model'
    rope_length: str = ''
    positions: str = ''
    max_frame_pixels: int = 0
    min_frame_pixels: int = 0
    system_prompt: str = ''

    def __post_init__(self):
        if not (isinstance(self.fps, int | float) and self.fps > 0):
            raise ParameterError(f'fps must be a positive number of frames per second, got {self.fps}')
        for name in ('max_frames', 'batch_size'):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ParameterError(f'{name} must be a whole number from 1 on, got {value}')
        if not isinstance(self.reuse_video, bool):
            raise ParameterError(f'reuse_video must be true or false, got {self.reuse_video}')
        if self.decoder not in DECODERS:
            raise ParameterError(f'decoder must be one of {", ".join(DECODERS)}, got {self.decoder!r}')
        self.watching   # which must be possible, as the policy
        if not self.policy.answers[0].startswith('rekv(') and self.retrieve_by:
            raise ParameterError(f'retrieve_by is for the answer policy rekv(k), as in answer=rekv(64), got {self.retrieve_by!r} '
                                 f'with answer={self.answer or "all"}')

    @property
    def policy(self) -> Policy:
        """How to watch and answer."""
        if self.prefill.startswith(RLIVS) and not self.answer:
            return parse_policies([self.prefill])[0]
        return parse_policies([f'{self.prefill} x {self.answer or "all"}'])[0]

    @property
    def watching(self) -> Offline:
        """How frames and questions are laid out, and at which positions."""
        return Offline(self.layout, self.rope_length, self.positions, self.max_frame_pixels)

    @property
    def named_positions(self) -> str:
        """The position policy that a memory has whatever `watching` says; '': none."""
        # Captions are read at positions of their own, which have a bound.
        return 'contiguous' if self.policy.is_rlivs else self.policy.options.get('positions', '')

    def load(self) -> Family:
        """The model, tried out, and its policy with it.

        Raises:
            StateKVError: it cannot be loaded, or cannot run the policy.
        """
        backbone = self.watching.load(self.pretrained, self.device, self.dtype, self.weights, self.min_frame_pixels,
                                      self.system_prompt)
        try_out(backbone)
        self.make_memory(backbone)
        return backbone

    def make_memory(self, backbone: Family):
        """A memory that has seen nothing: a `VideoStream`, or for rlivs a `CaptionMemory`.

        Raises:
            PolicyError, ParameterError: the model cannot run the policy.
        """
        policy = self.policy
        options = {} if policy.is_rlivs else {'answer_policy': policy.answers[0]}
        return make_memory(backbone, policy, self.detailed_format, self.watching.position_policy(), **options)


def parse_arguments(given: Mapping) -> Arguments:
    """Arguments as the harness read them from text: numbers and true or false are no longer text, None is not given.

    Raises:
        ParameterError, PolicyError: one that is missing, unknown, or cannot work.
    """
    known = {field.name: field.type for field in fields(Arguments)}
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(given.keys() - known):
        raise ParameterError(f'unknown model_args {", ".join(unknown)}: there are {", ".join(known)}')
    if 'pretrained' not in given:
        raise ParameterError('model_args has no pretrained: name a checkpoint directory, a hub id or patrol, as in '
                             '--model_args pretrained=OpenGVLab/InternVL3-8B-hf')
    return Arguments(**{name: _typed(name, value, known[name]) for name, value in given.items()})


def _typed(name: str, value, kind: type):
    """Text where text is wanted, such as a folder called 7, and a number where the harness left one as text."""
    if kind is str:
        return str(value)
    if kind in (int, float) and isinstance(value, str | float):
        try:
            number = float(value)
        except ValueError as error:
            raise ParameterError(f'{name} must be a number, got {value!r}') from error
        return int(number) if kind is int and math.isfinite(number) and number == int(number) else number
    return value
