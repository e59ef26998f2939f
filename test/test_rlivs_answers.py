"""rLiVS: retrieval of captions and answers from them, against plain definitions."""
import math
from array import array

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from rlivs_definition import (QUESTION, TEXTS, backbone, contents, definitions, frames, memory_of, stamp,  # noqa: F401
                              written)
from statekv_ros.errors import QuestionError
from statekv_ros.evaluation.rlivs.long_term import Caption, retrieve


def captions_of(embeddings: np.ndarray, lengths: list[int]) -> list[Caption]:
    return [Caption('', 1, i + 1, i + 1, array('i', [7] * length), torch.nn.functional.normalize(torch.tensor(row), dim=0))
            for i, (row, length) in enumerate(zip(embeddings.astype(np.float32), lengths))]


def mmr(captions: list[Caption], question, weight: float, room: int, separator: int) -> list[int]:
    """Maximal marginal relevance by its definition, in Python numbers."""
    def cosine(a, b):
        return math.fsum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)

    vectors, chosen, used = [caption.embedding.tolist() for caption in captions], [], 0
    while len(chosen) < len(captions):
        value = {i: weight * cosine(vectors[i], question)
                 - (1 - weight) * max((cosine(vectors[i], vectors[j]) for j in chosen), default=0)
                 for i in range(len(captions)) if i not in chosen}
        best = max(value, key=value.get)
        used += len(captions[best].token_ids) + (separator if chosen else 0)
        if used > room:
            break
        chosen.append(best)
    return sorted(chosen)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([0., .3, .5, .7, 1.]), st.integers(5, 60),
       st.integers(0, 2))
def test_retrieval_equals_the_definition_of_mmr(seed, count, weight, room, separator):
    random = np.random.default_rng(seed)
    captions = captions_of(random.normal(size=(count, 6)), random.integers(0, 6, count).tolist())
    question = torch.nn.functional.normalize(torch.from_numpy(random.normal(size=6).astype(np.float32)), dim=0)
    found = [caption.first_stamp_ns - 1 for caption in retrieve(captions, question, weight, room, separator)]
    total = sum(len(caption.token_ids) for caption in captions) + separator * (count - 1)
    if weight == 0 and total > room:  # every caption is as good a first choice as any: the earliest
        assert found[0] == 0 or found == []
    assert found == (list(range(count)) if total <= room else mmr(captions, question.tolist(), weight, room, separator))



@pytest.mark.parametrize('model', ['tiny', 'patrol'])
@torch.inference_mode()
def test_an_answer_is_the_librarys_answer_to_the_captions_as_text(model, definitions):
    definition = definitions[model]
    pieces = [definition.ids(text) for text in ('<|im_start|>user\n', *(f' {text}' for text in TEXTS), ' .')]
    ids = definition.ids(f'<|im_start|>user\n {" . ".join(TEXTS)} {QUESTION}<|im_end|>\n<|im_start|>assistant\n')
    answer = written(definition.backbone, *TEXTS).answer(QUESTION, max_tokens=6, evidence=9)
    told = definition.greedy([definition.text(ids, 0)], len(ids), 6)
    assert list(answer.token_ids)[:len(told)] == told and answer.answer_tokens - len(told) == (answer.finish_reason == 'stop')
    assert len(pieces[0]) + answer.context_tokens + answer.question_tokens == len(ids)
    assert (answer.first_stamp_ns, answer.last_stamp_ns, answer.frames_covered) == (stamp(0), stamp(15), 16)
    assert (answer.prefill_policy, answer.answer_policy) == ('rlivs', 'captions')

    read = definition.text([*ids, *answer.token_ids[:-1]], 0)
    attention = torch.stack(definition.forward([read], output_attentions=True).attentions)[:, 0]
    mass, start = [], len(pieces[0])
    for piece in pieces[1:-1]:  # of what was read where a token of the answer was told
        mass.append(attention[:, :, len(ids) - 1:, start:start + len(piece)].sum().item())
        start += len(piece) + len(pieces[-1])
    best = sorted(range(4), key=lambda i: -mass[i])
    assert [(e.first_stamp_ns, e.last_stamp_ns) for e in answer.evidence] == [(stamp(4 * i), stamp(4 * i + 3)) for i in best]
    assert [e.share for e in answer.evidence] == pytest.approx([mass[i] / sum(mass) for i in best], abs=1e-5)


def test_a_full_context_leaves_captions_out_and_says_so(backbone):
    texts = [f'{i} red door , {i + 1} green ball' for i in range(20)]
    answer = written(backbone, *texts, context_tokens=60).answer(QUESTION, max_tokens=2, evidence=99)
    assert answer.context_tokens <= 60 and 0 < answer.frames_covered < 80
    assert len(answer.evidence) == answer.frames_covered // 4


def test_a_span_cuts_the_memory(backbone, frames):
    memory = memory_of(backbone, frames, 18)
    answer = memory.answer(QUESTION, max_tokens=2, span=(stamp(3), stamp(11)))
    assert (answer.first_stamp_ns, answer.last_stamp_ns, answer.frames_covered) == (stamp(4), stamp(11), 8)
    with pytest.raises(QuestionError, match='no clip between'):
        memory.answer(QUESTION, span=(stamp(1), stamp(5)))


def test_a_question_within_a_clip_sees_it_and_leaves_no_trace(backbone, frames):
    quiet, asked = memory_of(backbone, frames, 21), memory_of(backbone, frames, 0)
    for index in range(21):
        asked.step(frames[index], stamp(index))
        answer = asked.answer(QUESTION, max_tokens=3)
        assert (answer.frames_covered, answer.last_stamp_ns) == (index + 1, stamp(index))
    assert contents(quiet) == contents(asked) and quiet.frames == asked.frames == 21
    assert quiet.flush().frames == 1 and quiet.flush() is None
    assert quiet.answer(QUESTION, max_tokens=3).token_ids == answer.token_ids
    assert contents(quiet) != contents(asked)
