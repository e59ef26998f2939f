"""What a configuration computes on a GPU, run once before the first image: kernels are compiled, libraries make their plans."""
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from statekv_ros.backbones.base import Backbone
from statekv_ros.errors import QuestionError
from statekv_ros.kernels import fitness
from statekv_ros.kernels import page_votes as votes
from statekv_ros.kernels import paged_attention as paged
from statekv_ros.kernels import scored_attention as scored
from statekv_ros.kernels.page_votes.variants import run_variants as run_vote_variants
from statekv_ros.kernels.scored_attention.variants import run_variants
from statekv_ros.memory.detailed.cache import EXACT_STEPS
from statekv_ros.memory.detailed.index import DEFAULT_INDEX, INDEXES
from statekv_ros.memory.detailed.leaves import CHAPTER, LEAF, VOLUME
from statekv_ros.memory.detailed.table import ENTRY_DTYPE
from statekv_ros.memory.policies import UNLIMITED, PrefillPolicy
from statekv_ros.memory.stream import VideoStream

OPERATIONS = (scored.OPERATION, paged.OPERATION, votes.OPERATION)
# An answer's kernel is compiled apart for a question and for a token, for one page and for many, for pages that are turned.
_ANSWERS = ('all', 'sparse(64)', 'sparse(256)', 'retrieve(2)')
_MOST_STATE = 16384     # tokens; larger ones run the same code


@dataclass(frozen=True)
class WarmUp:
    """What came of it.

    Attributes:
        variants: of the kernels of the frame step, and of votes on pages, that were run, in words; empty where there are none.
        steps, answers: of a stream of its own that was watched and asked.
        problems: why an operation has no kernel here.
    """
    seconds: float
    variants: tuple[str, ...]
    steps: int
    answers: int
    problems: tuple[str, ...]

    def __str__(self) -> str:
        """One line for the log."""
        kernels = '; '.join(self.problems) or f'{len(self.variants)} runs of the frame step\'s and the index\'s kernels'
        return f'warmed up in {self.seconds:.1f} s: {kernels}; {self.steps} frame steps, {self.answers} answers'


def warm_up(backbone: Backbone, policy: PrefillPolicy, frame_size: tuple[int, int], positions: str = '',
            detailed_format: str = '', cameras: int = 1) -> WarmUp | None:
    """Compile and run each kernel variant that this configuration needs, and a few steps and answers; None on a CPU, which has
    nothing to compile.

    A kernel that cannot be built is no error: its naive twin runs instead, and the result says why. Kernels that failed before
    are tried again.

    Args:
        frame_size: height and width of the camera images to expect.
        positions, detailed_format: as a `VideoStream` takes them.
        cameras: streams that there will be.

    Raises:
        Exception: what the stream or the device raises: memory that is full, say.
    """
    if backbone.device.type != 'cuda':
        return None
    begun = time.perf_counter()
    fitness.forget_failures()
    variants = []
    for operation, run in ((scored.OPERATION, lambda: _run_steps_kernels(backbone, policy, frame_size, cameras)),
                           (votes.OPERATION, lambda: _run_votes_kernels(backbone))):
        if not fitness.problem(operation, backbone.device):
            variants += _tried(operation, backbone.device, run)
    steps, answers = _watch_and_ask(backbone, policy, frame_size, positions, detailed_format)
    torch.cuda.synchronize(backbone.device)
    return WarmUp(time.perf_counter() - begun, tuple(variants), steps, answers, problems(backbone.device))


def problems(device: torch.device) -> tuple[str, ...]:
    """Why operations of this package have no kernel on a device."""
    found = {operation: fitness.problem(operation, device) for operation in OPERATIONS}
    return tuple(f'attention is many times slower than it could be ({operation} without its Triton kernel): {reason}'
                 for operation, reason in found.items() if reason)


def _run_steps_kernels(backbone: Backbone, policy: PrefillPolicy, frame_size: tuple[int, int], cameras: int) -> list[str]:
    layout, step_tokens = backbone.layout, backbone.size(*frame_size).step_tokens
    state = min(policy.budget, _MOST_STATE) if policy.kind == 'statekv' and policy.budget < UNLIMITED else step_tokens
    queries = [tokens for tokens in (backbone.prefix().tokens, step_tokens) if tokens]
    return run_variants(backbone.q_heads, layout.kv_heads, layout.head_dim, layout.dtype, layout.device, queries, state,
                        cameras > 1)


def _run_votes_kernels(backbone: Backbone) -> list[str]:
    """Through leaves as well, which no memory has before hours have passed."""
    layout, index = backbone.layout, INDEXES[DEFAULT_INDEX]
    return run_vote_variants(layout.kv_heads, index.entry_width(layout.head_dim), LEAF, VOLUME * CHAPTER, ENTRY_DTYPE,
                             layout.device)


def _tried(operation: str, device: torch.device, run: Callable[[], list[str]]) -> list[str]:
    """What was run; nothing where a kernel cannot be built, which is noted."""
    try:
        return run()
    except Exception as error:  # compilers, assemblers, drivers and loaders raise many kinds
        if fitness.is_the_callers(error):
            raise
        fitness.note_failure(operation, device, error)
        return []


def _watch_and_ask(backbone: Backbone, policy: PrefillPolicy, frame_size: tuple[int, int], positions: str,
                   detailed_format: str) -> tuple[int, int]:
    """Steps past those that stay exact, so that pages are packed; answers after the first, of few pages, and after the last."""
    options = {'detailed_format': detailed_format} if detailed_format else {}
    stream = VideoStream(backbone, policy, positions=positions, cuda_graph='off', **options)
    frame, answers = np.full((*backbone.frame_size(*frame_size), 3), 127, np.uint8), 0
    for step in range(EXACT_STEPS + 2):
        for index in range(backbone.frames_per_step):
            stream.step(frame, (step * backbone.frames_per_step + index + 1) * 10**9)
        if step in (0, EXACT_STEPS + 1):
            for answer_policy in _ANSWERS:
                try:
                    stream.answer('What is in view?', answer_policy=answer_policy, max_tokens=2)
                except QuestionError:   # a short trained context may have no room for it
                    continue
                answers += 1
    return stream.steps, answers
