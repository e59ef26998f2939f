"""InternVL (the `-hf` checkpoints of InternVL3): one frame a step.

A step is 'Frame1: <img>', 256 visual tokens at 448x448, '</img>\\n': what the library's processor and chat template write
for a video. The wrapper of StateKV's released evaluation is the same without 'Frame1: ' (256 + 3 tokens). No system
prompt unless the user gives one. The checkpoints carry dynamic-NTK RoPE: see `rope.freeze_rope`.
"""
from collections.abc import Sequence

from statekv_ros.backbones.checkpoint import Checkpoint
from statekv_ros.backbones.pixels import OPENAI_CLIP
from statekv_ros.backbones.square_frames import SquareFrames


class InternVL(SquareFrames):
    """Adapter around `InternVLForConditionalGeneration`."""
    special_tokens = ('<|im_start|>', '<|im_end|>', '<img>', '</img>')
    pixel_defaults = OPENAI_CLIP

    def __init__(self, checkpoint: Checkpoint, max_frame_pixels: int, min_frame_pixels: int, system_prompt: str,
                 rope_length: int):
        model, config = checkpoint.model, checkpoint.model.config
        size, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
        super().__init__(checkpoint, size, int(size // patch * config.downsample_ratio), model.model.language_model,
                         model.lm_head, system_prompt, rope_length)

    def _step_text(self, number: int, seconds: Sequence[float]) -> tuple[str, str]:
        return f'Frame{number}: <img>', '</img>\n'
