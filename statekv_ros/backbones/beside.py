"""Frame steps of several streams as the rows of one, so that they go through a model in one pass."""
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn.functional import pad

from statekv_ros.backbones.base import StagedStep, TokenInputs


class Beside:
    """Steps on the host whose frames have one size, a row for each.

    The text of rows may differ by some tokens, for it counts frames or seconds. What is shorter before the visual tokens is
    padded on its left, what is shorter behind them on its right: the visual tokens of all rows stand in the same columns. Padding
    has no part in attention (its caller's matter), and all else that a language model does it does to each token by itself.

    Attributes:
        step: all of them; next_position and start are the first one's.
        columns: where a row's own tokens are, row by row.
    """

    def __init__(self, steps: Sequence[StagedStep]):
        self._steps = tuple(steps)
        before = max(step.visual_start for step in steps)
        behind = max(step.token_ids.shape[1] - step.visual_start for step in steps)
        self.columns = [slice(before - step.visual_start, before - step.visual_start + step.tokens) for step in steps]
        tokens = before + steps[0].visual_tokens + behind
        padding = [(columns.start, tokens - columns.stop) for columns in self.columns]
        self.step = replace(
            steps[0], frames=torch.cat([step.frames for step in steps]), visual_start=before,
            token_ids=torch.cat([pad(step.token_ids, sides) for step, sides in zip(steps, padding)]),
            positions=torch.cat([pad(step.positions, sides) for step, sides in zip(steps, padding)], dim=-2))

    def rows(self, inputs: TokenInputs) -> list[TokenInputs]:
        """What the backbone made of `step` as if each had been alone, without `extra`."""
        return [TokenInputs(inputs.embeds[row, None, columns], inputs.positions[..., row, None, columns], step.next_position,
                            step.start, step.visual_start, step.visual_tokens)
                for row, (step, columns) in enumerate(zip(self._steps, self.columns))]

    def moved(self, inputs: TokenInputs, rows: Sequence[TokenInputs]) -> TokenInputs:
        """All of them once more, at the positions that `rows` have by now."""
        positions = inputs.positions.clone()
        for row, (moved, columns) in enumerate(zip(rows, self.columns)):
            positions[..., row, columns] = moved.positions[..., 0, :]
        return replace(inputs, positions=positions)
