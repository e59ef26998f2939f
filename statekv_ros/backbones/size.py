"""The sizes of a model that memory depends on."""
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSize:
    """What memory depends on.

    Attributes:
        weights_bytes: all parameters, scales of those in few bits included.
        layers, kv_heads, q_heads, head_dim, hidden, mlp, vocabulary: of the text model.
        value_bytes: bytes of one number (2 for bf16 and fp16).
        step_tokens: tokens of one frame step; frames_per_step: camera frames in it.
        position_axes: numbers in a token's position.
        layer_bytes: of the text model's matrices as they lie in memory; 0: `value_bytes` a number.
        unpacked_bytes: of the largest temporary that a product with weights in few bits makes of them.
    """
    name: str
    weights_bytes: int
    layers: int
    kv_heads: int
    q_heads: int
    head_dim: int
    hidden: int
    mlp: int
    vocabulary: int
    value_bytes: int
    step_tokens: int
    frames_per_step: int
    position_axes: int
    layer_bytes: int = 0
    unpacked_bytes: int = 0

    @property
    def decoder_bytes(self) -> int:
        """Bytes of the text model's weights that a token goes through: without the table of input tokens, of which it reads a row."""
        attention = self.hidden * self.head_dim * 2 * (self.q_heads + self.kv_heads)
        layers = self.layer_bytes or self.layers * (attention + 3 * self.hidden * self.mlp) * self.value_bytes
        return layers + self.vocabulary * self.hidden * self.value_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.value_bytes
