"""An answer in the making: the question's tokens and then the answer's own, decoded in slices over a snapshot."""
import math
import time
from collections.abc import Sequence

import torch

from statekv_ros.backbones.base import TokenInputs
from statekv_ros.backbones.family import Family
from statekv_ros.errors import Code, ModelError, QuestionError
from statekv_ros.memory.answering.passes import TokenPasses
from statekv_ros.memory.answering.reading import Rows, read_snapshot
from statekv_ros.memory.answering.rekv import BareRetrieval
from statekv_ros.memory.answering.retrieval import Retrieval
from statekv_ros.memory.answering.sampling import NOT_FINITE, Sampling, next_tokens
from statekv_ros.memory.answering.snapshot import Snapshot
from statekv_ros.memory.records import AnswerResult, Evidence, StepRecord

# Tokens of a question that are read in the time that one of an answer's is decoded in, or less: these are read together, with one
# choice of pages and one look at the weights.
_READ_FOR_ONE = 4
_RETRIEVALS = {'retrieve': Retrieval, 'rekv': BareRetrieval}     # by the kind of the answer policy
UNHURRIED = 64      # tokens of a slice where no frame waits; with `sparse`, how a question is cut decides what it reads


class Answering:
    """Reads a snapshot and keeps its own tokens in a private tail, so frames that arrive meanwhile neither disturb it nor
    wait for it. Made by `VideoStream.begin_answer`.

    Attributes:
        finish_reason: '' while it runs, then 'stop', 'length', 'timeout' or 'canceled'.
        token_ids: the answer's tokens so far.
    """

    def __init__(self, snapshot: Snapshot, question: str, max_tokens: int, temperature: float, seed: int, evidence: int,
                 retrieve_by: str = ''):
        self.question = question
        self.finish_reason = ''
        self.token_ids: list[int] = []
        self._snapshot, self._seen, self._backbone = snapshot, snapshot.seen, snapshot.seen.backbone
        self._max_tokens, self._evidence = max_tokens, evidence
        self._sampling = Sampling(temperature, seed, self._backbone.device)
        self._position, self._end = snapshot.position, self._seen.positions.end     # as the model is given them
        self._retrieval = _RETRIEVALS[snapshot.policy.kind](snapshot) if snapshot.policy.retrieves else None
        self._reading = read_snapshot(snapshot)
        self._passes = TokenPasses(self._backbone, self._reading, self._seen.decodes)
        self._records = snapshot.records
        self._waiting_half_step = bool(snapshot.pending)
        # Asked before the first whole step: the prefix has not been read by anyone yet.
        self._prefix = self._backbone.prefix() if self._seen.position == 0 else None
        self._prompt = self._backbone.tokenize_question(question)
        # What says which steps are read, where that is not the question as it is asked.
        alone = isinstance(self._retrieval, BareRetrieval)
        self._bare = self._backbone.tokenize_text((retrieve_by or question).strip()) if alone else []
        self.question_tokens = len(self._prompt)
        self._require_positions()
        self._begun = time.perf_counter()
        self._prefill_ms = self._decode_ms = self._first_token_ms = 0.0

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._backbone.decode([i for i in self.token_ids if i not in self._backbone.stop_token_ids])

    @property
    def is_decoding(self) -> bool:
        """Whether its next pass is one token's, the question's last or one of the answer's."""
        return not (self.finish_reason or self._waiting_half_step or self._bare or len(self._prompt) > 1)

    def shares_with(self, other: 'Answering') -> bool:
        """Whether the next pass of both can be one: `decode_together`."""
        backbone = self._backbone
        return self.is_decoding and other.is_decoding and backbone is other._backbone and isinstance(backbone, Family)

    @torch.inference_mode()
    def advance(self, tokens: int = 8) -> bool:
        """One slice: decode at most `tokens` of the answer's or read `_READ_FOR_ONE` times as many of the question's, fewer where
        what they score would be too large; True when finished.

        A frame that waits for its partner is read first, in a slice of its own. With `retrieve` the question is one slice
        whatever its length: all of it has a say in what is read. With `rekv` its bare text is such a slice before it.

        Raises:
            QuestionError: the stream was reset meanwhile.
            ModelError: what the model computes is not finite.
            Interrupted: the stream's `cancelled` said so.
        """
        if self.finish_reason:
            return True
        self.require_memory()
        begun = time.perf_counter()
        if self._waiting_half_step or self._bare:
            self._read_half_step() if self._waiting_half_step else self._choose_by_bare_text()
            self._wait_for_device()
            self._prefill_ms += (time.perf_counter() - begun) * 1e3
            return False
        # The question's last token decodes the first of the answer's, so it belongs to them.
        most = min(_READ_FOR_ONE * tokens, self._reading.most_tokens)
        at_once = self._snapshot.policy.kind == 'retrieve'
        piece = self._prompt[:-1] if at_once else self._prompt[:min(most, len(self._prompt) - 1)]
        if piece:
            inputs = self._backbone.embed(piece, self._position)
            if at_once:
                self._reading.choose(self._retrieval, self._backbone.question_slice(self._prompt), inputs.positions)
            self._read(inputs)
            del self._prompt[:len(piece)]
            self._wait_for_device()
            self._prefill_ms += (time.perf_counter() - begun) * 1e3
        left = 0 if len(self._prompt) > 1 else tokens - math.ceil(len(piece) / _READ_FOR_ONE)
        for _ in range(left):
            (token, logits), = decode([self])
            self.take(token, logits)
            if self.finish_reason:
                break
        return bool(self.finish_reason)

    def require_memory(self) -> None:
        """Raise QuestionError when the stream was reset meanwhile."""
        if not self._seen.is_current():
            raise QuestionError('the memory was reset while this question was being answered: ask again', Code.MEMORY_RESET)

    def take(self, token: int, logits: torch.Tensor) -> None:
        """The token that `decode` found, which may end the answer, and its logits [vocabulary].

        Raises:
            ModelError: what the model computes is not finite.
        """
        if token == NOT_FINITE:
            raise ModelError(f'model {self._backbone.name!r} computes numbers that are not finite: set the parameter "dtype" '
                             'to bfloat16 or float32, or copy the checkpoint again')
        self.token_ids.append(token)
        if len(self.token_ids) == 1:
            self._first_token_ms = (time.perf_counter() - self._begun) * 1e3
        if token in self._backbone.stop_token_ids:
            self.finish_reason = 'stop'
            if len(self.token_ids) > 1:
                # Where a model looks to see that it has said all is not where it found it.
                self._reading.take_back()
        elif len(self.token_ids) >= self._max_tokens or self._position >= self._end:
            self.finish_reason = 'length'

    def give_up_pass(self) -> None:
        """As before a pass of `decode` that failed."""
        self._reading.take_back()

    def finish(self, reason: str) -> None:
        """End it with what it has."""
        self.finish_reason = self.finish_reason or reason

    def result(self) -> AnswerResult:
        """The answer; call when `advance` returned True or after `finish`."""
        snapshot = self._snapshot
        return AnswerResult(
            question=self.question, text=self.text, token_ids=tuple(self.token_ids), finish_reason=self.finish_reason,
            first_stamp_ns=snapshot.first_stamp_ns, last_stamp_ns=snapshot.last_stamp_ns, frames_covered=snapshot.frames,
            evidence=self._reading.evidence(self._records, self._evidence), question_tokens=self.question_tokens,
            answer_tokens=len(self.token_ids), context_tokens=self._reading.tokens, prefill_ms=self._prefill_ms,
            first_token_ms=self._first_token_ms, decode_ms=self._decode_ms, prefill_policy=snapshot.seen.prefill_policy,
            answer_policy=str(snapshot.policy), demonstration_model=bool(self._backbone.demonstration))

    def newest_evidence(self, limit: int) -> tuple[Evidence, ...]:
        """What the newest token looked at most, greatest share first; for a look while it runs, cheap however much is held."""
        return self._reading.newest_evidence(self._records, limit)

    def _read_half_step(self) -> None:
        """Frames without a partner as a padded step in the private tail; the stream itself will see them with it."""
        seen, pending, ordinal = self._seen, self._snapshot.pending, self._seen.ordinal
        if self._prefix is not None:
            self._read(self._prefix)
            ordinal += self._prefix.tokens
        inputs = self._backbone.encode(pending.frames, pending.seconds, self._position + seen.shift, seen.frame_number)
        self._records = self._records.and_one(StepRecord(
            seen.step_number, pending.segment, pending.stamps_ns[0], pending.stamps_ns[-1], len(pending), ordinal,
            inputs.tokens, inputs.visual_start, inputs.visual_tokens, inputs.start, inputs.next_position,
            pending.pose))
        self._read(self._backbone.shifted(inputs, seen.shift))
        self._waiting_half_step = False
        self._require_positions()

    def _choose_by_bare_text(self) -> None:
        """Let every layer choose its steps; the question is then read where this was."""
        inputs = self._backbone.embed(self._bare, self._position)
        self._reading.choose(self._retrieval, slice(0, inputs.tokens), inputs.positions)
        self._reading.begin(inputs.tokens)
        self._backbone.forward(inputs, self._reading)
        self._reading.drop()
        self._bare = []

    def _require_positions(self) -> None:
        if self._position + len(self._bare) > self._end:
            raise QuestionError(f'retrieve_by has {len(self._bare)} tokens, and {max(0, self._end - self._position)} '
                                'positions are left for it: shorten it')
        if self._position + self.question_tokens > self._end:
            raise QuestionError(f'question has {self.question_tokens} tokens, and {max(0, self._end - self._position)} '
                                'positions are left for it: shorten it')

    def _read(self, inputs: TokenInputs) -> torch.Tensor:
        self._reading.begin(inputs.tokens)
        hidden = self._backbone.forward(inputs, self._reading)
        self._reading.commit()
        self._position = inputs.next_position
        return hidden

    def _wait_for_device(self) -> None:
        """So that the times are those of the work, and a slice ends when it says so."""
        if self._backbone.device.type == 'cuda':
            torch.cuda.synchronize(self._backbone.device)


