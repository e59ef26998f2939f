"""How a video of known length is watched: what `statekv-eval` and other evaluations have in common.

StateKV's released evaluation knows how long a video is before it begins. It lays out frames and question in its own way, and
scales a dynamic-NTK RoPE once, for video + prompt + answer + 128 tokens; positions are native. A live stream has no such length.
"""
from collections.abc import Sequence
from dataclasses import dataclass

from statekv_ros.backbones import LAYOUTS, load_backbone
from statekv_ros.backbones.family import Family
from statekv_ros.errors import ParameterError
from statekv_ros.memory.carried.positions import POSITIONS

AUTO = 'auto'
_MARGIN = 128       # tokens that the released evaluation has room for besides


@dataclass(frozen=True)
class Offline:
    """The options of such a run.

    Attributes:
        layout: as of `load_backbone`.
        rope_length: positions that a dynamic-NTK RoPE is scaled for: a number, '0' for as trained, 'auto' for each video's own
            length, or '' for the layout's, which is 'auto' with 'released' and else '0'.
        positions: as of `VideoStream`; '' is native where the RoPE is scaled, for all policies, and else as there.
        max_frame_pixels: as of `load_backbone`.

    Raises:
        ParameterError: a value that cannot be.
    """
    layout: str = 'model'
    rope_length: str = ''
    positions: str = ''
    max_frame_pixels: int = 0

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ParameterError(f'layout must be one of {", ".join(LAYOUTS)}, got {self.layout!r}')
        if self.rope_length not in ('', AUTO) and not str(self.rope_length).isdecimal():
            raise ParameterError(f'rope_length must be a number of positions, 0 for as trained, or {AUTO} for the length of each '
                                 f'video, got {self.rope_length!r}')
        if self.positions not in ('', *POSITIONS):
            raise ParameterError(f'positions must be one of {", ".join(POSITIONS)}, got {self.positions!r}')
        if self.max_frame_pixels < 0:
            raise ParameterError(f'max_frame_pixels must be a number of pixels, or 0 for as the model advises, got '
                                 f'{self.max_frame_pixels}')

    @property
    def by_video(self) -> bool:
        """Whether the RoPE is scaled for each video's own length."""
        return (self.rope_length or (AUTO if self.layout == 'released' else '')) == AUTO

    @property
    def length(self) -> int:
        """Positions that the RoPE is scaled for whatever the video; 0: as trained, or by the video."""
        return 0 if self.by_video else int(self.rope_length or 0)

    @property
    def scales(self) -> bool:
        """Whether it is not left as trained."""
        return self.by_video or self.length > 0

    def position_policy(self, named: str = '') -> str:
        """Of a stream, from what its own policy names: as `VideoStream` takes it."""
        return named or self.positions or ('native' if self.scales else '')

    def load(self, model: str, device: str = 'auto', dtype: str = 'auto', weights: str = 'auto', min_frame_pixels: int = 0,
             system_prompt: str = '') -> Family:
        """The model. Arguments and errors are those of `load_backbone`."""
        backbone = load_backbone(model, device, dtype, self.max_frame_pixels, min_frame_pixels, system_prompt, self.length,
                                 weights, self.layout)
        return backbone.for_length(0) if self.by_video else backbone      # which says whether it can be

    def fitted(self, backbone: Family, seconds: Sequence[float], height: int, width: int, questions: Sequence[str],
               max_tokens: int, positions: str = '') -> Family:
        """The model as one video is watched with it; weights are shared. By the video, its RoPE is scaled for the longest of the
        questions: asked one question, as the released evaluation does.

        Args:
            backbone: as from `load`.
            seconds, height, width: as of `Family.video_positions`.
            questions: that are asked about it.
            max_tokens: of an answer.
            positions: that the policy names.

        Raises:
            ParameterError: `rope_length` is less than the video needs, where positions are native and so grow as far.
        """
        if not self.scales:
            return backbone
        asked = max((len(backbone.tokenize_question(question)) for question in questions), default=0)
        needed = backbone.video_positions(seconds, height, width) + asked + max_tokens
        if self.by_video:
            return backbone.for_length(needed + _MARGIN)
        if needed > self.length and self.position_policy(positions) == 'native':
            raise ParameterError(f'rope_length must be at least the {needed} positions that the video, its longest question and '
                                 f'an answer take, got {self.length}: raise it, or set it to {AUTO}')
        return backbone
