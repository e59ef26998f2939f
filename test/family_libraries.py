"""The library's own model and prompt of each family, as the reference that streaming is compared with.

Prompts come from the library's processors (the part that needs no torchvision), pixels from its PIL image processors.
"""
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from transformers import (AutoModelForImageTextToText, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig,
                          SiglipVisionModel)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

QUESTION = 'where did you last see the red toolbox?'
TURN = '<|im_end|>\n<|im_start|>assistant\n'
ASSISTANT = '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n'


class Library:
    """Prompt, pixels and forward pass of the library's own classes for one family."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation='sdpa').eval()

    def forward(self, pictures):
        """Token ids [1, tokens] of the whole prompt with QUESTION, pictures at 2 frames/s, and the model's output."""
        raise NotImplementedError

    def ids(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, return_tensors='pt').input_ids

    def token(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)


class QwenLibrary(Library):
    def patches(self, pictures):
        """Patches of pairs of frames, from the library's patches of single ones, and their grid."""
        vision = self.model.config.vision_config
        processor = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size, size={'shortest_edge': 64 * 64, 'longest_edge': 448 * 448}, **self.statistics)
        single = [processor(images=[picture], return_tensors='pt') for picture in pictures]
        single += single[-1:] * (len(single) % 2)
        _, height, width = single[0]['image_grid_thw'][0].tolist()
        split = [s['pixel_values'].reshape(height * width, 3, 2, -1) for s in single]
        pairs = [torch.stack([a[:, :, 0], b[:, :, 0]], dim=2).reshape(height * width, -1)
                 for a, b in zip(split[::2], split[1::2])]
        return torch.cat(pairs), torch.tensor([[len(pairs), height, width]])

    def forward(self, pictures, **inputs):
        patches, grid = self.patches(pictures)
        ids = self.ids(self.prompt(pictures, grid))
        kinds = (ids == self.token('<|video_pad|>')).int() * 2
        return ids, self.model(input_ids=ids, pixel_values_videos=patches, video_grid_thw=grid, mm_token_type_ids=kinds,
                               use_cache=True, **inputs, **self.more(ids, grid, kinds))


class Qwen3VL(QwenLibrary):
    statistics = dict(image_mean=[.5] * 3, image_std=[.5] * 3)

    def prompt(self, pictures, grid):
        processor = SimpleNamespace(
            video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2), vision_start_token='<|vision_start|>',
            vision_end_token='<|vision_end|>', video_token='<|video_pad|>',
            _calculate_timestamps=lambda *a: Qwen3VLProcessor._calculate_timestamps(None, *a))
        times = SimpleNamespace(fps=2, frames_indices=[*range(len(pictures))])
        video = Qwen3VLProcessor.replace_video_token(
            processor, {'video_grid_thw': grid.numpy(), 'video_metadata': [times]}, 0)
        return f'<|im_start|>user\n{video}{QUESTION}{TURN}'

    def more(self, ids, grid, kinds):
        return {}


class Qwen2_5VL(QwenLibrary):
    statistics = dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
    own_positions = False

    def prompt(self, pictures, grid):
        processor = SimpleNamespace(video_processor=SimpleNamespace(merge_size=2), video_token='<|video_pad|>')
        video = Qwen2_5_VLProcessor.replace_video_token(processor, {'video_grid_thw': grid.numpy()}, 0)
        return f'{ASSISTANT}<|vision_start|>{video}<|vision_end|>{QUESTION}{TURN}'

    def more(self, ids, grid, kinds):
        """The library's positions; text behind the video moved behind its greatest position, as the authors have it."""
        if self.own_positions:
            return {'second_per_grid_ts': [1.0]}
        positions, _ = self.model.model.get_rope_index(ids, kinds, video_grid_thw=grid, second_per_grid_ts=[1.0])
        end = int(kinds[0].nonzero().max()) + 1
        positions[:, :, end:] += positions[:, :, :end].max() + 1 - positions[:, :, end:].min()
        return {'position_ids': positions}


