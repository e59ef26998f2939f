"""Published checkpoints of the families: their exact shapes, without their weights.

One row per checkpoint, with the numbers of the config.json at its hub id as far as they decide shapes, positions and the
computation. `source` says what the row was checked against.
"""
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from statekv_ros.backbones.eagle2_5_model import Eagle2_5Config
from statekv_ros.backbones.pixels import PixelSpec
from statekv_ros.backbones.size import ModelSize
from statekv_ros.backbones.weights import AS_STORED, planned_bytes, planned_layer_bytes, unpacked_bytes


@dataclass(frozen=True)
class PublishedModel:
    """One checkpoint.

    Attributes:
        hub_id: where it is published.
        family: model_type of its config.json.
        text, vision: fields of its text_config and vision_config.
        source: what these were checked against.
        more: further fields of its config.json.
    """
    hub_id: str
    family: str
    text: dict[str, Any]
    vision: dict[str, Any]
    source: str
    more: dict[str, Any] = field(default_factory=dict)

    def config(self, layers: int | None = None, vision_layers: int | None = None,
               vocabulary: int | None = None) -> PretrainedConfig:
        """The library's config, with fewer layers or tokens where a number is given; all other widths stay true."""
        text, vision = dict(self.text), dict(self.vision)
        if layers:
            text['num_hidden_layers'] = layers
        if vocabulary:
            text['vocab_size'] = vocabulary
        if vision_layers:
            vision['depth' if 'depth' in vision else 'num_hidden_layers'] = vision_layers
            if 'deepstack_visual_indexes' in vision:
                vision['deepstack_visual_indexes'] = list(range(vision_layers))[:3]
            if 'fullatt_block_indexes' in vision:
                vision['fullatt_block_indexes'] = [vision_layers - 1]
        return AutoConfig.for_model(self.family, text_config=text, vision_config=vision, **self.more)

    def parameters(self) -> int:
        """Weights of the whole model, tied ones once; takes no memory for them."""
        return sum(weight.numel() for weight in self._skeleton().parameters())

    def step_tokens(self, height: int, width: int, max_frame_pixels: int, min_frame_pixels: int) -> int:
        """Tokens of one frame step for camera frames of this size in pixels, visual and text."""
        visual = self.vision
        if 'spatial_merge_size' in visual or 'temporal_patch_size' in visual:
            spec = PixelSpec(visual['patch_size'], visual['spatial_merge_size'], visual['temporal_patch_size'],
                             min_frame_pixels, max_frame_pixels)
            tall, wide = spec.frame_size(height, width)
            return tall * wide // spec.factor ** 2 + _STEP_TEXT_TOKENS[self.family]
        size, patch = (v[0] if isinstance(v, (list, tuple)) else v for v in (visual['image_size'], visual['patch_size']))
        return math.ceil(size // patch / 2) ** 2 + _STEP_TEXT_TOKENS[self.family]

    def size(self, height: int, width: int, max_frame_pixels: int = 448 * 448, min_frame_pixels: int = 64 * 64,
             bytes_per_value: int = 2, weights: str = AS_STORED) -> ModelSize:
        """The sizes that memory depends on, from the config alone. Weights in few bits are laid out as on a GPU."""
        text, dtype, gpu = self.text, torch.bfloat16 if bytes_per_value == 2 else torch.float32, torch.device('cuda')
        model = self._skeleton()
        return ModelSize(
            self.hub_id, planned_bytes(model, weights, dtype, gpu), text['num_hidden_layers'], text['num_key_value_heads'],
            text['num_attention_heads'], self.head_dim, text['hidden_size'], text['intermediate_size'], text['vocab_size'],
            bytes_per_value, self.step_tokens(height, width, max_frame_pixels, min_frame_pixels),
            self.vision.get('temporal_patch_size', 1), 3 if 'mrope_section' in self.text['rope_parameters'] else 1,
            planned_layer_bytes(model, weights, dtype, gpu), unpacked_bytes(model, weights, dtype))

    def _skeleton(self) -> torch.nn.Module:
        with torch.device('meta'):
            return AutoModelForImageTextToText.from_config(self.config())

    @property
    def head_dim(self) -> int:
        return self.text.get('head_dim') or self.text['hidden_size'] // self.text['num_attention_heads']

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of one token's keys and values over all layers; 2 bytes per value are fp16 and bf16."""
        return 2 * self.text['num_hidden_layers'] * self.text['num_key_value_heads'] * self.head_dim * bytes_per_value


# Text of a step with the families' tokenizers, for two-digit frame numbers and times; see each family's module.
_STEP_TEXT_TOKENS = {'qwen3_vl': 9, 'qwen2_5_vl': 0, 'internvl': 8, 'llava_onevision': 0, Eagle2_5Config.model_type: 15}


def _text(hidden: int, layers: int, q_heads: int, kv_heads: int, mlp: int, vocabulary: int, positions: int, rope: dict,
          **more) -> dict[str, Any]:
    return dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=q_heads, num_key_value_heads=kv_heads,
                intermediate_size=mlp, vocab_size=vocabulary, max_position_embeddings=positions, rms_norm_eps=1e-6,
                rope_parameters=rope, **more)


