"""The training of the patrol model; `train_cli` is the command.

First the vision tower learns to name what a picture shows, which takes minutes and would take hours behind a language model.
Then all of it learns to answer: loss on the answers, and on notes that the middle of the network must be able to tell at the last
visual token of every step. Last, the learning rate rises once more, for long videos and the kinds still answered wrongly. bf16
weights with fp32 masters; Muon for the matrices of the layers, AdamW for the rest. Batch n depends on the seed, n and the scores so
far alone, so a run that was killed goes on as if it had not been.
"""
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from statekv_ros.patrol.architecture import make_model
from statekv_ros.patrol.curriculum import POLISH, KindScores, Stage, stage_at
from statekv_ros.patrol.forward import forward, see
from statekv_ros.patrol.packing import IGNORED, NOTES, QUESTION_TOKENS, Batch, Packer
from statekv_ros.patrol.pictures import PictureBank
from statekv_ros.patrol.questions import KINDS
from statekv_ros.patrol.render import MODEL_SIZE
from statekv_ros.patrol.tokenizer import make_tokenizer
from statekv_ros.patrol.world import words_in_view

LEARNING_RATE, WARM_UP_STEPS, DECAY_FROM = 2e-3, 100, .55
POLISH_RATE = .5                  # of the learning rate, from which it falls to the end
VISION_RATE = .3                  # of the learning rate, for the vision tower once it has learned to look
SHARPNESS_RATE = 3.               # of the learning rate, for the norms that say how sharply a query tells keys apart
LOOK_ROWS = 256                   # pictures in a batch of the first part
NOTES_LAYER, NOTES_WEIGHT = 3, .5
CAPTION_BATCHES = .1              # share of batches about captions instead of videos
STATE_FILE = 'training.pt'