class InternVL(Library):
    def pixels(self, pictures):
        """With ImageNet's statistics, which the authors use."""
        size = self.model.config.vision_config.image_size[0]
        image_processor = GotOcr2ImageProcessorPil(size={'height': size, 'width': size}, crop_to_patches=False,
                                                   image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
        return image_processor(pictures, return_tensors='pt')

    def forward(self, pictures):
        pixels = self.pixels(pictures)
        processor = SimpleNamespace(start_image_token='<img>', end_image_token='</img>', image_token='<IMG_CONTEXT>',
                                    image_seq_length=self.model.config.image_seq_length)
        video = InternVLProcessor.replace_video_token(processor, {'pixel_values_videos': [pixels['pixel_values']]}, 0)
        ids = self.ids(f'<|im_start|>user\n{video}\n{QUESTION}{TURN}')
        return ids, self.model(input_ids=ids, pixel_values=pixels['pixel_values'], use_cache=True)


class LlavaOnevision(Library):
    def forward(self, pictures):
        vision = self.model.config.vision_config
        size = {'height': vision.image_size, 'width': vision.image_size}
        processor = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=[[vision.image_size] * 2])
        pixels = torch.stack([processor(picture, return_tensors='pt')['pixel_values'][0, 0] for picture in pictures])[None]
        video = LlavaOnevisionProcessor.replace_video_token(
            SimpleNamespace(num_image_tokens=(vision.image_size // vision.patch_size) ** 2, video_token='<video>'),
            {'pixel_values_videos': pixels}, 0)
        ids = self.ids(f'<|im_start|>user {video}\n{QUESTION}<|im_end|><|im_start|>assistant\n')
        return ids, self.model(input_ids=ids, pixel_values_videos=pixels, use_cache=True)


class Eagle2_5(Library):
    """Put together from the published files a second time, with nothing of ours."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.config = json.loads((folder / 'config.json').read_text())
        self.tensors = load_file(folder / 'model.safetensors')
        self.vision = SiglipVisionModel(SiglipVisionConfig(**self.config['vision_config'], vision_use_head=False)).eval()
        self.vision.load_state_dict(self.part('vision_model.vision_model.'))
        self.text = Qwen2ForCausalLM(Qwen2Config(**self.config['text_config'])).eval()
        self.text.load_state_dict(self.part('language_model.'))

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def visual_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        layer = self.config['select_layer']
        output = self.vision(pixels, output_hidden_states=True)
        patches = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        side = int(patches.shape[1] ** 0.5)
        if self.config['use_pixel_shuffle']:
            grid = patches.reshape(len(pixels), side, side, -1).contiguous()
            patches = InternVLModel.pixel_shuffle(None, grid).flatten(1, 2)
        part, functional = self.part('mlp1.'), torch.nn.functional
        if self.config['mlp_connector_layers'] == 1:
            return functional.linear(patches, part['0.weight'], part['0.bias'])
        normed = functional.layer_norm(patches, patches.shape[-1:], part['0.weight'], part['0.bias'])
        inner = functional.gelu(functional.linear(normed, part['1.weight'], part['1.bias']))
        return functional.linear(inner, part['3.weight'], part['3.bias'])

    def forward(self, pictures):
        size = self.config['force_image_size']
        pixels = SiglipImageProcessorPil(size={'height': size, 'width': size})(pictures, return_tensors='pt')['pixel_values']
        visual = self.visual_tokens(pixels)
        video = ''.join(f'Frame {i + 1} sample at {i / 2:.2f}s: <img>{"<IMG_CONTEXT>" * visual.shape[1]}</img>'
                        for i in range(len(pictures)))
        ids = self.ids(f'{ASSISTANT}The first video: {video}{QUESTION}{TURN}')
        embeds = self.text.get_input_embeddings()(ids).clone()
        embeds[ids == self.token('<IMG_CONTEXT>')] = visual.flatten(0, 1)
        return ids, self.text(inputs_embeds=embeds, use_cache=True)


LIBRARIES = {'qwen3_vl': Qwen3VL, 'qwen2_5_vl': Qwen2_5VL, 'internvl': InternVL, 'llava_onevision': LlavaOnevision,
             'eagle2_5': Eagle2_5}
