"""Checkpoints with values, bytes or tensors changed: each works, or is refused before the first frame, by its name."""
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from campaign.mutation import cut_short, flipped
from campaign.record import Record
from campaign.subject import Subject
from campaign.workers import run_trials, tell_input
from statekv_ros.backbones import load_backbone
from statekv_ros.errors import StateKVError
from statekv_ros.memory import VideoStream
from statekv_ros.memory.trial import try_out
from statekv_ros.share import find_share

WANTED = 170
_LIMIT_S = 60.0
_LIVE_ONE_IN = 25           # of all trials, so many also through a node
_VALUES = (0, -1, 1, 2, 3, 7, 10**5, 2**31, 2**40, 1e30, 0.5, None, '', 'x', [], {}, [1, 2], True, 'float64', 'sdpa', 'relu',
           'nan', float('nan'), '../../etc/passwd')
_JSON_FILES = ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'statekv.json')
_WEIGHTS = 'model.safetensors'


def run(record: Record) -> None:
    """All trials in a worker; some of them once more as the model of a node, which must live on either way."""
    whole = str(find_share('models/patrol'))
    run_trials(record, load_spoiled, (whole,), _LIMIT_S)
    tried = list(record.only if record.only is not None else range(record.trials))
    for number in tried[::_LIVE_ONE_IN]:
        if record.left_s > 0:
            _configure_node(record, number, whole)


def load_spoiled(record: Record, number: int, whole: str) -> None:
    """Spoil a copy of the patrol model, load it and try it out as the node does, then watch four frames with it and ask."""
    torch.set_num_threads(1)
    folder, given = _spoiled(record, number, whole)
    tell_input(record, given)
    stage = 'on loading'
    try:
        backbone = load_backbone(str(folder), 'cpu')
        backbone.size(480, 640)
        try_out(backbone)
        stage = 'on the first frames'
        stream = VideoStream(backbone, 'statekv(64)', 'all', 512)
        for second in range(1, 5):
            stream.step(np.random.default_rng(second).integers(0, 256, (64, 64, 3), dtype=np.uint8), second * 10**9)
        answer = stream.answer('what is in view?', max_tokens=8)
    except StateKVError as error:
        if stage != 'on loading':
            record.fail(f'loads, and fails {stage}', number, given, str(error))
        elif str(folder) not in str(error):
            record.fail('refused without naming the checkpoint', number, given, str(error))
        else:
            record.note_refusal(str(error), number, given)
    except Exception as error:
        record.fail(f'raw {type(error).__name__} {stage}', number, given, f'{type(error).__name__}: {error}')
    else:
        if not answer.text and answer.finish_reason == 'length':    # tokens that say nothing: NaN weights do this
            record.fail('loads, and answers nothing', number, given, str(answer)[:300])
        else:
            record.note('works')


def _configure_node(record: Record, number: int, whole: str) -> None:
    """The node with that model: active and answering, or unconfigured with the reason; alive in any case."""
    folder, given = _spoiled(record, number, whole)
    with Subject(record, model=str(folder), autostart='false', cameras='[front]') as subject:
        with subject.judged(number, f'a node with the model: {given}'):
            subject.change(1)
            subject.wait(lambda: subject.engine[0] == 2 or (
                subject.engine[2].get('state') == 'inactive' and 'loading' not in str(subject.engine)), 'model or reason')
            level, message, _ = subject.engine
            record.note('node: refused' if level == 2 else 'node: configured')
            response = subject.ask()
            if level == 2 and message not in response.error:
                record.fail('the reason is not told to callers', number, given, f'{message!r}, but {response.error!r}')
        subject.conclude()
    record.after = None     # each of these nodes has one model: there is nothing to compare it with


def _spoiled(record: Record, number: int, whole: str) -> tuple[Path, str]:
    folder = record.folder / 'checkpoint'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    return folder, _spoil(folder, record.random(number))


def _spoil(folder: Path, rng: random.Random) -> str:
    ways = {_config_value: 0.6, _config_bytes: 0.06, _weights_bytes: 0.12, _tensor: 0.06, _missing: 0.05, _other_file: 0.11}
    return rng.choices(list(ways), list(ways.values()))[0](folder, rng)


def _config_value(folder: Path, rng: random.Random) -> str:
    return _change_value(folder / 'config.json', rng)


def _config_bytes(folder: Path, rng: random.Random) -> str:
    return _change_bytes(folder / 'config.json', rng)


def _weights_bytes(folder: Path, rng: random.Random) -> str:
    file = folder / _WEIGHTS
    data = file.read_bytes()
    if rng.random() < 0.5:
        return _change_bytes(file, rng)
    header = 8 + int.from_bytes(data[:8], 'little')
    data, what = flipped(data, rng, *rng.choice(((0, 8), (8, header))))
    file.write_bytes(data)
    return f'{file.name}, its header: {what}'


def _tensor(folder: Path, rng: random.Random) -> str:
    tensors = load_file(folder / _WEIGHTS)
    name = rng.choice(sorted(tensors))
    ways = {'left out': None, 'as float64': tensors[name].double(), 'as int8': tensors[name].to(torch.int8),
            'five numbers of it': tensors[name].flatten()[:5].clone(), 'NaN': torch.full_like(tensors[name], float('nan'))}
    way = rng.choice((*ways, 'another beside it'))
    if way == 'another beside it':
        tensors['extra.weight'] = torch.zeros(3)
    elif ways[way] is None:
        del tensors[name]
    else:
        tensors[name] = ways[way]
    save_file(tensors, folder / _WEIGHTS, metadata={'format': 'pt'})
    return f'tensor {name}: {way}'


def _missing(folder: Path, rng: random.Random) -> str:
    name = rng.choice((*_JSON_FILES, _WEIGHTS, 'config.json'))
    (folder / name).unlink()
    return f'{name} missing'


def _other_file(folder: Path, rng: random.Random) -> str:
    file = folder / rng.choice(_JSON_FILES)
    return _change_bytes(file, rng) if rng.random() < 0.4 else _change_value(file, rng)


def _change_value(file: Path, rng: random.Random) -> str:
    """One value of a JSON file replaced or left out."""
    content = json.loads(file.read_text())
    path = rng.choice([path for path in _paths(content) if len(path) < 5])
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    name = f'{file.name}, {".".join(map(str, path))}'
    if rng.random() < 0.2:
        del inner[path[-1]]
        what = f'{name} left out'
    else:
        inner[path[-1]] = value = rng.choice(_VALUES)
        what = f'{name} = {value!r}'
    file.write_text(json.dumps(content))
    return what


def _change_bytes(file: Path, rng: random.Random) -> str:
    data, what = (cut_short if rng.random() < 0.5 else flipped)(file.read_bytes(), rng)
    file.write_bytes(data)
    return f'{file.name}, {what}'


def _paths(content, path: tuple = ()):
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from _paths(value, (*path, key))
