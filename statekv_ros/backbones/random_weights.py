"""A published checkpoint's architecture with random weights: for measuring what a step costs. What it says means nothing."""
import torch
from transformers import AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from statekv_ros.backbones import FAMILIES
from statekv_ros.backbones.base import Backbone
from statekv_ros.backbones.checkpoint import Checkpoint
from statekv_ros.backbones.published import PUBLISHED
from statekv_ros.backbones.tiny import tiny_tokenizer
from statekv_ros.errors import ModelError

_NOISE = 2**20


def random_backbone(name: str, device: str | torch.device = 'cpu', dtype: torch.dtype = torch.bfloat16,
                    layers: int | None = None, max_frame_pixels: int = 448 * 448) -> Backbone:
    """Build a row of `PUBLISHED` on a device, its weights one block of noise again and again: drawing billions of numbers
    would take longer than to measure with them.

    The tokenizer is the tiny checkpoints', which splits a step's text into as many tokens as the true one, give or take two.

    Args:
        name: one of `PUBLISHED`.
        layers: of the text model and of the vision tower, and the vocabulary cut to the tokenizer's; None for all of it.

    Raises:
        ModelError: no such name, or it does not fit into memory.
    """
    if name not in PUBLISHED:
        raise ModelError(f'random weights are for published models, got {name!r}: take one of {", ".join(PUBLISHED)}')
    row, tokenizer = PUBLISHED[name], tiny_tokenizer()
    config = row.config(layers, layers, len(tokenizer)) if layers else row.config()
    try:
        with no_init_weights(), torch.device(device):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval().requires_grad_(False)
        model.tie_weights()  # building without initial values leaves that out
        _fill(model)
    except torch.OutOfMemoryError as error:
        raise ModelError(f'{name} in {dtype} does not fit into the memory of {device}: take a smaller model, or fewer '
                         'layers') from error
    return FAMILIES[row.family](Checkpoint(name, model, tokenizer, frozenset(), {}), max_frame_pixels, 64 * 64, '', 0)


def _fill(model: torch.nn.Module) -> None:
    """Norms become 1, biases 0, matrices noise."""
    noise = 0.02 * torch.randn(_NOISE, generator=torch.Generator().manual_seed(0))
    for key, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(key.endswith('weight'))
        else:
            noise = noise.to(weight)
            for piece in weight.view(-1).split(_NOISE):
                piece.copy_(noise[:piece.numel()])
