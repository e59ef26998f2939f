"""Eagle2.5: one frame a step, 'Frame 1 sample at 0.00s: <img>', 256 visual tokens at 448x448, '</img>'.

The video opens with 'The first video: ', which is what the checkpoint's processor writes where the frame rate is unknown, as
it is in a live stream; one tile per frame, as that processor has it for videos. The system prompt is 'You are a helpful
assistant.' unless the user gives another. The model is assembled in `eagle2_5_model.py`.
"""
from collections.abc import Sequence

import torch

from statekv_ros.backbones.checkpoint import Checkpoint
from statekv_ros.backbones.pixels import HALF
from statekv_ros.backbones.square_frames import SquareFrames


class Eagle2_5(SquareFrames):
    """Adapter around `Eagle2_5ForConditionalGeneration`."""
    default_system = 'You are a helpful assistant.'
    before_video = '<|im_start|>user\nThe first video:'
    special_tokens = ('<|im_start|>', '<|im_end|>', '<img>', '</img>')
    pixel_defaults = HALF

    def __init__(self, checkpoint: Checkpoint, max_frame_pixels: int, min_frame_pixels: int, system_prompt: str,
                 rope_length: int):
        model = checkpoint.model
        super().__init__(checkpoint, model.config.image_size, model.config.visual_side, model.language_model.model,
                         model.language_model.lm_head, system_prompt, rope_length)

    def _step_text(self, number: int, seconds: Sequence[float]) -> tuple[str, str]:
        # The space before the first frame's text makes one token with it, so it cannot stay with the text before the video.
        return f'{" " if number == 1 else ""}Frame {number} sample at {seconds[0]:.2f}s: <img>', '</img>'

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._model.visual_tokens(pixels)
