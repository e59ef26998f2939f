"""Model families: `load_backbone` picks the adapter from the checkpoint's config."""
import statekv_ros.quiet  # noqa: F401, before Transformers is imported
from statekv_ros.imports import nothing_collected

with nothing_collected():
    from statekv_ros.backbones.base import AttentionMemory, Backbone, KVLayout, TokenInputs
    from statekv_ros.backbones.checkpoint import load_checkpoint, read_advice, read_config
    from statekv_ros.backbones.checks import as_model_error
    from statekv_ros.backbones.eagle2_5 import Eagle2_5
    from statekv_ros.backbones.eagle2_5_model import Eagle2_5Config
    from statekv_ros.backbones.internvl import InternVL, ReleasedInternVL
    from statekv_ros.backbones.llava_onevision import LlavaOnevision
    from statekv_ros.backbones.qwen2_5_vl import Qwen2_5VL
    from statekv_ros.backbones.qwen3_vl import Qwen3VL

from statekv_ros.errors import ModelError, ParameterError

__all__ = ['AttentionMemory', 'Backbone', 'KVLayout', 'TokenInputs', 'load_backbone']

# By the model_type in the checkpoint's config.json.
FAMILIES = {
    'qwen3_vl': Qwen3VL,
    'qwen2_5_vl': Qwen2_5VL,
    'internvl': InternVL,
    'llava_onevision': LlavaOnevision,
    Eagle2_5Config.model_type: Eagle2_5,
}
# Of those that StateKV's released evaluation runs.
RELEASED = {'internvl': ReleasedInternVL}
LAYOUTS = ('model', 'released')


def load_backbone(model: str, device: str = 'auto', dtype: str = 'auto', max_frame_pixels: int = 0,
                  min_frame_pixels: int = 0, system_prompt: str = '', rope_length: int = 0,
                  weights: str = 'auto', layout: str = 'model') -> Backbone:
    """Load a frozen video VLM.

    Args:
        model: directory in Transformers' format, hub id, or 'patrol', the small model that the package brings along.
        device: 'auto', 'cpu', 'cuda' or 'cuda:<n>'.
        dtype: 'auto', 'float32', 'bfloat16' or 'float16'.
        max_frame_pixels, min_frame_pixels: bounds on height x width of a frame as the model sees it; they set the number
            of tokens per step; 0 takes the checkpoint's own (`checkpoint.Advice`). Families with frames of one size
            (InternVL, LLaVA-OneVision, Eagle2.5) need no bounds.
        system_prompt: text before the video; when empty, what the family's chat template has (often none).
        rope_length: positions that the RoPE of a dynamic-NTK checkpoint (InternVL3) is scaled for, once and for all; 0
            leaves it as trained.
        weights: 'auto' or 'as_stored'; 'int8' or 'int4' quantises the language model's matrices, of a checkpoint that has them
            in 16 or 32 bits, with torchao.
        layout: text around the frames and the question: 'model', as the family's own processor writes it, or 'released', as
            StateKV's released evaluation does, for a family that it runs.

    Raises:
        ModelError: the checkpoint is missing, broken or of a family that cannot watch video here, or a package that its format
            needs is missing.
        ParameterError: `weights` that are unknown, or cannot be had of this checkpoint or on this machine; a `layout` that is
            unknown, or not this family's.
    """
    if layout not in LAYOUTS:
        raise ParameterError(f'layout must be one of {", ".join(LAYOUTS)}, got {layout!r}')
    advice = read_advice(model)
    min_frame_pixels = min_frame_pixels or advice.min_frame_pixels
    max_frame_pixels = max_frame_pixels or advice.max_frame_pixels
    if not 0 < min_frame_pixels <= max_frame_pixels:
        raise ModelError(f'min_frame_pixels and max_frame_pixels must be positive and in order, got {min_frame_pixels} '
                         f'and {max_frame_pixels} for model {model!r}: set these parameters, or mend its statekv.json')
    family = read_config(model).model_type
    if family not in FAMILIES:
        raise ModelError(f'model {model!r} is of type {family!r}, which has no video support here; supported types: '
                         f'{", ".join(sorted(FAMILIES))}')
    adapters = RELEASED if layout == 'released' else FAMILIES
    if family not in adapters:
        raise ParameterError(f'layout "released" is known of {", ".join(RELEASED)} alone, which is all that the released evaluation '
                             f'of StateKV runs, but model {model!r} is of type {family!r}: take the layout "model"')
    checkpoint = load_checkpoint(model, device, dtype, weights)
    with as_model_error(f'model {model!r} does not fit its family {family} (config.json, tokenizer_config.json)'):
        return adapters[family](checkpoint, max_frame_pixels, min_frame_pixels, system_prompt, rope_length)
