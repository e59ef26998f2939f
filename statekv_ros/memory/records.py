"""Plain values that travel through the memory: what a step was, what it cost, what an answer is."""
from dataclasses import dataclass, replace

from statekv_ros.memory.pose import Pose


@dataclass(frozen=True, slots=True)      # over hours there are many
class StepRecord:
    """One frame step as the detailed cache knows it.

    Attributes:
        step: number in the stream, from 0; the prefix before the first frame is step -1.
        segment: grows when header stamps go back.
        first_stamp_ns, last_stamp_ns: header stamps of its first and last frame, in nanoseconds.
        frames: camera frames in it.
        first_ordinal, tokens: its tokens are first_ordinal .. first_ordinal + tokens - 1 of the stream.
        visual_start, visual_tokens: where its visual tokens stand among its tokens.
        position, next_position: virtual position of its first token, and of the token after it.
        pose: where the camera was, at the newest of its frames for which that is known; None where it is for none.
    """
    step: int
    segment: int
    first_stamp_ns: int
    last_stamp_ns: int
    frames: int
    first_ordinal: int
    tokens: int
    visual_start: int
    visual_tokens: int
    position: int
    next_position: int
    pose: Pose | None = None

    @property
    def visual(self) -> slice:
        """Its visual tokens among its tokens."""
        return slice(self.visual_start, self.visual_start + self.visual_tokens)


@dataclass(frozen=True)
class StepReport:
    """What one frame step cost, in ms of wall time, and what the memory holds after it (tokens, bytes, frames).

    Attributes:
        preprocess_ms: decode, where that was waited for, and resize of its frames; vision_ms: normalise, patch, vision tower and embeddings;
        prefill_ms: language model with attention and importance; select_ms: top-B and slot update.
        pose: as of the step.
        cameras: so many steps, this one among them, went through the model as one; vision_ms and prefill_ms are those of all.
    """
    step: int
    segment: int
    first_stamp_ns: int
    last_stamp_ns: int
    frames: int
    preprocess_ms: float
    vision_ms: float
    prefill_ms: float
    select_ms: float
    step_tokens: int
    budget: int
    state_tokens: int
    detailed_tokens: int
    detailed_bytes: int
    forgotten_frames: int
    pose: Pose | None = None
    cameras: int = 1

    def timed(self, vision_ms: float, prefill_ms: float, select_ms: float, cameras: int = 1) -> 'StepReport':
        """The same step with what it cost."""
        return replace(self, vision_ms=vision_ms, prefill_ms=prefill_ms, select_ms=select_ms, cameras=cameras)

    @property
    def total_ms(self) -> float:
        return self.preprocess_ms + self.vision_ms + self.prefill_ms + self.select_ms


@dataclass(frozen=True)
class Evidence:
    """One frame step, its share (0..1) of the attention that the answer paid to all frames, where the camera was, and the step's
    number in the stream; -1 where there is none."""
    first_stamp_ns: int
    last_stamp_ns: int
    share: float
    pose: Pose | None = None
    step: int = -1


@dataclass(frozen=True)
class AnswerResult:
    """An answer with what it was allowed to read and what it cost.

    Attributes:
        finish_reason: 'stop' (the model ended it), 'length' (max_tokens), 'timeout' or 'canceled' (ended early, text is what it
            had).
        first_stamp_ns, last_stamp_ns: oldest and newest frame that it could read.
        frames_covered: camera frames between them that it could read.
        evidence: most attended steps, greatest share first.
        context_tokens: tokens of the memory that it could read.
        prefill_ms: the question's tokens (and a waiting half step) over the memory; decode_ms: the answer's tokens.
        first_token_ms: from the start to the first answer token, other work in between included; 0 if there is none.
        demonstration_model: whether the model is a demonstration, whose answers no robot should act on.
    """
    question: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    first_stamp_ns: int
    last_stamp_ns: int
    frames_covered: int
    evidence: tuple[Evidence, ...]
    question_tokens: int
    answer_tokens: int
    context_tokens: int
    prefill_ms: float
    first_token_ms: float
    decode_ms: float
    prefill_policy: str
    answer_policy: str
    demonstration_model: bool
