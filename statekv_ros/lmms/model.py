"""The model `statekv` of lmms-eval."""
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from statekv_ros.backbones.family import Family
from statekv_ros.errors import BagError, EvaluationError, FrameError, ParameterError, QuestionError
from statekv_ros.lmms.arguments import parse_arguments
from statekv_ros.lmms.asking import Answer, ask
from statekv_ros.lmms.journal import Journal
from statekv_ros.lmms.requests import Request, bare_question, from_messages, read_all
from statekv_ros.lmms.sampling import frame_indices
from statekv_ros.lmms.video import DECODERS, VideoFile, check_video, require_decoder
from statekv_ros.memory.trial import demonstration_warning

# Any other text might be taken for an answer: one task looks for a letter anywhere in it. The harness keeps no empty one in its
# cache, so that it is asked again.
_NO_ANSWER = Answer('', 0)


class StateKV(lmms):
    """Watches each video once, frame by frame, and answers its questions from memory.

    Attributes:
        device: of the model, for the harness.
        watched: videos that were watched to their end, each as often as it was.
        unanswered: questions without an answer, because their video cannot be read or they are too long for the model.
    """
    is_simple = False

    def __init__(self, max_batch_size: int | None = None, **model_args):
        """model_args: see `Arguments`. Raises StateKVError for one that cannot work, and for a model that cannot run."""
        super().__init__()
        arguments = parse_arguments(model_args)
        require_decoder(arguments.decoder)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and arguments.device in ('auto', 'cuda') and torch.cuda.is_available():
            arguments = replace(arguments, device=f'cuda:{self.accelerator.local_process_index}')
        self.arguments, self.watched, self.unanswered = arguments, 0, 0
        self._journal = Journal(arguments, self._rank)
        self._backbone = arguments.load()
        self.device = self._backbone.device
        self._newest: tuple[tuple, object] = (), None       # what was watched last, as of `_memory_of`, and the memory of it
        if warning := demonstration_warning(self._backbone, 'set pretrained'):
            logger.warning(warning)

    def generate_until(self, requests) -> list[GenerationResult]:
        """An answer for each; '' where there is none. Videos are taken in the order in which they first come.

        Raises:
            EvaluationError: a question that is not about one video that is there, before anything is watched.
        """
        begun = time.perf_counter()
        answers = self._answers(read_all(requests, self._read))
        self._tell(answers, time.perf_counter() - begun)
        return [GenerationResult(answer.text, TokenCounts(output_tokens=answer.tokens)) for answer in answers]

    def generate_until_multi_round(self, requests) -> list[list[str]]:
        """As `generate_until`, for tasks that ask again once they have an answer: one for each round."""
        begun, told = time.perf_counter(), []
        for instance, first in zip(requests, read_all(requests, self._read)):
            answers = self._answers([first], shown=False)
            info = None
            while True:
                found = self._round(instance, [answer.text for answer in answers], info)
                if found is None:
                    break
                messages, info = found
                answers += self._answers(self._next(instance, messages), shown=False) or self._none([first])
            told.append(answers)
        self._tell([answer for answers in told for answer in answers], time.perf_counter() - begun)
        return [[answer.text for answer in answers] for answers in told]

    def loglikelihood(self, requests):
        raise ParameterError(f'task {requests[0].task_name} scores given texts by their likelihood, and a memory only answers: '
                             'choose a task whose output_type is generate_until')

    def clean(self) -> None:
        """Let go of the model, once the harness has all answers."""
        self._backbone, self._newest = None, ((), None)
        super().clean()

    def _read(self, instance) -> Request:
        _, doc_to_messages, generation, doc_id, task, split = instance.args
        document = self.task_dict[task][split][doc_id]
        request = from_messages(doc_to_messages(document), f'{task}, document {doc_id}', generation)
        return replace(request, retrieve_by=bare_question(document, self.arguments.retrieve_by))

    def _answers(self, requests: Sequence[Request], shown: bool = True) -> list[Answer]:
        found = {number: answer for number, request in enumerate(requests) if (answer := self._journal.find(request))}
        if found and shown:
            logger.info(f'{len(found)} of {len(requests)} answers are in {self.arguments.resume}')
        left = [number for number in range(len(requests)) if number not in found]
        readable = self._readable({requests[number].video for number in left})
        self._require_positions([requests[number] for number in left if requests[number].video in readable])
        with tqdm(total=len(requests), initial=len(found), desc='StateKV', disable=self._rank != 0 or not shown) as bar:
            for numbers in self._batches(requests, left):
                some = [requests[number] for number in numbers]
                answers = self._of_one_video(some) if some[0].video in readable else self._none(some)
                for request, answer in zip(some, answers):
                    if answer is not _NO_ANSWER:
                        self._journal.keep(request, answer)
                found |= zip(numbers, answers)
                bar.update(len(numbers))
        return [found[number] for number in range(len(requests))]

    def _readable(self, paths: set[str]) -> set[str]:
        """Those of the videos that can be opened. All are looked at before the first is watched."""
        readable = set()
        for path in sorted(paths):
            try:
                check_video(path)
                readable.add(path)
            except BagError as error:
                logger.error(f'{error}; its questions get no answer')
        return readable

    def _require_positions(self, requests: Sequence[Request]) -> None:
        """Raises EvaluationError where RoPE is scaled for fewer positions than a video and its questions take."""
        watching = self.arguments.watching
        if not watching.length or watching.position_policy(self.arguments.named_positions) != 'native':
            return
        for path in dict.fromkeys(request.video for request in requests):
            try:
                video, numbers = self._frames_of(path)
                for _, frame in video.read(numbers[:1]):
                    for request in requests:
                        if request.video == path:
                            self._fitted(video, numbers, frame, request)
            except (BagError, FrameError):
                continue    # its questions get no answer, and it is told then

    def _memory_of(self, request: Request) -> tuple:
        """Equal for requests that are asked of one memory: those of one video, and where RoPE is scaled for a video and a
        question, as the released evaluation does, of those the ones that take as many positions."""
        if not self.arguments.watching.by_video:
            return (request.video,)
        asked = max(len(self._backbone.tokenize_question(text)) for text in (request.question, request.retrieve_by))
        return request.video, asked + request.generation.max_tokens

    def _batches(self, requests: Sequence[Request], left: Sequence[int]) -> list[list[int]]:
        """Numbers of requests that are asked together, video by video."""
        by_video: dict[str, dict[tuple, list[int]]] = {}
        for number in left:
            memories = by_video.setdefault(requests[number].video, {})
            memories.setdefault(self._memory_of(requests[number]), []).append(number)
        size = self.arguments.batch_size if self.arguments.reuse_video else 1
        return [numbers[first:first + size] for memories in by_video.values() for numbers in memories.values()
                for first in range(0, len(numbers), size)]

    def _of_one_video(self, requests: Sequence[Request]) -> list[Answer]:
        try:
            memory = self._watch(requests[0])
        except (BagError, FrameError) as error:
            logger.error(f'{error}; its questions get no answer')
            return self._none(requests)
        try:
            return ask(memory, requests, self.arguments.seed)
        except QuestionError as error:
            if len(requests) > 1:       # whose it was
                return [self._of_one_video([request])[0] for request in requests]
            logger.error(f'{requests[0].place}: {error}')
            return self._none(requests)

    def _none(self, requests: Sequence[Request]) -> list[Answer]:
        self.unanswered += len(requests)
        return [_NO_ANSWER] * len(requests)

    def _watch(self, request: Request):
        """The memory of a video, from its first frame to its last, for this request."""
        memory_of = self._memory_of(request)
        if self.arguments.reuse_video and self._newest[0] == memory_of:
            return self._newest[1]
        self._newest = (), None         # one at a time: it takes memory
        memory, (video, numbers) = None, self._frames_of(request.video)
        for stamp_ns, frame in video.read(numbers):
            if memory is None:
                memory = self.arguments.make_memory(self._fitted(video, numbers, frame, request))
            memory.step(frame, stamp_ns)
        if memory is None:
            raise BagError(f'video {request.video} has no pictures')
        self._newest = memory_of, memory
        self.watched += 1
        return memory

    def _frames_of(self, path: str) -> tuple[VideoFile, np.ndarray]:
        """A video, and the numbers of the frames to watch."""
        video = DECODERS[self.arguments.decoder](path)
        return video, frame_indices(video.frames, video.rate_hz, self.arguments.fps, self.arguments.max_frames)

    def _fitted(self, video: VideoFile, numbers: np.ndarray, frame: np.ndarray, request: Request) -> Family:
        """The model as a video is watched with it; see `Offline.fitted`. frame: one of the video's."""
        seconds = [float((number - numbers[0]) / video.rate_hz) for number in numbers.tolist()]
        try:
            return self.arguments.watching.fitted(
                self._backbone, seconds, *frame.shape[:2], [request.question, request.retrieve_by],
                request.generation.max_tokens, self.arguments.named_positions)
        except ParameterError as error:
            raise EvaluationError(f'{request.place}, {request.video}: {error}') from error

    def _round(self, instance, told: list[str], info) -> tuple | None:
        """The messages of the next round and what the task wants to be told then; None when it has asked all."""
        _, doc_to_messages, _, doc_id, task, split = instance.args
        payload = doc_to_messages(self.task_dict[task][split][doc_id], round_idx=len(told), previous_output=told,
                                  previous_round_info=info)
        if not (isinstance(payload, tuple) and len(payload) == 4) or payload[1]:
            return None
        return payload[0], payload[3]

    def _next(self, instance, messages) -> list[Request]:
        """The request of a later round; empty, with the reason logged, where it cannot be asked."""
        place = f'{instance.task_name}, document {instance.doc_id}'
        try:
            request = from_messages(messages, place, instance.args[2])
            return [replace(request, retrieve_by=self._read(instance).retrieve_by)]
        except EvaluationError as error:
            logger.error(f'{place}: {error}; it gets no answer')
            return []

    def _tell(self, answers: Sequence[Answer], seconds: float) -> None:
        tokens = sum(answer.tokens for answer in answers)
        if self.unanswered:
            logger.error(f'{self.unanswered} questions have no answer, and the harness counts them as wrong: its scores are too '
                         'low; see the lines above')
        log_metrics(seconds, tokens, tokens / max(seconds, 1e-9),
                    {'rank': self._rank, 'watched': self.watched, 'unanswered': self.unanswered})
