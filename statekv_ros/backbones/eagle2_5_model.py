"""Eagle2.5 assembled from the library's parts by its published config: SigLIP2 vision tower, pixel shuffle, MLP, Qwen2 text.

The library has no such model, and the code that ships with the checkpoint is never run. Module names follow the published
tensor names, but for the one level that the library's SigLIP no longer has (`PUBLISHED_NAMES`).
"""
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, SiglipVisionConfig
from transformers import SiglipVisionModel
from transformers.configuration_utils import PreTrainedConfig

PUBLISHED_NAMES = {r'^vision_model\.vision_model\.': 'vision_model.'}


class Eagle2_5Config(PreTrainedConfig):
    """The fields of the published config.json that decide the computation; others are kept as they are.

    Attributes:
        select_layer: hidden state of the vision tower that is projected; -1 is the last one, after its norm.
        downsample_ratio: sides of the visual grid after the pixel shuffle, relative to before.
        mlp_connector_layers: 2 (norm, linear, GELU, linear) or 1 (linear).
        force_image_size: frame size in pixels where it differs from the vision config's.
    """
    model_type = 'eagle_2_5_vl'
    sub_configs = {'vision_config': SiglipVisionConfig, 'text_config': AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    select_layer: int = -4
    downsample_ratio: float = 0.5
    use_pixel_shuffle: bool = True
    mlp_connector_layers: int = 2
    force_image_size: int | None = None
    image_token_index: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        vision = {} if self.vision_config is None else self.vision_config
        text = {} if self.text_config is None else self.text_config
        if isinstance(vision, dict):
            kind = vision.get('model_type', 'siglip_vision_model')
            if kind != 'siglip_vision_model':
                raise ValueError(f'vision tower of type {kind!r} is not supported: only siglip_vision_model is')
            # The pooling head is in the checkpoint but takes no part.
            self.vision_config = SiglipVisionConfig(**{**vision, 'vision_use_head': False})
        if isinstance(text, dict):
            self.text_config = AutoConfig.for_model(text.get('model_type', 'qwen2'),
                                                    **{k: v for k, v in text.items() if k != 'model_type'})
        if self.mlp_connector_layers not in (1, 2):
            raise ValueError(f'mlp_connector_layers must be 1 or 2, got {self.mlp_connector_layers}')
        super().__post_init__(**kwargs)

    @property
    def image_size(self) -> int:
        """Height and width of a frame in pixels."""
        return self.force_image_size or self.vision_config.image_size

    @property
    def shuffle(self) -> int:
        """Patches along one side of a visual token."""
        return round(1 / self.downsample_ratio) if self.use_pixel_shuffle else 1

    @property
    def visual_side(self) -> int:
        """Height and width of a frame in visual tokens."""
        return self.image_size // self.vision_config.patch_size // self.shuffle


class Eagle2_5ForConditionalGeneration(PreTrainedModel):
    """Frames to visual tokens, and the text model beside it; `family.Family` puts the two together."""
    config_class = Eagle2_5Config
    _supports_sdpa = True
    _supports_flash_attn = True
    _keys_to_ignore_on_load_unexpected = [r'vision_model\.head\.']

    def __init__(self, config: Eagle2_5Config):
        super().__init__(config)
        self.vision_model = SiglipVisionModel._from_config(config.vision_config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        hidden = config.text_config.hidden_size
        shuffled = config.vision_config.hidden_size * config.shuffle ** 2
        if config.mlp_connector_layers == 2:
            self.mlp1 = torch.nn.Sequential(torch.nn.LayerNorm(shuffled), torch.nn.Linear(shuffled, hidden),
                                            torch.nn.GELU(), torch.nn.Linear(hidden, hidden))
        else:
            self.mlp1 = torch.nn.Sequential(torch.nn.Linear(shuffled, hidden))
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a checkpoint with the published tensor names."""
        return super().from_pretrained(*args, **{'key_mapping': PUBLISHED_NAMES, **kwargs})

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.language_model.get_output_embeddings()

    def visual_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [frames, 3, size, size] -> [frames, visual_side ** 2, hidden]."""
        layer = self.config.select_layer
        output = self.vision_model(pixels, output_hidden_states=layer != -1)
        patches = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        # [frames, row, y, column, x, channels] -> a visual token holds its patches (y, x) one after another.
        side, shuffle = self.config.visual_side, self.config.shuffle
        blocks = patches.reshape(len(pixels), side, shuffle, side, shuffle, -1)
        return self.mlp1(blocks.permute(0, 1, 3, 2, 4, 5).reshape(len(pixels), side * side, -1))


AutoConfig.register(Eagle2_5Config.model_type, Eagle2_5Config)
AutoModelForImageTextToText.register(Eagle2_5Config, Eagle2_5ForConditionalGeneration)
