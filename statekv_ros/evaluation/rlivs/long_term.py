"""The long-term memory: captions with their time span, and which of them a question is given to read."""
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from statekv_ros.backbones.family import Family
from statekv_ros.memory.intake import PendingFrames

SEPARATOR = ' .'


@dataclass(frozen=True)
class Caption:
    """One clip in words.

    Attributes:
        frames: camera frames of the clip; first_stamp_ns, last_stamp_ns: header stamps of its first and last, in ns.
        token_ids: the words as they are read to answer, at most as many as a caption may have.
        embedding: mean of their token embeddings, scaled to length 1, [hidden] fp32; zeros for no words.
    """
    text: str
    frames: int
    first_stamp_ns: int
    last_stamp_ns: int
    token_ids: array
    embedding: torch.Tensor

    @property
    def bytes(self) -> int:
        return self.embedding.nbytes + len(self.token_ids) * self.token_ids.itemsize + len(self.text.encode())


def make_caption(backbone: Family, text: str, clip: PendingFrames, max_tokens: int) -> Caption:
    """Caption `text` of a clip, cut to `max_tokens` tokens where it is read again."""
    # With a space before it a first word is the same token as in the midst of a text.
    token_ids = backbone.tokenize_text(f' {text}')[:max_tokens] if text else []
    return Caption(text, len(clip), clip.stamps_ns[0], clip.stamps_ns[-1], array('i', token_ids),
                   mean_embedding(backbone, token_ids))


@torch.inference_mode()
def mean_embedding(backbone: Family, token_ids: Sequence[int]) -> torch.Tensor:
    """Mean of the model's input embeddings of these tokens, scaled to length 1, [hidden] fp32; zeros for none."""
    embeds = backbone.embed(token_ids, 0).embeds[0].float()
    return normalize(embeds.sum(dim=0), dim=0)


def retrieve(captions: Sequence[Caption], question: torch.Tensor, mmr_lambda: float, room: int,
             separator: int) -> list[Caption]:
    """The captions to read, in time order: all where they fit, else by maximal marginal relevance until one does not fit.

    Each choice is the caption with the greatest `mmr_lambda` x cosine to the question - (1 - `mmr_lambda`) x greatest cosine
    to those chosen before (Carbonell and Goldstein 1998); ties by earlier caption.

    Args:
        question: its mean embedding, [hidden] of length 1.
        room: tokens for captions and the separators between them.
        separator: tokens of a separator.
    """
    if sum(len(caption.token_ids) + separator for caption in captions) - separator <= room:
        return [*captions]
    embeddings = torch.stack([caption.embedding for caption in captions])
    relevance = embeddings @ question
    redundancy: torch.Tensor | None = None
    chosen: list[int] = []
    left = room + separator
    while len(chosen) < len(captions):
        score = mmr_lambda * relevance
        if redundancy is not None:
            score = score - (1 - mmr_lambda) * redundancy
            score[chosen] = float('-inf')
        best = int(score.argsort(descending=True, stable=True)[0])
        left -= len(captions[best].token_ids) + separator
        if left < 0:
            break
        chosen.append(best)
        alike = embeddings @ embeddings[best]
        redundancy = alike if redundancy is None else torch.maximum(redundancy, alike)
    return [captions[index] for index in sorted(chosen)]
