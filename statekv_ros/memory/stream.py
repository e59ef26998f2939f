"""One camera's memory: frames go in one by one at a constant cost, questions are answered from what was seen."""
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from statekv_ros.backbones.base import Backbone, TokenInputs
from statekv_ros.errors import Interrupted, QuestionError
from statekv_ros.memory.answering.decoding import UNHURRIED, Answering
from statekv_ros.memory.answering.snapshot import Seen, take_snapshot
from statekv_ros.memory.carried import make_carried
from statekv_ros.memory.carried.positions import StepPlace, parse_positions
from statekv_ros.memory.clock import PhaseClock
from statekv_ros.memory.detailed.cache import PAGE_TOKENS, DetailedCache
from statekv_ros.memory.detailed.formats import RAW
from statekv_ros.memory.detailed.index import DEFAULT_INDEX
from statekv_ros.memory.detailed.tiers import Tier
from statekv_ros.memory.graphs import make_commits, make_decodes, make_graphs
from statekv_ros.memory.intake import FrameIntake, PendingFrames
from statekv_ros.memory.late_poses import LatePoses
from statekv_ros.memory.policies import AnswerPolicy, PrefillPolicy, parse_answer_policy, parse_prefill_policy
from statekv_ros.memory.pose import NOT_TOLD, Locate, Place
from statekv_ros.memory.records import AnswerResult, StepRecord, StepReport
from statekv_ros.memory.saved.saving import Saving


