"""What an evaluation will do: policies, jobs, and a digest that tells one plan from another."""
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from statekv_ros.backbones.checkpoint import checkpoint_folder
from statekv_ros.backbones.weights import resolved
from statekv_ros.errors import EvaluationError, ParameterError, PolicyError
from statekv_ros.evaluation.offline import Offline
from statekv_ros.evaluation.schema import Video
from statekv_ros.memory import parse_answer_policy, parse_prefill_policy
from statekv_ros.memory.carried.positions import POSITIONS
from statekv_ros.memory.detailed.formats import FORMATS, RAW, find_format

RLIVS = 'rlivs'
CAPTIONS = 'captions'       # how the answers of rlivs are named: they are read from captions alone
# What may stand behind a prefill policy, as in statekv(64)/int4/native: for this policy alone, by the stream's argument.
_OPTIONS = {'detailed_format': tuple(form.name for form in FORMATS), 'positions': POSITIONS}


@dataclass(frozen=True)
class Policy:
    """One way to watch, and the ways to answer from it. `prefill` may be `rlivs` or `rlivs(norecurrence)`, whose one answer
    policy is called `captions`; else it may have options, as in `statekv(64)/int4`."""
    prefill: str
    answers: tuple[str, ...]

    @property
    def watching(self) -> str:
        """The prefill policy without its options."""
        return self.prefill.partition('/')[0]

    @property
    def options(self) -> dict[str, str]:
        """`detailed_format` and `positions`, as far as the policy names them."""
        return {name: word for word in self.prefill.split('/')[1:] for name, words in _OPTIONS.items() if word in words}

    @property
    def is_rlivs(self) -> bool:
        return self.prefill.startswith(RLIVS)


@dataclass(frozen=True)
class Job:
    """Videos to watch under one policy, several of them in lockstep, and the name of each one's result."""
    names: tuple[str, ...]
    videos: tuple[Video, ...]
    policy: Policy


@dataclass(frozen=True)
class Settings:
    """How an evaluation runs.

    Attributes:
        model: checkpoint directory, hub id or 'patrol'; device, dtype, weights: as for `load_backbone`.
        mode: 'offline' or 'online'; rate: bag seconds per second, online.
        max_tokens: of an answer.
        threads: of the CPU, per process; not part of the digest.
        lockstep: videos that are watched at once.
        detailed_format: how the detailed cache is stored, where a policy does not say.
        ask_alone: in lockstep, ask no videos together.
        watching: layout, RoPE, positions and size of frames.
        skip_broken: a video that cannot be read is an error in the report, and no reason to stop; not part of the digest.

    Raises:
        ParameterError: a value is out of its range.
    """
    model: str
    device: str = 'auto'
    dtype: str = 'auto'
    mode: str = 'offline'
    rate: float = 1.0
    max_tokens: int = 64
    threads: int = 1
    lockstep: int = 1
    detailed_format: str = RAW.name
    ask_alone: bool = False
    weights: str = 'auto'
    watching: Offline = Offline()
    skip_broken: bool = False

    def __post_init__(self):
        find_format(self.detailed_format)
        resolved(self.weights)
        for name in ('rate', 'max_tokens', 'threads', 'lockstep'):
            if not 0 < getattr(self, name) < float('inf'):
                raise ParameterError(f'--{name.replace("_", "-")} must be a positive number, got {getattr(self, name)}')


