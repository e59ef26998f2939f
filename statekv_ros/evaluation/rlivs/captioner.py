"""A clip in words, and the visual tokens that those words looked at most."""
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch

from statekv_ros.backbones.base import TokenInputs
from statekv_ros.backbones.family import Family
from statekv_ros.errors import PolicyError
from statekv_ros.evaluation.rlivs.options import Options
from statekv_ros.evaluation.rlivs.telling import Telling
from statekv_ros.memory.clock import PhaseClock
from statekv_ros.memory.intake import PendingFrames


@dataclass(frozen=True)
class Kept:
    """Visual tokens kept of one clip, in time order.

    Attributes:
        inputs: as the model is given them: embeddings, positions, DeepStack rows.
        native: whether they are given their own places in the clip, or consecutive positions.
    """
    inputs: TokenInputs
    native: bool

    @property
    def tokens(self) -> int:
        return self.inputs.tokens


@dataclass(frozen=True)
class ToldClip:
    """What one clip comes to.

    Attributes:
        text: its caption.
        selected: the visual tokens that its caption looked at most.
        tokens: of the clip's steps, text included; kept or not.
        vision_ms, prefill_ms, select_ms: vision tower; language model, caption included; choice of tokens.
    """
    text: str
    selected: Kept
    tokens: int
    vision_ms: float
    prefill_ms: float
    select_ms: float


class Captioner:
    """Tells clips; carries nothing from one to the next.

    Positions: a clip is read as if the video began with the oldest of the past clips: prefix, past clips, this one. So
    positions are bounded for ever, while their own would leave the trained context in an endless stream. Where a kept token
    stands there is `Options.positions`: `native`, its own place in its own clip, whose other tokens leave gaps, so that
    distances in time and in the picture stay true; `contiguous`, one after another as in any concatenated input, which needs
    far fewer positions. '' is native for as long as a full FIFO fits the trained context, then contiguous.
    Timestamps in a step's text stay true either way.
    """

    def __init__(self, backbone: Family, options: Options, layers: Collection[int], cancelled: Callable[[], bool]):
        """layers: whose attention makes a token important."""
        self._backbone, self._options, self._layers, self._cancelled = backbone, options, layers, cancelled
        self._request = backbone.tokenize_question(options.caption_prompt)

    @torch.inference_mode()
    def tell(self, clip: PendingFrames, first_frame: int, past: Sequence[Kept]) -> ToldClip:
        """Caption a clip.

        Args:
            first_frame: number of its first frame in the stream, from 0.
            past: tokens kept of past clips, oldest first.

        Raises:
            PolicyError: a clip with a full past needs more positions than the model was trained for.
            Interrupted: `cancelled` said so.
        """
        backbone, clock = self._backbone, PhaseClock(self._backbone.device)
        prefix = backbone.prefix()
        native, placed, steps = self._lay_out(clip, first_frame, past, prefix.next_position)
        keep = self._keep(steps)
        clock.mark()
        telling = Telling(backbone, self._cancelled, self._layers)
        if prefix.tokens:
            telling.read(prefix)
        if placed:
            telling.read(backbone.joined(placed))
        visual = []
        for step in steps:
            first = telling.tokens + step.visual_start
            visual.append(torch.arange(first, first + step.visual_tokens, device=backbone.device))
            telling.read(step)
        token_ids = self._caption(telling)
        clock.mark()
        # Sums where the paper has means, over as many tokens, heads and layers for each: the order is the same.
        importance = telling.attention[torch.cat(visual)]
        best = importance.argsort(descending=True, stable=True)[:keep].sort().values
        inputs = replace(self._pick(steps, best), start=steps[0].start, next_position=steps[-1].next_position)
        clock.mark()
        return ToldClip(backbone.decode(token_ids).strip(), Kept(inputs, native), sum(step.tokens for step in steps),
                        *clock.phases_ms())

    def _lay_out(self, clip: PendingFrames, first_frame: int, past: Sequence[Kept],
                 position: int) -> tuple[bool, list[TokenInputs], list[TokenInputs]]:
        """Whether tokens kept stay at their places in their clips; those of past clips and this clip's steps, from `position` on.

        Looks ahead to a full FIFO, so that the first clip fails rather than a later one. Timestamps grow longer with the
        stream: where their own places come not to fit, and were not asked for, all tokens kept go in line from that clip on.
        """
        options, most = self._options, self._backbone.max_position
        kinds = {'native': ('native',), 'contiguous': ('contiguous',), '': ('native', 'contiguous')}[options.positions]
        if len(kinds) > 1 and not all(kept.native for kept in past):
            kinds = kinds[1:]
        for kind in kinds:
            placed, begin = self._place(past, kind == 'native', position)
            steps = self._encode(clip, first_frame, begin)
            end = steps[-1].next_position
            missing = options.fifo_clips - len(past) if options.recurrent else 0
            needed = (end + (end - begin if kind == 'native' else self._keep(steps)) * missing + len(self._request)
                      + options.max_caption_tokens)
            if needed <= most:
                return kind == 'native', placed, steps
        raise PolicyError(
            f'clips of clip_frames={options.clip_frames} with keep={options.keep:g} of fifo_clips={options.fifo_clips} past '
            f'clips need {needed} {kind} positions, but model {self._backbone.name!r} was trained for {most}: lower '
            'one of them, or the size of frames')

    def _place(self, past: Sequence[Kept], native: bool, position: int) -> tuple[list[TokenInputs], int]:
        """The tokens kept of past clips from `position` on, and the position behind them."""
        placed = []
        for kept in past:
            placed.append(self._backbone.shifted(kept.inputs, kept.inputs.start - position) if native
                          else self._backbone.in_line(kept.inputs, position))
            position = placed[-1].next_position
        return placed, position

    def _keep(self, steps: Sequence[TokenInputs]) -> int:
        return max(1, round(self._options.keep * sum(step.visual_tokens for step in steps)))

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

    def _pick(self, steps: list[TokenInputs], best: torch.Tensor) -> TokenInputs:
        """Visual tokens of a clip by their index among all of the clip's, in time order."""
        picked, first = [], 0
        for step in steps:
            of_step = best[(best >= first) & (best < first + step.visual_tokens)] - first
            first += step.visual_tokens
            if len(of_step):
                picked.append(self._backbone.pick(step, of_step))
        return self._backbone.joined(picked)
