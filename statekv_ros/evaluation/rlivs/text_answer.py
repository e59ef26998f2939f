"""An answer from captions: text in, text out, and the clips whose captions it looked at."""
import time
from collections.abc import Callable, Sequence

import torch

from statekv_ros.backbones.family import Family
from statekv_ros.errors import QuestionError
from statekv_ros.evaluation.rlivs.long_term import SEPARATOR, Caption, mean_embedding, retrieve
from statekv_ros.evaluation.rlivs.options import Options
from statekv_ros.evaluation.rlivs.telling import Telling
from statekv_ros.memory.records import AnswerResult, Evidence


@torch.inference_mode()
def answer_from_captions(backbone: Family, captions: Sequence[Caption], question: str, max_tokens: int, evidence: int,
                         options: Options, cancelled: Callable[[], bool], begun: float) -> AnswerResult:
    """Answer from the retrieved captions, joined by ' . ' in time order, with the question behind them.

    Args:
        begun: `time.perf_counter()` when the question came.

    Raises:
        QuestionError: the question leaves no room for a caption in the model's trained context.
        Interrupted: `cancelled` said so.
    """
    before, after = backbone.text_turn()
    # The space keeps the question's first word apart from the captions' last.
    words = backbone.tokenize_text(f' {question.strip()}')
    separator = backbone.tokenize_text(SEPARATOR)
    room = min(options.context_tokens, backbone.max_position - len(before) - len(words) - len(after) - max_tokens)
    if room < options.max_caption_tokens:
        raise QuestionError(f'question has {len(words)} tokens and may be answered with {max_tokens}, which leaves no room '
                            f'for a caption of {options.max_caption_tokens} in the {backbone.max_position} positions of model '
                            f'{backbone.name!r}: shorten it or lower max_tokens')
    chosen = retrieve(captions, mean_embedding(backbone, words), options.mmr_lambda, room, len(separator))
    telling = Telling(backbone, cancelled)
    context, spans = [*before], []
    for index, caption in enumerate(chosen):
        context += separator if index else []
        spans.append((len(context), len(context) + len(caption.token_ids)))
        context += caption.token_ids
    telling.read_ids(context + words + after[:-1])
    prefill_ms = (time.perf_counter() - begun) * 1e3

    told: list[int] = []
    token, finish_reason, first_token_ms = after[-1], '', 0.0
    while not finish_reason:
        token = telling.next(token)
        told.append(token)
        first_token_ms = first_token_ms or (time.perf_counter() - begun) * 1e3
        if token in backbone.stop_token_ids:
            finish_reason = 'stop'
        elif len(told) >= max_tokens:
            finish_reason = 'length'
    return AnswerResult(
        question=question, text=backbone.decode([i for i in told if i not in backbone.stop_token_ids]),
        token_ids=tuple(told), finish_reason=finish_reason, first_stamp_ns=chosen[0].first_stamp_ns,
        last_stamp_ns=chosen[-1].last_stamp_ns, frames_covered=sum(caption.frames for caption in chosen),
        evidence=_evidence(chosen, [telling.attention[a:b].double().sum().item() for a, b in spans], evidence),
        question_tokens=len(words) + len(after), answer_tokens=len(told), context_tokens=len(context) - len(before),
        prefill_ms=prefill_ms, first_token_ms=first_token_ms,
        decode_ms=(time.perf_counter() - begun) * 1e3 - prefill_ms, prefill_policy=options.policy,
        answer_policy='captions', demonstration_model=bool(backbone.demonstration))


def _evidence(captions: Sequence[Caption], mass: list[float], limit: int) -> tuple[Evidence, ...]:
    """Clips whose captions were attended to most, greatest share first; separators, chat text and question left out."""
    total = sum(mass)
    best = sorted(range(len(mass)), key=lambda i: -mass[i])[:max(0, limit)]
    return tuple(Evidence(captions[i].first_stamp_ns, captions[i].last_stamp_ns, mass[i] / total)
                 for i in best if mass[i] > 0)
