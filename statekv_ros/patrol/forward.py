"""The model's own function, written for packed batches: the same numbers as the library's forward, without its loop over frames."""
import torch
import torch.nn.functional as F
from transformers import Qwen3VLForConditionalGeneration

from statekv_ros.patrol.packing import CAPTION_TOKENS, GRID, QUESTION_TOKENS, Batch

_HIDDEN = -1e4             # added to scores of tokens that may not be seen; fits bf16
_BLOCK = 144               # query tokens at once in causal attention


def forward(model: Qwen3VLForConditionalGeneration, batch: Batch, pixels: torch.Tensor | None,
            notes_layer: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states of every token, [rows, tokens, hidden], behind the last norm.

    Args:
        pixels: normalised patches [steps, 16, 1536] in the model's dtype; None for a batch of captions.
        notes_layer: when positive, also return the hidden states of each step's last visual token, [steps, hidden], behind this
            many layers.
    """
    text = model.model.language_model
    hidden = F.embedding(batch.ids, text.embed_tokens.weight)
    rows, tokens, width = hidden.shape
    deep: list[torch.Tensor] = []
    if pixels is not None:
        visual, deep = see(model.model.visual, pixels)
        hidden = hidden.view(-1, width).index_copy(0, batch.visual, visual.reshape(-1, width)).view(rows, tokens, width)
    cosine, sine = _rotation(text, batch.positions, hidden.dtype)
    groups = _groups(batch, hidden.dtype)
    notes = None
    for index, layer in enumerate(text.layers):
        hidden = hidden + _attend(layer.self_attn, _norm(hidden, layer.input_layernorm), cosine, sine, batch.context_tokens,
                                  groups)
        hidden = hidden + layer.mlp(_norm(hidden, layer.post_attention_layernorm))
        if index < len(deep):
            hidden = hidden.view(-1, width).index_add(0, batch.visual, deep[index].reshape(-1, width)).view(hidden.shape)
        if index + 1 == notes_layer:
            notes = hidden.view(-1, width)[batch.noted]
    return _norm(hidden, text.norm), notes


def see(tower: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Visual tokens [steps, 4, hidden] and DeepStack features of as many, all steps at once."""
    steps, patches, _ = pixels.shape
    embed = tower.patch_embed.proj
    hidden = F.linear(pixels, embed.weight.flatten(1), embed.bias)
    # Patches of one visual token are neighbours: row and column of each.
    cell = torch.arange(patches)
    down = cell // (4 * GRID) * 2 + cell % 4 // 2
    right = cell // 4 % GRID * 2 + cell % 2
    hidden = hidden + tower.pos_embed.weight[down * (2 * GRID) + right]
    frequency = tower.rotary_pos_emb.inv_freq.float()
    angle = torch.cat([down[:, None] * frequency, right[:, None] * frequency], dim=-1).repeat(1, 2)
    cosine, sine = angle.cos().to(hidden.dtype), angle.sin().to(hidden.dtype)
    deep = []
    for index, block in enumerate(tower.blocks):
        attention = block.attn
        query, key, value = attention.qkv(block.norm1(hidden)).view(steps, patches, 3, attention.num_heads, -1).permute(
            2, 0, 3, 1, 4)
        # Written out: the fused attention is slow on a batch of many short sequences.
        scores = (_rotate(query, cosine, sine) * attention.scaling) @ _rotate(key, cosine, sine).transpose(-1, -2)
        mixed = scores.softmax(dim=-1) @ value
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(steps, patches, -1))
        mlp = block.mlp
        hidden = hidden + mlp.linear_fc2(F.gelu(mlp.linear_fc1(block.norm2(hidden)), approximate='tanh'))
        if index in tower.deepstack_visual_indexes:
            deep.append(_merge(tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(index)], hidden))
    return _merge(tower.merger, hidden), deep


