"""InternVL (the `-hf` checkpoints of InternVL3): one frame a step.

A step is 'Frame1: <img>', 256 visual tokens at 448x448, '</img>\\n': what the library's processor and chat template write
for a video. No system prompt unless the user gives one. The checkpoints carry dynamic-NTK RoPE: see `rope.freeze_rope`.

The layout of StateKV's released evaluation is `ReleasedInternVL`. It begins with the first frame: '<img>', 256 visual tokens,
'</img>\\n', 259 in all and none that counts frames. The chat template follows behind the video, system prompt included, with the
question: that of the checkpoints' tokenizer, whose system prompt is the language model's own unless the user gives another.
"""
from collections.abc import Sequence

from statekv_ros.backbones.checkpoint import Checkpoint
from statekv_ros.backbones.pixels import IMAGENET
from statekv_ros.backbones.square_frames import SquareFrames


class InternVL(SquareFrames):
    """Adapter around `InternVLForConditionalGeneration`."""
    special_tokens = ('<|im_start|>', '<|im_end|>', '<img>', '</img>')
    pixel_defaults = IMAGENET

    def __init__(self, checkpoint: Checkpoint, max_frame_pixels: int, min_frame_pixels: int, system_prompt: str,
                 rope_length: int):
        model, config = checkpoint.model, checkpoint.model.config
        size, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
        super().__init__(checkpoint, size, int(size // patch * config.downsample_ratio), model.model.language_model,
                         model.lm_head, system_prompt, rope_length)

    def _step_text(self, number: int, seconds: Sequence[float]) -> tuple[str, str]:
        return f'Frame{number}: <img>', '</img>\n'


class ReleasedInternVL(InternVL):
    """The same model in the layout of StateKV's released evaluation."""
    default_system = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.'

    def __init__(self, checkpoint: Checkpoint, max_frame_pixels: int, min_frame_pixels: int, system_prompt: str,
                 rope_length: int):
        super().__init__(checkpoint, max_frame_pixels, min_frame_pixels, system_prompt, rope_length)
        self.after_video, self._prefix_ids = self._system_text + self.before_video, []

    def _step_text(self, number: int, seconds: Sequence[float]) -> tuple[str, str]:
        return '<img>', '</img>\n'
