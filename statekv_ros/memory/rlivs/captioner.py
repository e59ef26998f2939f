"""A clip in words, and the visual tokens that those words looked at most."""
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from statekv_ros.backbones.base import TokenInputs
from statekv_ros.backbones.family import Family
from statekv_ros.errors import PolicyError
from statekv_ros.memory.clock import PhaseClock
from statekv_ros.memory.rlivs.options import Options
from statekv_ros.memory.rlivs.telling import Telling
from statekv_ros.memory.snapshot import PendingFrames


@dataclass(frozen=True)
class ToldClip:
    """What one clip comes to.

    Attributes:
        text: its caption.
        selected: what the model is given of the visual tokens kept, in time order, [kept, features] (`visual_features`).
        tokens: of the clip's steps, text included; kept or not.
        vision_ms, prefill_ms, select_ms: vision tower; language model, caption included; choice of tokens.
    """
    text: str
    selected: torch.Tensor
    tokens: int
    vision_ms: float
    prefill_ms: float
    select_ms: float


class Captioner:
    """Tells clips; carries nothing from one to the next.

    Positions: a clip is read as if the video began with it. Prefix, then the past clips' tokens one position apart in time
    order, then the clip's steps laid out as ever, then the request. So positions are bounded for ever, and the past is as
    near as in the concatenated input of the paper. The tokens' own positions would leave the trained context in an endless
    stream, and their places in a grid mean little once most of the grid is gone. Timestamps in a step's text stay true.
    """

    def __init__(self, backbone: Family, options: Options, layers: Collection[int], cancelled: Callable[[], bool]):
        """layers: whose attention makes a token important."""
        self._backbone, self._options, self._layers, self._cancelled = backbone, options, layers, cancelled
        self._request = backbone.tokenize_question(options.caption_prompt)

    @torch.inference_mode()
    def tell(self, clip: PendingFrames, first_frame: int, past: Sequence[torch.Tensor]) -> ToldClip:
        """Caption a clip.

        Args:
            first_frame: number of its first frame in the stream, from 0.
            past: tokens kept of past clips, oldest first, [kept, features] each.

        Raises:
            PolicyError: a clip with a full past needs more positions than the model was trained for.
            Interrupted: `cancelled` said so.
        """
        backbone, clock = self._backbone, PhaseClock(self._backbone.device)
        prefix = backbone.prefix()
        steps = self._encode(clip, first_frame, prefix.next_position + sum(map(len, past)))
        visual_tokens = sum(step.visual_tokens for step in steps)
        kept = max(1, round(self._options.keep * visual_tokens))
        self._check_positions(steps[-1].next_position, kept, len(past))
        clock.mark()
        telling = Telling(backbone, self._cancelled, self._layers)
        if prefix.tokens:
            telling.read(prefix)
        if past:
            telling.read(backbone.embed_features(torch.cat([*past]), telling.position))
        visual = []
        for step in steps:
            first = telling.tokens + step.visual_start
            visual.append(torch.arange(first, first + step.visual_tokens, device=backbone.device))
            telling.read(step)
        token_ids = self._caption(telling)
        clock.mark()
        # Sums where the paper has means, over as many tokens, heads and layers for each: the order is the same.
        importance = telling.attention[torch.cat(visual)]
        best = importance.argsort(descending=True, stable=True)[:kept].sort().values
        selected = torch.cat([backbone.visual_features(step) for step in steps])[best]
        clock.mark()
        return ToldClip(backbone.decode(token_ids).strip(), selected, sum(step.tokens for step in steps), *clock.phases_ms())

    def _encode(self, clip: PendingFrames, first_frame: int, position: int) -> list[TokenInputs]:
        steps, size = [], self._backbone.frames_per_step
        for first in range(0, len(clip), size):
            steps.append(self._backbone.encode(clip.frames[first:first + size], clip.seconds[first:first + size], position,
                                               first_frame + first))
            position = steps[-1].next_position
        return steps

    def _caption(self, telling: Telling) -> list[int]:
        """Every token of the caption is read, the last one too: it is their attention that counts."""
        telling.read_ids(self._request[:-1])
        token, told = telling.next(self._request[-1]), []
        if token not in self._backbone.stop_token_ids:
            telling.attention.zero_()  # the request's own attention stands in only for a caption without a word
        while token not in self._backbone.stop_token_ids and len(told) < self._options.max_caption_tokens:
            told.append(token)
            token = telling.next(token)
        return told

    def _check_positions(self, end: int, kept: int, past_clips: int) -> None:
        """Looks ahead to a full FIFO, so that the first clip fails rather than a later one."""
        options = self._options
        missing = (options.fifo_clips - past_clips) * kept if options.recurrent else 0
        needed = end + missing + len(self._request) + options.max_caption_tokens
        if needed > self._backbone.max_position:
            raise PolicyError(
                f'clips of clip_frames={options.clip_frames} with keep={options.keep:g} of fifo_clips={options.fifo_clips} past '
                f'clips need {needed} positions, but model {self._backbone.name!r} was trained for '
                f'{self._backbone.max_position}: lower one of them, or the size of frames')