@torch.inference_mode()
def decode(answerings: Sequence[Answering]) -> list[tuple[int, torch.Tensor]]:
    """A pass of one token of each of these answers, all of them `is_decoding` and of one backbone, a `Family` where they are
    several. The host waits for the device once, for the tokens.

    Returns:
        What `take` is to be told of each: its next token, or `NOT_FINITE`, and its logits [vocabulary].

    Raises:
        Interrupted: a stream's `cancelled` said so.
    """
    begun, backbone = time.perf_counter(), answerings[0]._backbone
    ids = [(each._prompt or each.token_ids)[-1] for each in answerings]
    positions, readings = [each._position for each in answerings], [each._reading for each in answerings]
    for reading in readings:
        reading.begin(1)
        reading.scoring = True
    if len(answerings) == 1:
        first, = answerings
        logits = first._passes.logits(ids[0], positions[0], first._max_tokens - len(first.token_ids) - 1)
    else:
        logits = backbone.logits(backbone.forward(backbone.embed_rows(ids, positions), Rows(readings))[:len(ids), -1])
    tokens = next_tokens(logits, [each._sampling for each in answerings]).tolist()
    for each in answerings:
        each._reading.scoring = False
        each._reading.commit()
        each._prompt.clear()
        each._position += 1
        each._decode_ms += (time.perf_counter() - begun) * 1e3
    return list(zip(tokens, logits))
