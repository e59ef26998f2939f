"""How well a patrol model answers about videos that it never saw, with full attention: `python -m statekv_ros.patrol.heldout MODEL`.

All answers of a batch come from one packed forward, whose numbers are those of the streaming engine (the tests compare them).
"""
import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from statekv_ros.patrol.forward import forward
from statekv_ros.patrol.packing import IGNORED, QUESTION_TOKENS, Batch, Packer
from statekv_ros.patrol.pictures import PictureBank
from statekv_ros.patrol.questions import KINDS, Question, answer_at, ask, pick_step
from statekv_ros.patrol.world import Patrol, make_patrol

SEED = 10**6              # far from any training seed
_TOKENS_AT_ONCE = 12_000


def ask_all(steps: int, random: np.random.Generator, hard: bool = True) -> tuple[Patrol, list[tuple[Question, int] | None]]:
    """A patrol with one question of each kind, in KINDS' order, and the step it is asked at: the last one but for `now` and
    `again`, which choose a moment with something to see. None where a kind has no well-defined question."""
    patrol, asked = make_patrol(steps, random), []
    for kind in KINDS:
        step = pick_step(patrol, kind, random, late=True)
        question = ask(patrol, kind, step, random, hard)
        asked.append(None if question is None else (question, step))
    return patrol, asked


@torch.inference_mode()
def measure(model: Qwen3VLForConditionalGeneration, packer: Packer, steps: int, per_kind: int, seed: int = SEED) -> dict:
    """Share of answers that are right to the last word, over at least `per_kind` questions of each kind.

    Returns:
        kind -> {'n', 'right', 'chance'}; chance is the share of the most frequent true answer.
    """
    random = np.random.default_rng([seed, steps])
    rows = max(1, _TOKENS_AT_ONCE // (9 * steps + len(KINDS) * QUESTION_TOKENS))
    right, answers = Counter(), defaultdict(Counter)
    with tqdm(total=per_kind * len(KINDS), unit='question', desc=f'{steps} steps', mininterval=5) as bar:
        while any(answers[kind].total() < per_kind for kind in KINDS):
            videos = [ask_all(steps, random) for _ in range(rows)]
            batch = packer.asked_batch(videos, random)
            hidden, _ = forward(model, batch, packer.bank.pixels(batch.pictures).to(model.dtype))
            correct = _correct(model, batch, hidden)
            for row, (patrol, asked) in enumerate(videos):
                for place, pair in enumerate(asked):
                    if pair is not None and answers[KINDS[place]].total() < per_kind:
                        answers[KINDS[place]][answer_at(patrol, *pair)] += 1
                        right[KINDS[place]] += bool(correct[row, place])
            bar.update(sum(counter.total() for counter in answers.values()) - bar.n)
    return {kind: {'n': (n := answers[kind].total()), 'right': right[kind] / n,
                   'chance': answers[kind].most_common(1)[0][1] / n} for kind in KINDS}


def _correct(model: Qwen3VLForConditionalGeneration, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
    """[rows, questions] bool: every token of the answer, its end included, is the most likely one."""
    behind = slice(batch.context_tokens, batch.context_tokens + batch.questions * QUESTION_TOKENS)
    labels = batch.labels[:, behind]
    told = labels != IGNORED
    best = F.linear(hidden[:, behind][told], model.model.language_model.embed_tokens.weight).argmax(-1)
    wrong = torch.zeros(labels.shape, dtype=torch.bool)
    wrong[told] = best != labels[told]
    return ~wrong.view(len(labels), batch.questions, QUESTION_TOKENS).any(-1)


def main(argv: list[str] | None = None) -> int:
    """Print a table as JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('model', type=Path, help='checkpoint directory')
    parser.add_argument('--steps', type=int, nargs='+', default=[32, 64])
    parser.add_argument('--per-kind', type=int, default=1000)
    parser.add_argument('--pictures', type=int, default=60, help='fresh renders of each object and door')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--threads', type=int, default=0)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = Qwen3VLForConditionalGeneration.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    packer = Packer(AutoTokenizer.from_pretrained(args.model), PictureBank(SEED, args.pictures))
    print(json.dumps({steps: measure(model, packer, steps, args.per_kind) for steps in args.steps}, indent=1))
    return 0


if __name__ == '__main__':
    sys.exit(main())