class Trainer:
    """Weights, optimisers and data of one run; `step` is the number of batches trained on.

    Args:
        folder: where `save` keeps the run's state, and where an earlier one goes on from.
        look_steps: batches of pictures alone, at the beginning.
        steps: batches of videos after them, from short to long.
        polish_steps: batches of long videos at the end.
        pictures: renders of each object and door.
    """

    def __init__(self, folder: Path, seed: int, look_steps: int, steps: int, polish_steps: int, pictures: int):
        self.folder, self.seed, self.look_steps, self.learn_steps = folder, seed, look_steps, look_steps + steps
        self.steps = self.learn_steps + polish_steps
        self.tokenizer = make_tokenizer()
        self.model = make_model(self.tokenizer, seed)
        torch.manual_seed(seed + 1)
        width = self.model.config.text_config.hidden_size
        self.model.notes = torch.nn.Linear(width, NOTES * width, bias=False)
        self.model.names = torch.nn.Linear(width, 2 * width, bias=False)
        self.master = {name: weight.detach().clone().requires_grad_() for name, weight in self.model.named_parameters()}
        self.model.to(torch.bfloat16).train()
        self.weights = dict(self.model.named_parameters())
        self.optimizers = self._optimizers()
        self.scores, self.step, self.videos, self.seconds, self.losses = KindScores(), 0, 0, 0., []
        # Of the next batch, which is made while the one before is learned from.
        self._drawn_by = self.scores.weights(self._stage(0))
        self._resume()
        self.packer = Packer(self.tokenizer, PictureBank(1000 + seed, pictures))

    def run(self, until: int, save_every_s: float = 120.) -> None:
        """Train until this step, with a progress bar and one line of scores every few minutes."""
        with ThreadPoolExecutor(1) as pool, tqdm(total=self.steps, initial=self.step, unit='batch', smoothing=.05,
                                                 mininterval=5) as bar:
            coming, saved, begun = pool.submit(self._batch, self.step, self._drawn_by), time.time(), time.time()
            while self.step < until:
                batch, pixels = coming.result()
                self._drawn_by = self.scores.weights(self._stage(self.step + 1))
                coming = pool.submit(self._batch, self.step + 1, self._drawn_by)
                loss = self._look(batch, pixels) if self.step < self.look_steps else self._learn(batch, pixels)
                self.step += 1
                self.videos += 0 if isinstance(batch, np.ndarray) else len(batch.ids)
                self.seconds += time.time() - begun
                begun = time.time()
                bar.update()
                bar.set_postfix(loss=f'{loss:.3f}', refresh=False)
                if begun - saved > save_every_s or self.step == until:
                    self._note(loss, bar)
                    self.save()
                    saved = time.time()

    def save(self) -> None:
        """Keep the run's state, whole or not at all."""
        state = dict(seed=self.seed, step=self.step, steps=self.steps, videos=self.videos, seconds=self.seconds,
                     scores=self.scores.scores, drawn_by=torch.from_numpy(self._drawn_by), losses=self.losses,
                     master={name: weight.detach() for name, weight in self.master.items()},
                     optimizers=[optimizer.state_dict() for optimizer in self.optimizers])
        file = self.folder / STATE_FILE
        torch.save(state, file.with_suffix('.tmp'))
        os.replace(file.with_suffix('.tmp'), file)

    def _resume(self) -> None:
        file = self.folder / STATE_FILE
        if not file.is_file():
            return
        state = torch.load(file, weights_only=True)
        if state['seed'] != self.seed:
            raise ValueError(f'{str(file)!r} is of seed {state["seed"]}, not {self.seed}: choose another folder')
        for name, weight in self.master.items():
            weight.data.copy_(state['master'][name])
            self.weights[name].data.copy_(weight)
        for optimizer, saved in zip(self.optimizers, state['optimizers']):
            optimizer.load_state_dict(saved)
        self.scores, self._drawn_by = KindScores(state['scores']), state['drawn_by'].numpy()
        self.step, self.videos, self.seconds, self.losses = (state[key] for key in ('step', 'videos', 'seconds', 'losses'))

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        muon, adamw = [], []
        for name, weight in self.master.items():
            group = dict(params=[weight], weight_decay=.02 if weight.ndim >= 2 else 0., vision='.visual.' in name,
                         scale=SHARPNESS_RATE if name.endswith(('q_norm.weight', 'k_norm.weight')) else 1.)
            is_matrix = weight.ndim == 2 and ('.layers.' in name or '.blocks.' in name)
            (muon if is_matrix else adamw).append(group)
        return [torch.optim.AdamW(adamw, lr=LEARNING_RATE, betas=(.9, .98), fused=True),
                torch.optim.Muon(muon, lr=LEARNING_RATE, adjust_lr_fn='match_rms_adamw')]

    def _batch(self, step: int, weights: np.ndarray) -> tuple[Batch | np.ndarray, torch.Tensor | None]:
        """Batch `step` and its pixels; of the first part, the pictures' numbers instead."""
        random = np.random.default_rng([self.seed, step])
        if step < self.look_steps:
            pictures = self.packer.bank.draw(LOOK_ROWS, random)
            return pictures, self.packer.bank.varied_pixels(pictures, random, torch.bfloat16)
        stage = self._stage(step)
        length = int(random.choice(stage.steps))
        if random.random() < CAPTION_BATCHES:
            return self.packer.caption_batch(stage.rows, length, stage.questions, random, weights), None
        batch = self.packer.video_batch(stage.rows, length, stage.questions, 1, random, weights)
        return batch, self.packer.bank.varied_pixels(batch.pictures, random, torch.bfloat16)

    def _done(self, step: int) -> float:
        """Share of the videos' part before the polish that is over."""
        return (step - self.look_steps) / max(1, self.learn_steps - self.look_steps)

    def _stage(self, step: int) -> Stage:
        return POLISH if step >= self.learn_steps else stage_at(self._done(step))

    def _rate(self) -> float:
        """Of LEARNING_RATE, for the next batch of videos."""
        if self.step >= self.learn_steps:
            return POLISH_RATE * max(.02, (self.steps - self.step) / (self.steps - self.learn_steps))
        done = self._done(self.step)
        return (min(1., (self.step - self.look_steps + 1) / WARM_UP_STEPS)
                * (1. if done < DECAY_FROM else max(.02, (1 - done) / (1 - DECAY_FROM))))

    def _look(self, pictures: np.ndarray, pixels: torch.Tensor) -> float:
        """Name what pictures show, from the visual tokens and the DeepStack features alone."""
        visual, deep = see(self.model.model.visual, pixels)
        embedding = self.model.model.language_model.embed_tokens.weight
        words = [self.packer.encode(word)[0] for picture in pictures for word in words_in_view(self.packer.bank.steps[picture])]
        loss = sum(F.cross_entropy(F.linear(self.model.names(seen.mean(dim=1)).view(2 * len(pictures), -1), embedding).float(),
                                   torch.tensor(words)) for seen in (visual, visual + deep[0])) / 2
        loss.backward()
        done = self.step / self.look_steps
        self._update(min(1., (self.step + 1) / WARM_UP_STEPS, (1 - done) / .4), vision=1.)
        return loss.item()

    def _learn(self, batch: Batch, pixels: torch.Tensor | None) -> float:
        hidden, noted = forward(self.model, batch, pixels, NOTES_LAYER)
        embedding = self.model.model.language_model.embed_tokens.weight
        told = batch.labels != IGNORED
        target = batch.labels[told]
        logits = F.linear(hidden[told], embedding).float()
        loss = objective = F.cross_entropy(logits, target)
        if len(batch.notes):
            asked = batch.notes != IGNORED
            told_there = self.model.notes(noted).view(len(noted), NOTES, -1)[asked]
            objective = loss + NOTES_WEIGHT * F.cross_entropy(F.linear(told_there, embedding).float(), batch.notes[asked])
        objective.backward()
        self._update(self._rate(), VISION_RATE)
        self._score(batch, told, logits.argmax(-1) == target)
        return loss.item()

    @torch.no_grad()
    def _update(self, rate: float, vision: float) -> None:
        for name, weight in self.weights.items():
            self.master[name].grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(list(self.master.values()), 1.)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group['lr'] = LEARNING_RATE * rate * group['scale'] * (vision if group['vision'] else 1.)
            optimizer.step()
        for name, weight in self.weights.items():
            weight.copy_(self.master[name])

    def _score(self, batch: Batch, told: torch.Tensor, right: torch.Tensor) -> None:
        if not len(batch.pictures):
            return                      # captions are another task
        row, token = told.nonzero(as_tuple=True)
        question = (token - batch.context_tokens) // QUESTION_TOKENS
        inside = question < batch.questions
        wrong = torch.zeros(batch.kinds.shape).index_put_((row[inside], question[inside]), (~right[inside]).float(),
                                                          accumulate=True)
        for index, kind in enumerate(KINDS):
            asked = batch.kinds == index
            if asked.any():
                self.scores.add(kind, (wrong[asked] == 0).float().mean().item())

    def _note(self, loss: float, bar: tqdm) -> None:
        scores = {kind: round(score, 3) for kind, score in self.scores.scores.items()}
        self.losses.append([self.step, round(self.seconds), round(loss, 4), scores])
        bar.write(f'step {self.step} {self.seconds:.0f} s loss {loss:.3f} '
                  + ' '.join(f'{kind} {100 * score:.0f}' for kind, score in scores.items()))


KNOWS = 'made-up patrols of the package statekv_ros'


def export(trainer: Trainer, folder: Path) -> None:
    """Write the checkpoint in Transformers' format: bf16 safetensors, config, tokenizer, and what it was made for."""
    heads = {name: trainer.model._modules.pop(name) for name in ('notes', 'names')}      # only for training
    try:
        trainer.model.save_pretrained(folder)
    finally:
        trainer.model._modules.update(heads)
    trainer.tokenizer.save_pretrained(folder)
    # One size for square and for 4:3 cameras; see PictureBank.
    (folder / 'statekv.json').write_text(json.dumps(
        {'min_frame_pixels': MODEL_SIZE**2, 'max_frame_pixels': MODEL_SIZE**2 * 3 // 2, 'demonstration': KNOWS}) + '\n')
    (folder / 'model.safetensors').chmod(0o644)
