"""A bank of rendered steps, so that training draws pictures from memory instead of rendering each one."""
import numpy as np
import torch

from statekv_ros.backbones.patches import patchify
from statekv_ros.backbones.pixels import HALF, PixelSpec
from statekv_ros.patrol.architecture import MERGE, PATCH
from statekv_ros.patrol.render import MODEL_SIZE, render
from statekv_ros.patrol.world import COLOURS, SHAPES, Step, View

_SPEC = PixelSpec(PATCH, MERGE, 2, MODEL_SIZE**2, MODEL_SIZE**2, **HALF)
_NARROWEST = .7       # a 4:3 picture in a square is squeezed to .75
_CELLS = MODEL_SIZE // (PATCH * MERGE)


class PictureBank:
    """Renders `each` pictures of every object and door, and 8 times as many of the empty corridor.

    Attributes:
        steps: what each picture shows.
        patches: uint8 [pictures, 16 patches, 3 x 2 x 16 x 16], in the order of `backbones.patches.patchify`.
    """

    def __init__(self, seed: int, each: int):
        random = np.random.default_rng(seed)
        self._each = each
        things = [Step(View.OBJECT, shape, colour, 0, 0) for shape in range(len(SHAPES)) for colour in range(len(COLOURS))]
        things += [Step(View.DOOR, 0, colour, 0, 0) for colour in range(len(COLOURS))]
        shown = [step for step in things for _ in range(each)]
        self._empty = len(shown)
        self.steps = shown
        shown += [Step(View.EMPTY, 0, 0, -1, 0)] * (8 * each)
        self.patches = np.stack([self._patches(render(step, random, squeeze=random.uniform(_NARROWEST, 1.05)))
                                 for step in shown])

    def pick(self, step: Step, random: np.random.Generator) -> int:
        """Index of a picture of what the step shows."""
        if step.view == View.EMPTY:
            return self._empty + int(random.integers(8 * self._each))
        thing = step.shape * len(COLOURS) if step.view == View.OBJECT else len(SHAPES) * len(COLOURS)
        return (thing + step.colour) * self._each + int(random.integers(self._each))

    def draw(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Indices of `count` pictures, each thing equally often, the empty corridor as often as 8 things."""
        return random.integers(0, len(self.steps), count)

    def pixels(self, pictures: np.ndarray) -> torch.Tensor:
        """Normalised patches of pictures, fp32 [pictures, 16, 1536]."""
        return torch.from_numpy(self.patches[pictures]).float().mul_(1 / 127.5).sub_(1)

    def varied_pixels(self, pictures: np.ndarray, random: np.random.Generator, dtype: torch.dtype) -> torch.Tensor:
        """As `pixels`, with random gain, tint and mirroring."""
        patches = torch.from_numpy(self.patches[pictures]).to(dtype)
        count = len(pictures)
        gain = torch.from_numpy(random.uniform(.9, 1.1, (count, 1, 1)) / 127.5).to(dtype)
        tint = torch.from_numpy(random.uniform(-.06, .06, (count, 1, 3, 1)) - 1).to(dtype)
        patches = (patches * gain).view(count, patches.shape[1], 3, -1).add_(tint).view(patches.shape)
        half = random.permutation(count)[:count // 2]
        #            rows    columns  row in cell, column in cell, colour, frame, y, x
        cells = patches[half].view(-1, _CELLS, _CELLS, MERGE, MERGE, 3, 2, PATCH, PATCH)
        patches[half] = cells.flip(2, 4, 8).reshape(-1, *patches.shape[1:])
        return patches

    @staticmethod
    def _patches(frames: np.ndarray) -> np.ndarray:
        # patchify normalises to -1..1; the bank keeps bytes, an eighth of the size.
        return np.round((patchify(torch.from_numpy(frames), _SPEC).numpy() + 1) * 127.5).astype(np.uint8)
