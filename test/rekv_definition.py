"""ReKV told again in plain terms and in float64: what a token sees, which steps a question retrieves, and where they are read.

Only the text model's layers are shared with what is tested, as a copy in float64; masks, rotations and choices are this file's.
"""
import copy

import torch

from statekv_ros.backbones.family import Family


class Definition:
    """A video watched through `rekv(window)` and questions about it.

    Attributes:
        keys, values: by layer, of all tokens so far, [kv_heads, tokens, head_dim]; keys before rotation.
        positions: of all tokens, [axes, tokens].
        steps: (first token, token behind the last, first visual token, token behind the last, position, next position) of each;
            a pause before it is no part of it.
    """

    def __init__(self, backbone: Family, window: int):
        self.backbone, self.window = backbone, window
        self.language, self.head = (copy.deepcopy(part).double() for part in (backbone._language, backbone._head))
        self.frequencies = self.language.rotary_emb.inv_freq.double()
        sections = self.language.config.rope_parameters.get('mrope_section')
        interleaved = type(backbone).__name__ == 'Qwen3VL'
        self.axes = [0] * len(self.frequencies) if sections is None else [
            (index % 3 if index < 3 * sections[index % 3] else 0) if interleaved else
            [axis for axis, size in enumerate(sections) for _ in range(size)][index] for index in range(len(self.frequencies))]
        self.along = list(backbone.stream_axes)
        self.keys, self.values = ([torch.zeros(backbone.layout.kv_heads, 0, backbone.layout.head_dim, dtype=torch.float64)
                                   for _ in range(backbone.layout.layers)] for _ in range(2))
        self.positions = torch.zeros(backbone.position_axes, 0, dtype=torch.int64)
        self.steps = []
        prompt = backbone.prefix()
        self.prompt = prompt.tokens
        self._watch(prompt)

    def watch(self, frames, seconds) -> None:
        """A step of these camera frames."""
        position = self.steps[-1][5] if self.steps else self.prompt
        first = self.backbone.frames_per_step * len(self.steps)
        inputs = self.backbone.encode([self.backbone.prepare(frame) for frame in frames], seconds, position, first)
        begin = self.positions.shape[1]
        visual = begin + inputs.visual_start
        self._watch(inputs)
        start = int(self.positions[self.along, begin].min())
        self.steps.append((begin, begin + inputs.tokens, visual, visual + inputs.visual_tokens, start, inputs.next_position))

    def kept(self) -> list[int]:
        """Tokens that the next one may see."""
        tokens = self.positions.shape[1]
        return [token for token in range(tokens) if token < self.prompt or token >= tokens - self.window]

    def ask(self, steps: int, bare: str, question: str, tokens: int) -> tuple[dict[int, list[int]], torch.Tensor]:
        """The steps that each layer retrieves by the bare text, and the logits of the question's first answer tokens,
        [tokens, vocabulary], each the most likely one behind the one before."""
        chosen: dict[int, list[int]] = {}

        def choose(layer, query, key, value, scale):
            mean = query.mean(dim=1)
            group = len(mean) // len(key)
            scores = [sum(float(mean[head] @ self.keys[layer][head // group, visual:end].mean(dim=0))
                          for head in range(len(mean))) for _, _, visual, end, *_ in self.steps]
            chosen[layer] = sorted(sorted(range(len(scores)), key=lambda step: (-scores[step], step))[:steps])
            return self._read(layer, chosen[layer], query, key, value, scale)

        self._run(self.backbone.embed(self.backbone.tokenize_text(bare), 0), choose)
        ids, logits = self.backbone.tokenize_question(question), []
        for _ in range(tokens):
            hidden = self._run(self.backbone.embed(ids, 0), lambda layer, *given: self._read(layer, chosen[layer], *given))
            logits.append(self.head(hidden[0, -1]))
            ids = [*ids, int(logits[-1].argmax())]
        return chosen, torch.stack(logits)

    def attend(self, layer, query, key, value, scale):
        """As `AttentionMemory`; what `_run` was told, of queries and keys before rotation."""
        query, key = (self._turned(part[0], -self._given) for part in (query, key))
        return self._attend(layer, query, key, value[0], scale)[None]

    def _run(self, inputs, attend) -> torch.Tensor:
        self._given, self._attend = inputs.positions.reshape(-1, inputs.tokens), attend
        extra = {name: [level.double() for level in levels] for name, levels in inputs.extra.items()}
        return self.language(inputs_embeds=inputs.embeds.double(), position_ids=inputs.positions, use_cache=False, statekv=self,
                             **extra).last_hidden_state

    def _turned(self, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Vectors [..., tokens, head_dim] rotated for positions [axes, tokens]."""
        angles = positions[self.axes].T * self.frequencies
        first, second = vectors.chunk(2, dim=-1)
        return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1)

    def _moved(self, positions: torch.Tensor, by: int) -> torch.Tensor:
        """Further right along the stream."""
        moved = positions.clone()
        moved[self.along] += by
        return moved

    def _watch(self, inputs) -> None:
        first = self.positions.shape[1]
        self.positions = torch.cat([self.positions, inputs.positions.reshape(-1, inputs.tokens)], dim=1)
        at = self.positions

        def attend(layer, query, key, value, scale):
            self.keys[layer] = torch.cat([self.keys[layer], key], dim=1)
            self.values[layer] = torch.cat([self.values[layer], value], dim=1)
            in_window = self._turned(self.keys[layer], at)
            origin = at[:, :self.prompt].clone()
            origin[self.along] = 0
            in_prompt = self._turned(self.keys[layer][:, :self.prompt], origin)
            output = torch.zeros_like(query)
            for token in range(inputs.tokens):
                number = first + token
                oldest = max(0, number - self.window + 1)
                beyond = min(self.prompt, oldest)       # of the prompt, so many have left the window
                here = at[:, number:number + 1]
                asking = self._turned(query[:, token:token + 1], here)
                from_origin = self._turned(query[:, token:token + 1], self._moved(here, -int(at[self.along, oldest].min())))
                for head in range(len(query)):
                    kv = head * len(key) // len(query)
                    scores = torch.cat([in_prompt[kv, :beyond] @ from_origin[head, 0],
                                        in_window[kv, oldest:number + 1] @ asking[head, 0]])
                    seen = torch.cat([self.values[layer][kv, :beyond], self.values[layer][kv, oldest:number + 1]])
                    output[head, token] = torch.softmax(scores * scale, dim=0) @ seen
            return output

        self._run(inputs, attend)

    def _read(self, layer, steps, query, key, value, scale) -> torch.Tensor:
        """Causal attention behind the prompt and these steps, one right behind the other."""
        columns, positions, end = list(range(self.prompt)), [self.positions[:, :self.prompt]], self.prompt
        for step in steps:
            begin, behind, _, _, position, next_position = self.steps[step]
            columns += range(begin, behind)
            positions.append(self._moved(self.positions[:, begin:behind], end - position))
            end += next_position - position
        # A question stands behind the video on all axes; along the stream, right behind what is read.
        asked = torch.arange(query.shape[1]).expand(len(self.positions), -1) + self.steps[-1][5]
        asked = self._moved(asked, end - self.steps[-1][5])
        keys = torch.cat([self._turned(self.keys[layer][:, columns], torch.cat(positions, dim=1)), self._turned(key, asked)],
                         dim=1)
        values = torch.cat([self.values[layer][:, columns], value], dim=1)
        group = len(query) // len(key)
        scores = self._turned(query, asked) @ keys.repeat_interleave(group, dim=0).transpose(1, 2) * scale
        hidden = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).triu(1)
        scores[..., len(columns):].masked_fill_(hidden, float('-inf'))
        return torch.softmax(scores, dim=-1) @ values.repeat_interleave(group, dim=0)
