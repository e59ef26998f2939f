"""The next token of answers, found where the logits are: what the host gets to know of it is one number each."""
from collections.abc import Sequence

import torch

# Below it the most likely token has all the probability anyway, and logits divided by it may overflow.
_GREEDY_BELOW = 1e-6
NOT_FINITE = -1     # in place of a token: the most likely of such logits would mean nothing


class Sampling:
    """How one answer's tokens are found: the most likely one, or by chance with a seed of its own."""

    def __init__(self, temperature: float, seed: int, device: torch.device):
        self._temperature = temperature
        self.is_greedy = temperature < _GREEDY_BELOW
        if not self.is_greedy:      # only a GPU has a generator of its own
            self._random = torch.Generator(device if device.type == 'cuda' else 'cpu').manual_seed(seed % 2**63)

    def token(self, logits: torch.Tensor) -> torch.Tensor:
        """One by chance of logits [vocabulary], int64 []; the host waits for nothing, as it would in `torch.multinomial`."""
        chances = torch.softmax(logits.float() / self._temperature, dim=-1)
        # The first of exponential clocks to ring, each as fast as its token is likely.
        return (chances / torch.empty_like(chances).exponential_(generator=self._random)).argmax(dim=-1)


def next_tokens(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """A token for each row of logits [rows, vocabulary], or `NOT_FINITE`; [rows] int64 where the logits are."""
    best, tokens = logits.max(dim=-1)       # NaN goes through max
    for row, sampling in enumerate(samplings):
        if not sampling.is_greedy:
            tokens[row] = sampling.token(logits[row])
    return torch.where(best.isfinite(), tokens, NOT_FINITE)