def _qwen2(hidden: int, layers: int, q_heads: int, kv_heads: int, mlp: int, vocabulary: int, rope: dict) -> dict[str, Any]:
    return _text(hidden, layers, q_heads, kv_heads, mlp, vocabulary, 32768, rope, model_type='qwen2')


_ROPE = dict(rope_type='default', rope_theta=1e6)
_ROPE_INTERNVL = dict(rope_type='dynamic', factor=2.0, rope_theta=1e6)
_ROPE_QWEN2_5_VL = dict(rope_type='default', rope_theta=1e6, mrope_section=[16, 24, 24])
_ROPE_QWEN3_VL = dict(rope_type='default', rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True)

_QWEN_TOKENS = dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)
_QWEN_PATCHES = dict(in_channels=3, num_heads=16, temporal_patch_size=2, spatial_merge_size=2)
_QWEN3_VISION = dict(**_QWEN_PATCHES, patch_size=16, num_position_embeddings=2304, hidden_act='gelu_pytorch_tanh')
_QWEN3_VISION_S = dict(**_QWEN3_VISION, depth=24, hidden_size=1024, intermediate_size=4096,
                       deepstack_visual_indexes=[5, 11, 17])
_QWEN3_VISION_L = dict(**_QWEN3_VISION, depth=27, hidden_size=1152, intermediate_size=4304,
                       deepstack_visual_indexes=[8, 16, 24])
_INTERN_VIT_300M = dict(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=[448, 448],
    patch_size=[14, 14], attention_bias=True, use_qk_norm=False, norm_type='layer_norm', hidden_act='gelu',
    layer_scale_init_value=0.1, use_mean_pooling=True)
_INTERNVL = dict(image_token_id=151667, image_seq_length=256, downsample_ratio=0.5, projector_hidden_act='gelu',
                 vision_feature_layer=-1, vision_feature_select_strategy='default', tie_word_embeddings=False)
_SIGLIP_SO400M = dict(model_type='siglip_vision_model', hidden_size=1152, num_attention_heads=16, intermediate_size=4304,
                      patch_size=14, num_channels=3, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6,
                      vision_use_head=False)
_LLAVA_ONEVISION = dict(
    image_token_index=151646, video_token_index=151647, projector_hidden_act='gelu', vision_feature_layer=-1,
    vision_feature_select_strategy='full', vision_aspect_ratio='anyres_max_9')

