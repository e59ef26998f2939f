"""The patrol model: a real Qwen3-VL of about 3.3 million parameters."""
import math

import torch
from transformers import PreTrainedTokenizerBase, Qwen3VLConfig, Qwen3VLForConditionalGeneration

PATCH, MERGE = 16, 2
MAX_POSITION = 1024        # what training reaches often: 64 steps of 7 positions, and random gaps between them


def make_model(tokenizer: PreTrainedTokenizerBase, seed: int, layers: int = 5, hidden: int = 192, q_heads: int = 4,
               kv_heads: int = 2, head_dim: int = 64, mlp: int = 448, vision_depth: int = 2, vision_hidden: int = 128,
               vision_heads: int = 4) -> Qwen3VLForConditionalGeneration:
    """A model with fresh weights: fp32, tied embeddings, one DeepStack level.

    seed: of the random weights, which are scaled to the widths (the library's 0.02 is small for narrow layers).
    """
    axis = head_dim // 6
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (
        ('image_token_id', '<|image_pad|>'), ('video_token_id', '<|video_pad|>'),
        ('vision_start_token_id', '<|vision_start|>'), ('vision_end_token_id', '<|vision_end|>'))}
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
            num_attention_heads=q_heads, num_key_value_heads=kv_heads, head_dim=head_dim,
            max_position_embeddings=MAX_POSITION, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
            rope_parameters=dict(rope_type='default', rope_theta=5e6, mrope_interleaved=True,
                                 mrope_section=[head_dim // 2 - 2 * axis, axis, axis])),
        vision_config=dict(
            depth=vision_depth, hidden_size=vision_hidden, intermediate_size=2 * vision_hidden, num_heads=vision_heads,
            patch_size=PATCH, temporal_patch_size=2, spatial_merge_size=MERGE, out_hidden_size=hidden,
            num_position_embeddings=16, deepstack_visual_indexes=[0]),
        tie_word_embeddings=True, **ids))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and 'embed' not in name:
                weight.normal_(0, 1 / math.sqrt(weight[0].numel()))
            if name.endswith(('o_proj.weight', 'down_proj.weight', 'attn.proj.weight', 'mlp.linear_fc2.weight')):
                weight.mul_(1 / math.sqrt(2 * layers))
        model.model.language_model.embed_tokens.weight.normal_(0, .1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model
