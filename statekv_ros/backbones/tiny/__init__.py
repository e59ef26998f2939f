"""Tiny checkpoints with random weights from a fixed seed: the real architectures and a real tokenizer, for tests, benchmarks
and first steps. What such a model says means nothing."""
import json
from pathlib import Path

from safetensors.torch import save_file

from statekv_ros.backbones.tiny.models import tiny_model
from statekv_ros.backbones.tiny.tokenizer import tiny_tokenizer

__all__ = ['tiny_model', 'tiny_tokenizer', 'write_tiny_checkpoint']


def write_tiny_checkpoint(folder: str | Path, seed: int = 0, family: str = 'qwen3_vl', **widths) -> Path:
    """Write a checkpoint directory (config.json, model.safetensors, tokenizer); `widths` as in `models.tiny_model`."""
    folder = Path(folder)
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, seed, family, **widths)
    if family == 'eagle2_5':
        _write_as_published(model, folder)
    else:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _write_as_published(model, folder: Path) -> None:
    """Eagle2.5 as its publisher lays it out: tensor names of an older SigLIP, and a config that names remote code."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name.replace('vision_model.', 'vision_model.vision_model.', 1) if name.startswith('vision_model.') else name:
               tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    config = model.config.to_dict()
    config.update(architectures=['Eagle2_5_VLForConditionalGeneration'], auto_map={
        'AutoConfig': 'configuration_eagle2_5_vl.Eagle2_5_VLConfig',
        'AutoModel': 'modeling_eagle2_5_vl.Eagle2_5_VLForConditionalGeneration'})
    config['vision_config'].pop('vision_use_head')
    (folder / 'config.json').write_text(json.dumps(config, indent=2))