class VideoStream:
    """Frames of one camera through one backbone; many streams may share the backbone. Not for several threads at once.

    Attributes:
        backbone: the model that watches.
        prefill_policy, answer_policy: what a frame and, by default, a question may attend to.
        positions: which positions the model is given as the stream grows.
        detailed_format: how the detailed cache is stored.
        frames: camera frames that the memory holds, a waiting half step included, forgotten ones not.
        steps: frame steps so far.
        graphs, commits, decodes: frame steps, what is kept of them, and tokens of answers as recorded graphs; None where all run
            eagerly.
        saving: what takes each step down for a later start; None where nobody keeps it.
        locate: where the camera was, asked once a step is computed and again until that is settled; must neither wait nor raise.
        late: what waits for that.
    """

    def __init__(self, backbone: Backbone, prefill_policy: str | PrefillPolicy = 'statekv(4096)',
                 answer_policy: str | AnswerPolicy = 'all', device_cache_bytes: int = 0,
                 cancelled: Callable[[], bool] = lambda: False, positions: str = '', cuda_graph: str = 'auto',
                 page_tokens: int = PAGE_TOKENS, index: str = DEFAULT_INDEX, detailed_format: str = RAW.name,
                 host_cache_bytes: int = 0, below: Sequence[Tier] = ()):
        """
        Args:
            positions: `native`, `contiguous`, `lazy_shift`, or '' for the default; see the module `positions`.
            device_cache_bytes: past this many bytes on the device the oldest steps of the detailed cache leave it; 0: never.
            host_cache_bytes: main memory for these; 0: none.
            below: further tiers for them, such as the disk. What no tier has room for is forgotten.
            cancelled: looked at once per layer; when true, the step or slice in progress ends with `Interrupted` and
                leaves the memory as it was, without the newest frame of that step. A step replayed as a graph looks once.
            cuda_graph: `auto`: on a GPU, frame steps are replayed as CUDA graphs once the state is full, and so are the tokens of
                answers that are long enough; `off`: never.
            page_tokens, index: how the detailed cache is cut and described for the answer policy `sparse`.
            detailed_format: how it is stored: `bf16` (the model's own dtype), `int8` or `int4`.

        Raises:
            PolicyError, ParameterError: a policy or a size that cannot work.
        """
        self.backbone = backbone
        self.prefill_policy = parse_prefill_policy(str(prefill_policy))
        self.answer_policy = parse_answer_policy(str(answer_policy))
        self.positions = parse_positions(positions, self.prefill_policy, backbone.max_position)
        self.cancelled, self.detailed_format = cancelled, detailed_format
        self._detailed_options = device_cache_bytes, self.positions, page_tokens, index, detailed_format, host_cache_bytes
        self._below = tuple(below)
        self.generation = 0
        self.saving: Saving | None = None
        self.locate: Locate = lambda stamps_ns, again: NOT_TOLD
        self.graphs = make_graphs(cuda_graph, backbone, self.prefill_policy.kind)
        self.commits = make_commits(self.graphs, backbone.device)
        self.decodes = make_decodes(cuda_graph, backbone)
        self._clear()

    def step(self, frame: np.ndarray, stamp_ns: int, preprocess_ms: float = 0.0) -> StepReport | None:
        """Take one camera frame; runs a frame step whenever the backbone has enough frames for one.

        Args:
            frame: uint8 [height, width, 3] RGB.
            stamp_ns: header stamp in nanoseconds. One that goes back opens a new segment; memory is kept.
            preprocess_ms: time already spent on this frame (decoding), added to the report's.

        Returns:
            The step's report, or None while the frame waits for its partner. A frame of another size or segment than the
            waiting one makes the waiting one a step of its own.

        Raises:
            FrameError: not an image, or a stamp that is not positive or the same as the last one.
            Interrupted: `cancelled` said so.
            Exception: whatever else went wrong in the step; see `flush` for what becomes of its frames.
        """
        report = self.take_in(frame, stamp_ns, preprocess_ms)
        return self.flush() if self.is_ready else report

    def take_in(self, frame: np.ndarray, stamp_ns: int, preprocess_ms: float = 0.0) -> StepReport | None:
        """The first part of `step`: let a frame wait with those that are there, which may be enough for a step then.

        Returns:
            The report of the step that the frame which waited became by itself, if it did.

        It raises what `step` does; the frame then waits all the same, but for a FrameError about itself.
        """
        prepared, prepare_ms = self._intake.prepare(frame, stamp_ns)
        try:
            report = self.flush() if self._intake.parts_from(prepared, stamp_ns) else None
        except BaseException:
            self._intake.take()     # none of them can share a step with this frame, which itself is a good one
            raise
        finally:
            self._intake.add(prepared, stamp_ns, preprocess_ms + prepare_ms)
        if not self.is_ready:
            pose, self.pending.settled = self.locate([stamp_ns], False)
            self.pending.pose = pose or self.pending.pose
        return report

    @torch.inference_mode()
    def flush(self) -> StepReport | None:
        """Run the waiting frames as a step, padded by repeating the last one; None when none waits.

        A step that fails costs its newest frame; the others wait for the next one, unless they were in a failed step before.
        """
        if not self.pending:
            return None
        try:
            return self._run()
        except BaseException:
            self.give_up()
            raise

    def _run(self) -> StepReport:
        self.remember_prefix()
        clock, model = PhaseClock(self.backbone.device), self.graphs or self.backbone
        inputs = model.encode(*self.next_step())
        clock.mark()
        record = self.begin(inputs)
        model.forward(self.backbone.shifted(inputs, self.shift), self)
        clock.mark()
        report = self.commit(record, inputs)
        clock.mark()
        return report.timed(*clock.phases_ms())

    def begin_answer(self, question: str, answer_policy: str | AnswerPolicy | None = None,
                     span: tuple[int | None, int | None] = (None, None), max_tokens: int = 64, temperature: float = 0.0,
                     seed: int = 0, evidence: int = 8, place: Place | None = None, half_step: bool = True,
                     retrieve_by: str = '') -> Answering:
        """Start an answer from what was seen until now; `Answering.advance` decodes it slice by slice.

        Args:
            answer_policy: the stream's own when None.
            span: oldest and newest header stamp in ns that it may read; None is unbounded.
            max_tokens: the answer ends after this many tokens.
            temperature: below 1e-6 takes the most likely token, above samples with `seed`.
            evidence: how many of the most attended steps the result names.
            place: read only what was seen from there; None is everywhere.
            half_step: frames that wait for their partner are read too, at the cost of a step; else what steps have computed alone.
            retrieve_by: text that the answer policy `rekv` finds steps by, such as a question without its options; '': the
                question. Other policies have no use for it.

        Raises:
            QuestionError: empty question, nothing seen yet, no frame in the span and at the place, or a value out of its range.
            PolicyError: unknown answer policy.
        """
        if not question.strip():
            raise QuestionError('question is empty: ask something')
        if max_tokens <= 0:
            raise QuestionError(f'max_tokens must be positive, got {max_tokens}')
        if not 0 <= temperature < float('inf'):
            raise QuestionError(f'temperature must be 0 or a positive number, got {temperature}')
        self.locate_again()
        policy = self.answer_policy if answer_policy is None else parse_answer_policy(str(answer_policy))
        seen = self.seen() if half_step else replace(self.seen(), pending=PendingFrames())
        return Answering(take_snapshot(seen, policy, span, place), question, max_tokens, temperature, seed, evidence,
                         retrieve_by.strip())

    def seen(self) -> Seen:
        """This moment, as far as an answer is concerned."""
        generation = self.generation
        return Seen(self.backbone, self.detailed, self._carried_now, self.positions, self.pending, self._next_position,
                    self._next_ordinal, self.shift, self._frames, self.steps, str(self.prefill_policy), self.cancelled,
                    lambda: self.generation == generation, self.decodes)

    def answer(self, question: str, **options) -> AnswerResult:
        """`begin_answer` with the same options, decoded to its end."""
        answering = self.begin_answer(question, **options)
        while not answering.advance(UNHURRIED):
            pass
        return answering.result()

    def locate_again(self) -> None:
        """Give steps, and frames that wait, the poses that were told since they came; costs little where there are none."""
        for step, pose in self.late.look(self.locate, self.pending):
            self.detailed.place_step(step, pose)
            if self.saving is not None:
                self.saving.place(step, pose)

    def reset(self) -> int:
        """Forget everything that was seen. Returns the number of camera frames forgotten."""
        frames = self.frames
        self._clear()
        self.generation += 1
        return frames

    @property
    def frames(self) -> int:
        return self._frames - self.forgotten_frames + len(self.pending)

    @property
    def segment(self) -> int:
        """How often header stamps went back."""
        return self._intake.time.segment

    @property
    def first_stamp_ns(self) -> int | None:
        """Header stamp of the oldest frame held; None before the first."""
        oldest = next(self.detailed.records(), None)
        if oldest is not None:
            return oldest.first_stamp_ns
        return self.pending.stamps_ns[0] if self.pending else None

    @property
    def last_stamp_ns(self) -> int | None:
        """Header stamp of the newest frame held; None before the first."""
        return self._intake.time.last_ns

    @property
    def state_tokens(self) -> int:
        """Tokens carried per layer and KV head."""
        return self.carried.tokens

    @property
    def detailed_tokens(self) -> int:
        return self.detailed.tokens

    @property
    def detailed_bytes(self) -> int:
        return self.detailed.bytes

    @property
    def forgotten_frames(self) -> int:
        """Camera frames that the bound on the detailed cache has cost."""
        return self.detailed.forgotten_frames

    @property
    def beyond_trained_context(self) -> bool:
        """Whether the model is given positions past what it was trained for, as only native ones can be; answers may get
        worse from there on."""
        return not self.positions.bounded and self._next_position > self.backbone.max_position

    @property
    def pending(self) -> PendingFrames:
        """Frames that wait for their partner."""
        return self._intake.pending

    @property
    def is_ready(self) -> bool:
        """Whether enough of them wait for a step."""
        return len(self.pending) >= self.backbone.frames_per_step

    @property
    def next_position(self) -> int:
        """Virtual position of the next token; before the first step, that of the token after the prefix."""
        return self._next_position

    @property
    def shift(self) -> int:
        """How far left of its virtual position the model is given a token."""
        return self.carried.shift

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float) -> torch.Tensor:
        """One layer of the frame step in progress; see `AttentionMemory`."""
        self.check_cancelled()
        self.detailed.write(layer, key, value)
        return self.carried.attend(layer, query, key, value, scale)

    def check_cancelled(self) -> None:
        """Raise Interrupted when `cancelled` says so."""
        if self.cancelled():
            raise Interrupted('the frame step was interrupted; the memory is as before it')

    def replayed(self) -> None:
        """After a step whose layers did not come here, but to `carried`: hand its keys and values to the detailed cache."""
        self.detailed.write_all(*self.carried.frame()[:2])

    def next_step(self) -> tuple[list[np.ndarray], list[float], int, int]:
        """The waiting frames as `Backbone.encode` takes a step."""
        return self.pending.frames, self.pending.seconds, self._next_position, self._frames

    def remember_prefix(self) -> None:
        """Run the tokens before the first frame, once."""
        if self._next_position:
            return
        inputs = self.backbone.prefix()
        if inputs.tokens:
            record = StepRecord(-1, 0, 0, 0, 0, 0, inputs.tokens, 0, 0, 0, inputs.next_position)
            self._place(inputs, record)
            (self.graphs or self.backbone).forward(inputs, self)
            self._remember(record, inputs)

    def begin(self, inputs: TokenInputs) -> StepRecord:
        """Make room for the step of the waiting frames, from what the backbone made of `next_step`; `attend` may follow."""
        pending = self.pending
        record = StepRecord(self.steps, pending.segment, pending.stamps_ns[0], pending.stamps_ns[-1], len(pending),
                            self._next_ordinal, inputs.tokens, inputs.visual_start, inputs.visual_tokens,
                            inputs.start, inputs.next_position)
        self._place(inputs, record)
        return record

    def commit(self, record: StepRecord, inputs: TokenInputs) -> StepReport:
        """Make the step that was begun part of the memory, once every layer has attended; the report has no times yet."""
        pending = self.pending
        stamps_ns = tuple(reversed(pending.stamps_ns))
        pose, settled = self.locate(stamps_ns, False)
        record = replace(record, pose=pose or pending.pose)
        self._remember(record, inputs)
        self.late.note(record, stamps_ns, settled)
        return StepReport(record.step, record.segment, record.first_stamp_ns, record.last_stamp_ns, record.frames,
                          pending.preprocess_ms, 0.0, 0.0, 0.0, record.tokens,
                          self.prefill_policy.budget, self.state_tokens, self.detailed_tokens, self.detailed_bytes,
                          self.forgotten_frames, record.pose)

    def commit_carried(self) -> None:
        """The part of `commit` that selects what is carried on."""
        if self.commits is None:
            self.carried.commit()
        else:
            self.commits.commit(self.carried)

    def give_up(self) -> None:
        """The step of the waiting frames failed: see `flush`."""
        self._intake.pending = self.pending.after_failure()

    def holds_below(self, step: int) -> bool:
        """Whether a tier below the detailed cache's own has a step, by its number."""
        return any(tier.holds(step) for tier in self._below)

    def progress(self) -> dict:
        """Where the stream stands, as plain values, for `resume`."""
        return {'steps': self.steps, 'frames': self._frames, 'next_position': self._next_position,
                'next_ordinal': self._next_ordinal, 'time': self._intake.time.saved()}

    def resume(self, progress: dict, pending: PendingFrames | None = None) -> None:
        """Stand where `progress` was taken, with these frames waiting; what it held is the caller's (`saved.restoring`)."""
        self.steps, self._frames = progress['steps'], progress['frames']
        self._next_position, self._next_ordinal = progress['next_position'], progress['next_ordinal']
        self._copied = None
        self._intake.time.restored(progress['time'])
        self._intake.pending = pending or PendingFrames()

    def _clear(self) -> None:
        if self.saving is not None:
            self.saving.clear()
        for recorded in filter(None, (self.graphs, self.commits, self.decodes)):
            recorded.clear()
        self.carried = make_carried(self.backbone, self.prefill_policy, self.positions)
        for tier in self._below:
            tier.clear()
        self.detailed = DetailedCache(self.backbone, *self._detailed_options, self._below, self._packed)
        self._intake = FrameIntake(self.backbone)
        self.late = LatePoses()
        self._copied: tuple | None = None
        self.steps = 0
        self._frames = 0
        self._next_position = self._next_ordinal = 0

    def _packed(self, step: int, packed: Callable[[], torch.Tensor]) -> None:
        if self.saving is not None:
            self.saving.pack(step, packed())

    def _carried_now(self) -> tuple:
        """A copy of what is carried, the same one for all answers that are asked between two steps."""
        if self._copied is None:
            self._copied = self.carried.copy()
        return self._copied

    def _place(self, inputs: TokenInputs, record: StepRecord) -> None:
        self._copied = None
        place = StepPlace(record.tokens, record.frames, record.first_ordinal, self._next_position, record.next_position,
                          inputs.start, self.backbone.starts(inputs), lambda: self.backbone.largest_shift(inputs))
        self.carried.begin(place)
        self.detailed.begin(place, self.shift, prefix=record.step < 0)

    def _remember(self, record: StepRecord, inputs: TokenInputs) -> None:
        caught = self.saving and self.saving.catch(record, inputs, self._next_position, self._frames, self.carried,
                                                   self.detailed.stretch if record.step >= 0 else None)
        self.detailed.commit(record, inputs)
        self.commit_carried()
        if record.step >= 0:
            self._intake.take()
        self._next_position = record.next_position
        self._next_ordinal += record.tokens
        self._frames += record.frames
        self.steps = record.step + 1
        if caught:
            self.saving.finish(caught, self.carried, self.detailed.newest_parts() if record.step >= 0 else {}, self.progress())