def _merge(merger: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    steps, patches, width = hidden.shape
    joined = (steps, patches // 4, 4 * width)
    hidden = merger.norm(hidden.reshape(joined)) if merger.use_postshuffle_norm else merger.norm(hidden).reshape(joined)
    return merger.linear_fc2(F.gelu(merger.linear_fc1(hidden)))


def _rotation(text: torch.nn.Module, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rope = text.rotary_emb
    angle = positions[..., None].float() * rope.inv_freq.float()
    mixed = angle[0].clone()
    for axis in (1, 2):            # interleaved M-RoPE: every third frequency belongs to height, every third to width
        part = slice(axis, rope.mrope_section[axis] * 3, 3)
        mixed[..., part] = angle[axis, ..., part]
    mixed = torch.cat([mixed, mixed], dim=-1)
    return mixed.cos().to(dtype)[:, None], mixed.sin().to(dtype)[:, None]


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


def _norm(x: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _groups(batch: Batch, dtype: torch.dtype) -> list[tuple[int, int, torch.Tensor]]:
    """(segments, tokens of each, additive mask [rows, 1, segments, 1, context]) of questions and captions."""
    token = torch.arange(batch.context_tokens)
    seen = (token >= batch.seen[..., :1]) & (token < batch.seen[..., 1:]) | (token < batch.prefix_tokens)
    mask = torch.where(seen, 0., _HIDDEN).to(dtype)[:, None, :, None]
    groups, first = [], 0
    for segments, length in ((batch.questions, QUESTION_TOKENS), (batch.captions, CAPTION_TOKENS)):
        if segments:
            groups.append((segments, length, mask[:, :, first:first + segments]))
        first += segments
    return groups


def _attend(attention: torch.nn.Module, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, context: int,
            groups: list[tuple[int, int, torch.Tensor]]) -> torch.Tensor:
    rows, tokens, _ = x.shape
    head_dim = attention.head_dim
    query = _norm(attention.q_proj(x).view(rows, tokens, -1, head_dim), attention.q_norm).transpose(1, 2)
    key = _norm(attention.k_proj(x).view(rows, tokens, -1, head_dim), attention.k_norm).transpose(1, 2)
    value = attention.v_proj(x).view(rows, tokens, -1, head_dim).transpose(1, 2)
    query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    outputs = _attend_causally(*(part[:, :, :context] for part in (query, key, value)), attention.scaling)
    start = context
    for segments, length, mask in groups:
        end = start + segments * length
        outputs.append(_attend_segments(*(part[:, :, start:end] for part in (query, key, value)), key[:, :, :context],
                                        value[:, :, :context], mask, length, attention.scaling))
        start = end
    return attention.o_proj(torch.cat(outputs, dim=2).transpose(1, 2).reshape(rows, tokens, -1))


def _attend_causally(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> list[torch.Tensor]:
    """Causal attention of [rows, heads, tokens, head_dim] on itself, as pieces along the tokens.

    Written out in blocks: on a CPU the fused attention's backward in bf16 costs two to three times as much.
    """
    query = query * scale
    hidden = torch.full((_BLOCK, _BLOCK), _HIDDEN, dtype=query.dtype).triu(1)
    pieces = []
    for start in range(0, query.shape[2], _BLOCK):
        part = query[:, :, start:start + _BLOCK]
        length = part.shape[2]
        scores = part @ key[:, :, :start + length].transpose(-1, -2)
        scores[..., start:] += hidden[:length, :length]
        pieces.append(scores.softmax(dim=-1) @ value[:, :, :start + length])
    return pieces


def _attend_segments(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context_key: torch.Tensor,
                     context_value: torch.Tensor, mask: torch.Tensor, length: int, scale: float) -> torch.Tensor:
    """Segments [rows, heads, segments x length, head_dim]: each attends to its span of the context and causally to itself."""
    rows, heads, tokens, head_dim = query.shape
    apart = (rows, heads, tokens // length, length)
    query = query * scale
    far = (query @ context_key.transpose(-1, -2)).view(*apart, -1) + mask
    own = query.view(*apart, head_dim) @ key.reshape(*apart, head_dim).transpose(-1, -2)
    own = own + torch.full((length, length), _HIDDEN, dtype=query.dtype).triu(1)
    # One softmax over both parts without joining them, which costs more than the rest when differentiated.
    top = torch.maximum(far.detach().amax(dim=-1, keepdim=True), own.detach().amax(dim=-1, keepdim=True))
    far, own = (far - top).exp(), (own - top).exp()
    total = far.sum(dim=-1, keepdim=True, dtype=torch.float32) + own.sum(dim=-1, keepdim=True, dtype=torch.float32)
    seen = far.view(rows, heads, tokens, -1) @ context_value
    seen = seen.view(*apart, head_dim) + own @ value.reshape(*apart, head_dim)
    return (seen / total.to(seen.dtype)).view(rows, heads, tokens, head_dim)
