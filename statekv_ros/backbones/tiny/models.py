"""One small model with random weights per family; the library's own classes, but for Eagle2.5, which it has not."""
import torch
from transformers import (InternVLConfig, InternVLForConditionalGeneration, LlavaOnevisionConfig,
                          LlavaOnevisionForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerBase,
                          Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig,
                          Qwen3VLForConditionalGeneration)

from statekv_ros.backbones.eagle2_5_model import Eagle2_5Config, Eagle2_5ForConditionalGeneration


def qwen3_vl(tokenizer: PreTrainedTokenizerBase, layers: int = 3, hidden: int = 64, q_heads: int = 4, kv_heads: int = 2,
             head_dim: int = 32, mlp: int = 128, vision_depth: int = 3, vision_hidden: int = 32, patch: int = 16,
             max_position: int = 262144) -> Qwen3VLForConditionalGeneration:
    axis = head_dim // 6
    text = _text(tokenizer, layers, hidden, q_heads, kv_heads, mlp, max_position, head_dim=head_dim, rope_parameters=dict(
        rope_type='default', rope_theta=5e6, mrope_interleaved=True,
        mrope_section=[head_dim // 2 - 2 * axis, axis, axis]))
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=text, **_vision_tokens(tokenizer), tie_word_embeddings=True,
        vision_config=dict(
            depth=vision_depth, hidden_size=vision_hidden, intermediate_size=2 * vision_hidden, num_heads=2,
            patch_size=patch, temporal_patch_size=2, spatial_merge_size=2, out_hidden_size=hidden,
            num_position_embeddings=64, deepstack_visual_indexes=list(range(min(2, vision_depth))))))


def qwen2_5_vl(tokenizer: PreTrainedTokenizerBase, layers: int = 3, hidden: int = 64, q_heads: int = 4, kv_heads: int = 2,
               mlp: int = 128, vision_depth: int = 2, vision_hidden: int = 32, patch: int = 8,
               max_position: int = 128000) -> Qwen2_5_VLForConditionalGeneration:
    half = hidden // q_heads // 2
    axis = 3 * half // 8
    text = _text(tokenizer, layers, hidden, q_heads, kv_heads, mlp, max_position, rope_parameters=dict(
        rope_type='default', rope_theta=1e6, mrope_section=[half - 2 * axis, axis, axis]))
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, **_vision_tokens(tokenizer), tie_word_embeddings=False,
        vision_config=dict(
            depth=vision_depth, hidden_size=vision_hidden, intermediate_size=2 * vision_hidden, num_heads=2,
            patch_size=patch, temporal_patch_size=2, spatial_merge_size=2, out_hidden_size=hidden, tokens_per_second=2,
            window_size=4 * patch, fullatt_block_indexes=[vision_depth - 1])))


def internvl(tokenizer: PreTrainedTokenizerBase, layers: int = 3, hidden: int = 64, q_heads: int = 4, kv_heads: int = 2,
             mlp: int = 128, vision_depth: int = 2, vision_hidden: int = 32, patch: int = 8, image: int = 64,
             max_position: int = 32768) -> InternVLForConditionalGeneration:
    text = _text(tokenizer, layers, hidden, q_heads, kv_heads, mlp, max_position, model_type='qwen2',
                 rope_parameters=dict(rope_type='dynamic', factor=2.0, rope_theta=1e6))
    return InternVLForConditionalGeneration(InternVLConfig(
        text_config=text, image_token_id=tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>'), tie_word_embeddings=False,
        image_seq_length=(image // patch // 2) ** 2, downsample_ratio=0.5,
        vision_config=dict(hidden_size=vision_hidden, num_hidden_layers=vision_depth, num_attention_heads=2,
                           intermediate_size=2 * vision_hidden, image_size=[image, image], patch_size=[patch, patch])))


def llava_onevision(tokenizer: PreTrainedTokenizerBase, layers: int = 3, hidden: int = 64, q_heads: int = 4,
                    kv_heads: int = 2, mlp: int = 128, vision_depth: int = 2, vision_hidden: int = 32, patch: int = 8,
                    image: int = 56, max_position: int = 32768) -> LlavaOnevisionForConditionalGeneration:
    text = _text(tokenizer, layers, hidden, q_heads, kv_heads, mlp, max_position, model_type='qwen2',
                 rope_parameters=dict(rope_type='default', rope_theta=1e6))
    return LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(
        text_config=text, image_token_index=tokenizer.convert_tokens_to_ids('<image>'), tie_word_embeddings=False,
        video_token_index=tokenizer.convert_tokens_to_ids('<video>'), image_grid_pinpoints=[[image, image]],
        vision_feature_layer=-1, vision_feature_select_strategy='full',
        vision_config=_siglip(vision_depth, vision_hidden, image, patch)))


