"""One camera's memory in words: each clip becomes a caption, told with a few visual tokens of earlier clips in view."""
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from statekv_ros.backbones.family import Family
from statekv_ros.errors import QuestionError
from statekv_ros.evaluation.rlivs.captioner import Captioner, Kept
from statekv_ros.evaluation.rlivs.long_term import Caption, make_caption
from statekv_ros.evaluation.rlivs.options import Options, pick_layers
from statekv_ros.evaluation.rlivs.text_answer import answer_from_captions
from statekv_ros.memory.clock import PhaseClock
from statekv_ros.memory.intake import FrameIntake
from statekv_ros.memory.records import AnswerResult, StepReport


class CaptionMemory:
    """rLiVS (arXiv 2510.17364) with the face of `VideoStream`; not for several threads at once.

    Per clip the model is asked for a caption, with the visual tokens kept of past clips before the clip itself. The visual
    tokens that the caption's tokens paid most attention to are kept, as the model's inputs, in a FIFO of clips. Questions are
    answered from captions, not from pixels.

    What it holds: fifo_clips x keep of a clip's visual tokens, hidden values each (Qwen3-VL: and as many per DeepStack level);
    and a caption per clip, of 4 bytes x hidden for its embedding and a few bytes a word. At 2 frames/s and hidden 2048 that is
    450 captions or about 4 MB an hour, and `max_captions` bounds it.

    Attributes:
        captions: the long-term memory, oldest first; past `max_captions` the oldest is forgotten.
        selected: visual tokens kept of past clips, oldest first, as the model is given them.
        steps: clips told so far.
        forgotten_frames: camera frames of forgotten captions.
    """

    def __init__(self, backbone: Family, clip_frames: int = 16, keep: float = 1 / 16, fifo_clips: int = 16,
                 recurrent: bool = True, mmr_lambda: float = 0.5, context_tokens: int = 10_000,
                 caption_prompt: str = 'describe what is happening.', max_caption_tokens: int = 128,
                 score_layers: int | Sequence[int] = 4, max_captions: int = 16_384, positions: str = '',
                 cancelled: Callable[[], bool] = lambda: False):
        """
        Args:
            keep: share of a clip's visual tokens that later clips see, at least one token.
            fifo_clips: of so many past clips.
            recurrent: off, every clip is told by itself, as Goldfish does.
            mmr_lambda: weight of likeness to the question against unlikeness to captions already chosen.
            context_tokens: captions given to a question, in tokens; less where the trained context is shorter.
            score_layers: so many layers, evenly spaced (all where the model has fewer), or a list of them from 0.
            max_captions: past this many the oldest caption is forgotten.
            positions: of the tokens kept: `native`, `contiguous`, or '' for the default; see `Captioner`.
            cancelled: looked at once per layer; when true, the clip or answer in progress ends with `Interrupted` and leaves
                the memory as it was, without the frames of that clip.

        Raises:
            PolicyError: a value that cannot work.
        """
        self.backbone = backbone
        self.options = Options(clip_frames, keep, fifo_clips, recurrent, mmr_lambda, context_tokens, caption_prompt,
                               max_caption_tokens, max_captions, positions)
        self.cancelled = cancelled
        self._captioner = Captioner(backbone, self.options, pick_layers(score_layers, backbone.layout.layers), cancelled)
        self._clear()

    def step(self, frame: np.ndarray, stamp_ns: int, preprocess_ms: float = 0.0) -> StepReport | None:
        """Take one camera frame; tells a clip whenever `clip_frames` have come.

        Args:
            frame: uint8 [height, width, 3] RGB.
            stamp_ns: header stamp in nanoseconds.
            preprocess_ms: time already spent on this frame (decoding), added to the report's.

        Returns:
            The clip's report, or None while it fills. A frame of another size or a stamp that goes back ends the clip before.

        Raises:
            FrameError: not an image, or a stamp that is not positive or the same as the last one.
            PolicyError: a clip of such frames does not fit the model's trained context.
            Interrupted: `cancelled` said so.
        """
        prepared, prepare_ms = self._intake.prepare(frame, stamp_ns)
        report = self.flush() if self._intake.parts_from(prepared, stamp_ns) else None
        waiting = self._intake.add(prepared, stamp_ns, preprocess_ms + prepare_ms)
        return report if waiting < self.options.clip_frames else self.flush()

    def flush(self) -> StepReport | None:
        """Tell the clip as far as it has come; None when no frame waits."""
        clip = self._intake.take()
        if not clip:
            return None
        told = self._captioner.tell(clip, self._told_frames, self.selected)
        clock = PhaseClock(self.backbone.device)
        if self.options.recurrent:
            self.selected.append(told.selected)
        if len(self.captions) == self.options.max_captions:
            self.forgotten_frames += self.captions.popleft().frames
        self.captions.append(make_caption(self.backbone, told.text, clip, self.options.max_caption_tokens))
        self._told_frames += len(clip)
        self.steps += 1
        clock.mark()
        return StepReport(self.steps - 1, clip.segment, clip.stamps_ns[0], clip.stamps_ns[-1], len(clip), clip.preprocess_ms,
                          told.vision_ms, told.prefill_ms, told.select_ms + clock.phases_ms()[0], told.tokens, 0,
                          self.state_tokens, self.detailed_tokens, self.detailed_bytes, self.forgotten_frames)

    def answer(self, question: str, max_tokens: int = 64, evidence: int = 8,
               span: tuple[int | None, int | None] = (None, None)) -> AnswerResult:
        """Answer from the captions. A clip that is still filling is told for this answer alone, and leaves no trace.

        Args:
            max_tokens: the answer ends after this many tokens.
            evidence: how many of the most attended captions' clips the result names.
            span: oldest and newest header stamp in ns of clips that it may read about; None is unbounded.

        Raises:
            QuestionError: empty or too long a question, nothing seen yet, no clip in the span, a value out of its range.
            Interrupted: `cancelled` said so.
        """
        begun = time.perf_counter()
        if not question.strip():
            raise QuestionError('question is empty: ask something')
        if max_tokens <= 0:
            raise QuestionError(f'max_tokens must be positive, got {max_tokens}')
        if not self.frames:
            raise QuestionError('nothing has been seen yet: ask again after the first frame')
        captions = self._readable(*span)
        if not captions:
            raise QuestionError(f'no clip between {span[0]} and {span[1]} ns: the memory covers header stamps '
                                f'{self.first_stamp_ns} to {self.last_stamp_ns} ns')
        return answer_from_captions(self.backbone, captions, question, max_tokens, evidence, self.options, self.cancelled,
                                    begun)

    def reset(self) -> int:
        """Forget everything that was seen. Returns the number of camera frames forgotten."""
        frames = self.frames
        self._clear()
        return frames

    @property
    def frames(self) -> int:
        """Camera frames that the memory holds, those of a filling clip included, forgotten ones not."""
        return self._told_frames - self.forgotten_frames + len(self._intake.pending)

    @property
    def first_stamp_ns(self) -> int | None:
        """Header stamp of the oldest frame held; None before the first."""
        if self.captions:
            return self.captions[0].first_stamp_ns
        return self._intake.pending.stamps_ns[0] if self._intake.pending else None

    @property
    def last_stamp_ns(self) -> int | None:
        """Header stamp of the newest frame held; None before the first."""
        return self._intake.time.last_ns

    @property
    def state_tokens(self) -> int:
        """Visual tokens that the next clip will see of past ones."""
        return sum(kept.tokens for kept in self.selected)

    @property
    def detailed_tokens(self) -> int:
        """Tokens of all captions."""
        return sum(len(caption.token_ids) for caption in self.captions)

    @property
    def detailed_bytes(self) -> int:
        """Bytes of all captions: text, tokens and embeddings."""
        return sum(caption.bytes for caption in self.captions)

    def _clear(self) -> None:
        self.captions: deque[Caption] = deque()
        self.selected: deque[Kept] = deque(maxlen=self.options.fifo_clips)
        self._intake = FrameIntake(self.backbone)
        self.steps = self.forgotten_frames = self._told_frames = 0

    def _readable(self, begin: int | None, end: int | None) -> list[Caption]:
        def in_span(first_ns: int, last_ns: int) -> bool:
            return (begin is None or first_ns >= begin) and (end is None or last_ns <= end)

        captions = [caption for caption in self.captions if in_span(caption.first_stamp_ns, caption.last_stamp_ns)]
        if self._intake.pending and in_span(self._intake.pending.stamps_ns[0], self._intake.pending.stamps_ns[-1]):
            told = self._captioner.tell(self._intake.pending, self._told_frames, self.selected)
            captions.append(make_caption(self.backbone, told.text, self._intake.pending, self.options.max_caption_tokens))
        return captions