def parse_policies(texts: Sequence[str]) -> list[Policy]:
    """Parse `PREFILL x ANSWER` pairs (a bare PREFILL means `x all`) and `rlivs`; pairs of one prefill policy become one.
    Options may follow PREFILL, a format or a position policy each: `statekv(64)/int4/native`.

    Raises:
        PolicyError: a policy that is unknown, stands there twice, or cannot be answered from.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        prefill, answer = _parse_pair(text)
        if answer in found.setdefault(prefill, []):
            raise PolicyError(f'policy {text!r} stands there twice')
        found[prefill].append(answer)
    if not found:
        raise PolicyError('no policies given: name at least one, as in --policies "statekv(64) x all"')
    return [Policy(prefill, tuple(answers)) for prefill, answers in found.items()]


def make_jobs(videos: Sequence[Video], policies: Sequence[Policy], lockstep: int = 1) -> list[Job]:
    """One job for each policy and `lockstep` videos that follow each other; the jobs of the same videos follow each other.

    Captions differ in length from video to video, so those of rlivs are watched one by one.
    """
    jobs = []
    for first in range(0, len(videos), lockstep):
        group = range(first, min(first + lockstep, len(videos)))
        for policy in policies:
            for rows in ([row] for row in group) if policy.is_rlivs else (group,):
                names = (f'{row:04d}-{slug(Path(videos[row].source).name)[:60]}-{slug(policy.prefill)}' for row in rows)
                jobs.append(Job(tuple(names), tuple(videos[row] for row in rows), policy))
    return jobs


def describe(settings: Settings, videos: Sequence[Video], policies: Sequence[Policy], frames: Sequence[int]) -> dict:
    """The plan as it is kept in run.json; `digest` differs whenever results might.

    Args:
        frames: how many of each video will be watched.

    Raises:
        EvaluationError: the model's files cannot be read.
    """
    plan = {'model': settings.model, 'model_digest': model_digest(settings.model), 'mode': settings.mode,
            'rate': settings.rate if settings.mode == 'online' else None, 'device': settings.device, 'dtype': settings.dtype,
            'weights': settings.weights, 'max_tokens': settings.max_tokens, 'lockstep': settings.lockstep,
            'detailed_format': settings.detailed_format, 'ask_alone': settings.ask_alone, **asdict(settings.watching),
            'policies': [{'prefill': policy.prefill, 'answers': list(policy.answers)} for policy in policies],
            'videos': [video.as_dict() | {'frames': n} for video, n in zip(videos, frames, strict=True)]}
    told = {name: value for name, value in plan.items() if name != 'model'}     # a model may move
    return {'digest': hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest(), **plan,
            'jobs': [name for job in make_jobs(videos, policies, settings.lockstep) for name in job.names]}


def model_digest(model: str) -> str:
    """SHA-256 over the names and contents of a checkpoint's JSON, vocabulary and safetensors files.

    Raises:
        EvaluationError: they cannot be read.
    """
    digest = hashlib.sha256()
    try:
        folder = checkpoint_folder(model)
        for file in sorted(file for file in folder.iterdir() if file.suffix in ('.json', '.txt', '.model', '.safetensors')):
            digest.update(file.name.encode())
            with file.open('rb') as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    except OSError as error:
        raise EvaluationError(f'model {model!r} cannot be read: {error}') from error
    return digest.hexdigest()


def _parse_pair(text: str) -> tuple[str, str]:
    prefill, times, answer = (part.strip() for part in text.partition(' x '))
    if prefill.startswith(RLIVS):
        from statekv_ros.evaluation.rlivs import parse_rlivs
        if times:
            raise PolicyError(f'{RLIVS} answers from its captions only, so it takes no answer policy: got {text!r}')
        return (RLIVS if parse_rlivs(prefill) else f'{RLIVS}(norecurrence)'), CAPTIONS
    watching, *options = (part.strip() for part in prefill.split('/'))
    answering = parse_answer_policy(answer if times else 'all')
    return '/'.join([str(parse_prefill_policy(watching)), *_in_order(options, text)]), str(answering)


def _in_order(options: Sequence[str], text: str) -> list[str]:
    """Options as they stand in a name, so that two ways to write one policy are one."""
    chosen = [[word for word in options if word in words] for words in _OPTIONS.values()]
    if sum(map(len, chosen)) < len(options) or any(len(words) > 1 for words in chosen):
        known = ', or one of '.join(', '.join(words) for words in _OPTIONS.values())
        raise PolicyError(f'behind each "/" of a prefill policy stands one of {known}, and none twice: got {text!r}')
    return [word for words in chosen for word in words]


def slug(text: str) -> str:
    """Text as a part of a file's name."""
    return re.sub(r'[^A-Za-z0-9.]+', '_', text).strip('_')
