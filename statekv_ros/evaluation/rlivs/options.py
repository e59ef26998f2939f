"""The sizes of a caption memory, checked once, and the policy's name."""
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from statekv_ros.errors import PolicyError


@dataclass(frozen=True)
class Options:
    """Arguments of `CaptionMemory`, where each is described.

    Raises:
        PolicyError: one of them cannot work; names it, its value and what to give instead.
    """
    clip_frames: int
    keep: float
    fifo_clips: int
    recurrent: bool
    mmr_lambda: float
    context_tokens: int
    caption_prompt: str
    max_caption_tokens: int
    max_captions: int
    positions: str = ''

    def __post_init__(self):
        for name, unit in (('clip_frames', 'frames'), ('fifo_clips', 'clips'), ('context_tokens', 'tokens'),
                           ('max_caption_tokens', 'tokens'), ('max_captions', 'captions')):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                remedy = '; to carry nothing, set recurrent=False' if name == 'fifo_clips' else ''
                raise PolicyError(f'{name} must be a positive number of {unit}, got {value!r}{remedy}')
        if not 0 < self.keep <= 1:
            raise PolicyError('keep must be a share of a clip\'s visual tokens above 0 and up to 1, as 1/16, got '
                              f'{self.keep!r}')
        if not 0 <= self.mmr_lambda <= 1:
            raise PolicyError('mmr_lambda must be between 0 (captions unlike each other) and 1 (captions like the question), '
                              f'got {self.mmr_lambda!r}')
        if not self.caption_prompt.strip():
            raise PolicyError(f'caption_prompt must ask for a caption, as "describe what is happening.", got '
                              f'{self.caption_prompt!r}')
        if self.positions not in ('', 'native', 'contiguous'):
            raise PolicyError(f'positions must be native, contiguous, or empty for the default, got {self.positions!r}')
        if self.context_tokens < self.max_caption_tokens:
            raise PolicyError(f'context_tokens must have room for one caption of max_caption_tokens={self.max_caption_tokens} '
                              f'tokens, got {self.context_tokens}: raise it or lower max_caption_tokens')

    @property
    def policy(self) -> str:
        """What `parse_rlivs` reads."""
        return 'rlivs' if self.recurrent else 'rlivs(norecurrence)'


def parse_rlivs(text: str) -> bool:
    """Whether clips see tokens of past clips: `rlivs` says yes, `rlivs(norecurrence)` no.

    Raises:
        PolicyError: anything else.
    """
    match = re.fullmatch(r'\s*rlivs\s*(\(\s*norecurrence\s*\))?\s*', text)
    if match is None:
        raise PolicyError(f'policy must be rlivs or rlivs(norecurrence), got {text!r}')
    return match[1] is None


def pick_layers(wanted: int | Sequence[int], layers: int) -> frozenset[int]:
    """The layers whose attention counts: those listed, or the middles of `wanted` equal bands of all `layers`.

    Raises:
        PolicyError: no layer, or one that the model has not.
    """
    if isinstance(wanted, int):
        if wanted <= 0:
            raise PolicyError(f'score_layers must be a positive number of layers or a list of them, got {wanted}')
        count = min(wanted, layers)
        return frozenset(math.floor((i + .5) * layers / count) for i in range(count))
    if not wanted or not all(0 <= layer < layers for layer in wanted):
        raise PolicyError(f'score_layers must be layers between 0 and {layers - 1} of this model, got {list(wanted)}')
    return frozenset(wanted)