def eagle2_5(tokenizer: PreTrainedTokenizerBase, layers: int = 3, hidden: int = 64, q_heads: int = 4, kv_heads: int = 2,
             mlp: int = 128, vision_depth: int = 2, vision_hidden: int = 32, patch: int = 8, image: int = 64,
             max_position: int = 32768, **connector) -> Eagle2_5ForConditionalGeneration:
    text = _text(tokenizer, layers, hidden, q_heads, kv_heads, mlp, max_position, model_type='qwen2',
                 rope_parameters=dict(rope_type='default', rope_theta=1e6))
    return Eagle2_5ForConditionalGeneration(Eagle2_5Config(
        text_config=text, vision_config=_siglip(vision_depth, vision_hidden, image, patch), force_image_size=image,
        image_token_index=tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>'), **{'select_layer': -1, **connector}))


BUILDERS = {'qwen3_vl': qwen3_vl, 'qwen2_5_vl': qwen2_5_vl, 'internvl': internvl, 'llava_onevision': llava_onevision,
            'eagle2_5': eagle2_5}


def tiny_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0, family: str = 'qwen3_vl', contrast: float = 3.0,
               **widths) -> PreTrainedModel:
    """A model of a family with random weights.

    Args:
        family: one of `BUILDERS`.
        contrast: standard deviation of the queries and keys, about. At 1 a random model attends to everything alike; a few
            times more gives attention with peaks, as trained models have.
        widths: keyword arguments of the family's builder.
    """
    torch.manual_seed(seed)
    model = BUILDERS[family](tokenizer, **widths).eval()
    for name, weight in model.named_parameters():
        part = name.removesuffix('.weight').rsplit('.', 1)[-1]
        if 'language_model' not in name:
            if family != 'qwen3_vl' and weight.ndim > 1:
                weight.data.mul_(5)  # else the features of two different frames are nearly the same
        elif part in ('q_norm', 'k_norm'):
            weight.data.fill_(contrast)
        elif part in ('q_proj', 'k_proj') and family != 'qwen3_vl':
            weight.data.normal_(std=contrast * weight.shape[-1] ** -0.5)
    if family == 'llava_onevision':
        torch.nn.init.normal_(model.model.image_newline)
    return model


def _text(tokenizer: PreTrainedTokenizerBase, layers: int, hidden: int, q_heads: int, kv_heads: int, mlp: int,
          max_position: int, **more) -> dict:
    return dict(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
                num_attention_heads=q_heads, num_key_value_heads=kv_heads, max_position_embeddings=max_position,
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **more)


def _vision_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {f'{name}_token_id': tokenizer.convert_tokens_to_ids(token) for name, token in (
        ('image', '<|image_pad|>'), ('video', '<|video_pad|>'), ('vision_start', '<|vision_start|>'),
        ('vision_end', '<|vision_end|>'))}


def _siglip(depth: int, hidden: int, image: int, patch: int) -> dict:
    return dict(model_type='siglip_vision_model', hidden_size=hidden, num_hidden_layers=depth, num_attention_heads=2,
                intermediate_size=2 * hidden, image_size=image, patch_size=patch, vision_use_head=False)
