"""A tiny Qwen3-VL checkpoint with random weights from a fixed seed: the real architecture and a real tokenizer, for tests,
benchmarks and first steps. What it says means nothing."""
import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

SPECIAL_TOKENS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>', '<|image_pad|>',
                  '<|video_pad|>')
_CORPUS = 'where did you last see the red toolbox? is the door open? <0.5 seconds> user assistant system yes no'


def tiny_tokenizer(vocabulary: int = 600) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's special tokens, trained on one sentence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([_CORPUS] * 50, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<|im_end|>', pad_token='<|endoftext|>')


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, layers: int = 3, hidden: int = 64, q_heads: int = 4,
               kv_heads: int = 2, head_dim: int = 32, mlp: int = 128, vision_depth: int = 3, vision_hidden: int = 32,
               patch: int = 16, contrast: float = 3.0) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL of the given widths with random weights.

    Args:
        contrast: weight of the query and key norms. At 1 a random model attends to everything alike; a few times more
            gives attention with peaks, as trained models have.
    """
    torch.manual_seed(seed)
    token = tokenizer.convert_tokens_to_ids
    axis = head_dim // 6
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
            num_attention_heads=q_heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=262144,
            rope_parameters=dict(rope_type='default', rope_theta=5e6, mrope_interleaved=True,
                                 mrope_section=[head_dim // 2 - 2 * axis, axis, axis]),
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id),
        vision_config=dict(
            depth=vision_depth, hidden_size=vision_hidden, intermediate_size=2 * vision_hidden, num_heads=2,
            patch_size=patch, temporal_patch_size=2, spatial_merge_size=2, out_hidden_size=hidden,
            num_position_embeddings=64, deepstack_visual_indexes=list(range(min(2, vision_depth)))),
        image_token_id=token('<|image_pad|>'), video_token_id=token('<|video_pad|>'),
        vision_start_token_id=token('<|vision_start|>'), vision_end_token_id=token('<|vision_end|>'),
        tie_word_embeddings=True)
    model = Qwen3VLForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith(('q_norm.weight', 'k_norm.weight')):
            weight.data.fill_(contrast)
    return model


def write_tiny_checkpoint(folder: str | Path, seed: int = 0, **widths) -> Path:
    """Write a checkpoint directory (config.json, model.safetensors, tokenizer); `widths` as in `tiny_model`."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, seed, **widths)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def main() -> None:
    """`statekv-tiny-model FOLDER`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', help='directory to write the checkpoint to')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--layers', type=int, default=3)
    parser.add_argument('--hidden', type=int, default=64)
    parser.add_argument('--vision-depth', type=int, default=3)
    options = vars(parser.parse_args())
    print(write_tiny_checkpoint(**options))


if __name__ == '__main__':
    main()
