"""Where keys and values of past steps lie: chunks, the steps in them, and stretches of them that an answer reads."""
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from statekv_ros.memory.records import StepRecord


@dataclass
class Chunk:
    """A piece of the detailed cache that is allocated and forgotten as one; filled from its front, never changed behind.

    Attributes:
        key, value: [layers, kv_heads, capacity, head_dim].
        used: tokens in use.
        records: its steps, one behind the other.
        shift: keys stand at their true positions less this.
        means: a step's keys before rotation, averaged over its tokens: [steps, layers, kv_heads, head_dim] fp32.
    """
    key: torch.Tensor
    value: torch.Tensor
    used: int = 0
    records: list[StepRecord] = field(default_factory=list)
    shift: int = 0
    means: torch.Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.key.shape[2]


@dataclass(frozen=True)
class Block:
    """One frame step where it lies: the `number`-th step of `chunk`, from token `start` on."""
    chunk: Chunk
    number: int
    start: int
    record: StepRecord

    @property
    def end(self) -> int:
        return self.start + self.record.tokens


@dataclass(frozen=True)
class MemoryView:
    """Keys and values that an answer reads, without a copy where it can be avoided.

    Attributes:
        key, value: [layers, kv_heads, tokens, head_dim].
        ordinal: stream index of each token, [tokens] int64, or [layers, kv_heads, tokens] where heads hold different ones.
        position: true position of its first token.
        shift: how far left of their true positions its keys stand; None: where the carried context has them.
    """
    key: torch.Tensor
    value: torch.Tensor
    ordinal: torch.Tensor
    position: int = 0
    shift: int | None = None


@dataclass(frozen=True)
class Run:
    """Blocks of one chunk that lie side by side, from `first` to `last`."""
    first: Block
    last: Block

    def view(self) -> MemoryView:
        chunk, record, tokens = self.first.chunk, self.first.record, slice(self.first.start, self.last.end)
        # Ordinals within a chunk are consecutive: steps are appended in stream order.
        ordinals = torch.arange(tokens.stop - tokens.start, device=chunk.key.device) + record.first_ordinal
        return MemoryView(chunk.key[:, :, tokens], chunk.value[:, :, tokens], ordinals, record.position, chunk.shift)


def runs(blocks: Sequence[Block], seamless: bool = False) -> list[Run]:
    """As few runs as hold all blocks; if `seamless`, none has a position between two of its steps."""
    found: list[Run] = []
    for block in blocks:
        last = found[-1].last if found else None
        if last is not None and last.chunk is block.chunk and last.end == block.start and (
                not seamless or last.record.next_position == block.record.position):
            found[-1] = Run(found[-1].first, block)
        else:
            found.append(Run(block, block))
    return found
