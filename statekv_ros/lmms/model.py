"""The model `statekv` of lmms-eval, in the harness's two interfaces: chat, and simple for tasks of several rounds."""
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from statekv_ros.errors import BagError, EvaluationError, FrameError, ParameterError, QuestionError
from statekv_ros.lmms.arguments import parse_arguments
from statekv_ros.lmms.asking import Answer, ask
from statekv_ros.lmms.requests import Request, from_messages, from_visuals, read_all
from statekv_ros.lmms.sampling import frame_indices
from statekv_ros.lmms.video import DECODERS, VideoFile, require_decoder
from statekv_ros.memory.trial import demonstration_warning

# Any other text might be taken for an answer: one task looks for a letter anywhere in it. The harness keeps no empty one in its
# cache, so that it is asked again.
_NO_ANSWER = Answer('', 0)


class StateKV(lmms):
    """Watches each video once, frame by frame, and answers its questions from memory.

    Attributes:
        unanswered: questions without an answer, because their video cannot be read or they are too long for the model.
    """

    def __init__(self, max_batch_size: int | None = None, **model_args):
        """model_args: see `Arguments`. Raises StateKVError for one that cannot work, and for a model that cannot run."""
        super().__init__()
        arguments = parse_arguments(model_args)
        require_decoder(arguments.decoder)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and arguments.device in ('auto', 'cuda') and torch.cuda.is_available():
            arguments = replace(arguments, device=f'cuda:{self.accelerator.local_process_index}')
        self.arguments, self.unanswered = arguments, 0
        self._backbone = arguments.load()
        self.device = self._backbone.device
        self._watched: tuple[str, object] = '', None        # a video, and the memory of it
        if warning := demonstration_warning(self._backbone, 'set pretrained'):
            logger.warning(warning)

    def loglikelihood(self, requests):
        raise ParameterError(f'task {requests[0].task_name} scores given texts by their likelihood, and a memory only answers: '
                             'choose a task whose output_type is generate_until')

    def generate_until_multi_round(self, requests):
        raise ParameterError(f'task {requests[0].task_name} has several rounds, which the harness has for simple models alone: '
                             'add --force_simple')

    def clean(self) -> None:
        """Let go of the model, once the harness has all answers."""
        self._backbone, self._watched = None, ('', None)
        super().clean()

    def answers(self, requests: Sequence[Request]) -> list[GenerationResult]:
        """An answer for each; '' where there is none. Videos are taken in the order in which they first come.

        Raises:
            EvaluationError: not one of their videos can be opened.
        """
        begun = time.perf_counter()
        found: dict[int, Answer] = {}
        videos = self._open({request.video for request in requests})
        with tqdm(total=len(requests), desc='StateKV', disable=self._rank != 0) as bar:
            for numbers in self._batches(requests):
                some = [requests[number] for number in numbers]
                found |= zip(numbers, self._of_one_video(videos.get(some[0].video), some))
                bar.update(len(numbers))
        self._tell(found.values(), time.perf_counter() - begun)
        return [GenerationResult(found[number].text, TokenCounts(output_tokens=found[number].tokens))
                for number in range(len(requests))]

    def _open(self, paths: set[str]) -> dict[str, VideoFile]:
        """Those that can be opened. All are, before the first is watched, for what is wrong should be known then."""
        videos, errors = {}, []
        for path in sorted(paths):
            try:
                videos[path] = DECODERS[self.arguments.decoder](path)
            except BagError as error:
                errors.append(str(error))
                logger.error(f'{error}; its questions get no answer')
        if errors and not videos:
            raise EvaluationError(f'none of {len(paths)} videos can be read: {errors[0]}')
        return videos

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Numbers of requests that are asked together, video by video."""
        by_video: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_video.setdefault(request.video, []).append(number)
        size = self.arguments.batch_size if self.arguments.reuse_video else 1
        return [numbers[first:first + size] for numbers in by_video.values() for first in range(0, len(numbers), size)]

    def _of_one_video(self, video: VideoFile | None, requests: Sequence[Request]) -> list[Answer]:
        if video is None:
            return self._none(requests)
        try:
            memory = self._watch(video)
        except (BagError, FrameError) as error:
            logger.error(f'{error}; its questions get no answer')
            return self._none(requests)
        try:
            return ask(memory, requests, self.arguments.seed)
        except QuestionError as error:
            if len(requests) > 1:       # whose it was
                return [self._of_one_video(video, [request])[0] for request in requests]
            logger.error(f'{requests[0].place}: {error}')
            return self._none(requests)

    def _none(self, requests: Sequence[Request]) -> list[Answer]:
        self.unanswered += len(requests)
        return [_NO_ANSWER] * len(requests)

    def _watch(self, video: VideoFile):
        """The memory of a video, from its first frame to its last."""
        if self.arguments.reuse_video and self._watched[0] == video.path:
            return self._watched[1]
        self._watched = '', None        # one at a time: it takes memory
        memory = self.arguments.make_memory(self._backbone)
        for stamp_ns, frame in video.read(frame_indices(video.frames, video.rate_hz, self.arguments.fps,
                                                        self.arguments.max_frames)):
            memory.step(frame, stamp_ns)
        self._watched = video.path, memory
        return memory

    def _tell(self, answers: Sequence[Answer], seconds: float) -> None:
        tokens = sum(answer.tokens for answer in answers)
        if self.unanswered:
            logger.error(f'{self.unanswered} questions have no answer; the harness counts them as wrong, so its scores are too '
                         'low: see the lines above')
        log_metrics(seconds, tokens, tokens / max(seconds, 1e-9), {'rank': self._rank, 'unanswered': self.unanswered})


class ChatModel(StateKV):
    """What the harness takes, unless it is told `--force_simple`."""
    is_simple = False

    def generate_until(self, requests) -> list[GenerationResult]:
        def read(instance) -> Request:
            _, doc_to_messages, generation, doc_id, task, split = instance.args
            return from_messages(doc_to_messages(self.task_dict[task][split][doc_id]), f'{task}, document {doc_id}', generation)
        return self.answers(read_all(requests, read))


class SimpleModel(StateKV):
    """What the harness takes with `--force_simple`: the same, and tasks of several rounds."""
    is_simple = True

    def generate_until(self, requests) -> list[GenerationResult]:
        def read(instance) -> Request:
            text, generation, doc_to_visual, doc_id, task, split = instance.args
            return from_visuals(doc_to_visual(self.task_dict[task][split][doc_id]), text, f'{task}, document {doc_id}',
                                generation)
        return self.answers(read_all(requests, read))