_WHOLE = 'its config.json, quoted whole in public repositories'
PUBLISHED = {
    'Qwen3-VL-2B': PublishedModel(
        'Qwen/Qwen3-VL-2B-Instruct', 'qwen3_vl',
        _text(2048, 28, 16, 8, 6144, 151936, 262144, _ROPE_QWEN3_VL, head_dim=128),
        dict(**_QWEN3_VISION_S, out_hidden_size=2048), _WHOLE, dict(**_QWEN_TOKENS, tie_word_embeddings=True)),
    'Qwen3-VL-4B': PublishedModel(
        'Qwen/Qwen3-VL-4B-Instruct', 'qwen3_vl',
        _text(2560, 36, 32, 8, 9728, 151936, 262144, _ROPE_QWEN3_VL, head_dim=128),
        dict(**_QWEN3_VISION_S, out_hidden_size=2560), _WHOLE, dict(**_QWEN_TOKENS, tie_word_embeddings=True)),
    'Qwen3-VL-8B': PublishedModel(
        'Qwen/Qwen3-VL-8B-Instruct', 'qwen3_vl',
        _text(4096, 36, 32, 8, 12288, 151936, 262144, _ROPE_QWEN3_VL, head_dim=128),
        dict(**_QWEN3_VISION_L, out_hidden_size=4096), _WHOLE, dict(**_QWEN_TOKENS, tie_word_embeddings=False)),
    'InternVL3-1B': PublishedModel(
        'OpenGVLab/InternVL3-1B-hf', 'internvl', _qwen2(896, 24, 14, 2, 4864, 151674, _ROPE_INTERNVL), _INTERN_VIT_300M,
        'text and RoPE: the config.json of OpenGVLab/InternVL3-1B quoted in public repositories; vision: a public port of '
        'the -hf checkpoint', _INTERNVL),
    'InternVL3-2B': PublishedModel(
        'OpenGVLab/InternVL3-2B-hf', 'internvl', _qwen2(1536, 28, 12, 2, 8960, 151674, _ROPE_INTERNVL), _INTERN_VIT_300M,
        'text widths quoted in a public runtime\'s tests, MLP that of Qwen2.5-1.5B; vision and RoPE as InternVL3-1B',
        _INTERNVL),
    'InternVL3-8B': PublishedModel(
        'OpenGVLab/InternVL3-8B-hf', 'internvl', _qwen2(3584, 28, 28, 4, 18944, 151674, _ROPE_INTERNVL), _INTERN_VIT_300M,
        'vocabulary and token ids quoted in public issues, text widths those of Qwen2.5-7B; vision and RoPE as InternVL3-1B',
        _INTERNVL),
    'Eagle2.5-8B': PublishedModel(
        'nvidia/Eagle2.5-8B', Eagle2_5Config.model_type, _qwen2(3584, 28, 28, 4, 18944, 152064, _ROPE),
        dict(**_SIGLIP_SO400M, num_hidden_layers=27, image_size=448),
        'parts as its paper names them (SigLIP2-SO400M, Qwen2.5-7B), layout and projector from its publisher\'s training '
        'code; select_layer, vocabulary and token id not checked',
        dict(image_token_index=151667, select_layer=-1, force_image_size=448, downsample_ratio=0.5, use_pixel_shuffle=True,
             mlp_connector_layers=2)),
    'LLaVA-OneVision-0.5B': PublishedModel(
        'llava-hf/llava-onevision-qwen2-0.5b-ov-hf', 'llava_onevision', _qwen2(896, 24, 14, 2, 4864, 152000, _ROPE),
        dict(**_SIGLIP_SO400M, num_hidden_layers=26, image_size=384),
        'token ids and vision settings from the library and public code, widths those of Qwen2-0.5B and SigLIP-SO400M-384; '
        'vocabulary not checked', dict(**_LLAVA_ONEVISION, tie_word_embeddings=True)),
    'LLaVA-OneVision-7B': PublishedModel(
        'llava-hf/llava-onevision-qwen2-7b-ov-hf', 'llava_onevision', _qwen2(3584, 28, 28, 4, 18944, 152128, _ROPE),
        dict(**_SIGLIP_SO400M, num_hidden_layers=26, image_size=384),
        'token ids and vision settings from the library and public code, widths those of Qwen2-7B and SigLIP-SO400M-384; '
        'vocabulary not checked', dict(**_LLAVA_ONEVISION, tie_word_embeddings=False)),
    'Qwen2.5-VL-7B': PublishedModel(
        'Qwen/Qwen2.5-VL-7B-Instruct', 'qwen2_5_vl',
        _text(3584, 28, 28, 4, 18944, 152064, 128000, _ROPE_QWEN2_5_VL),
        dict(**_QWEN_PATCHES, depth=32, hidden_size=1280, intermediate_size=3420, out_hidden_size=3584, patch_size=14,
             window_size=112, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2, hidden_act='silu'),
        _WHOLE, dict(**_QWEN_TOKENS, tie_word_embeddings=False)),
}
