"""All jobs of a plan that are not done yet: one after the other in this process, or side by side on a Ray cluster."""
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

from statekv_ros.backbones.family import Family
from statekv_ros.errors import EvaluationError, ParameterError, StateKVError
from statekv_ros.evaluation import LOCAL_RAY
from statekv_ros.evaluation.footage import Extent, open_footage
from statekv_ros.evaluation.lockstep_run import Group, run_together
from statekv_ros.evaluation.plan import Job, Policy, Settings
from statekv_ros.evaluation.run import run_job
from statekv_ros.evaluation.schema import Video
from statekv_ros.evaluation.store import RunFolder
from statekv_ros.memory.trial import try_out

Results = Iterable[list[dict]]
_TRIES = 3      # workers that a job may take with it


class Worker:
    """Holds a loaded model, `backbone`, and runs jobs on it with `detailed_format`; on Ray, each is an actor."""

    def __init__(self, settings: Settings):
        torch.set_num_threads(settings.threads)
        self._watching = settings.watching
        self.backbone = self._watching.load(settings.model, settings.device, settings.dtype, settings.weights)
        try_out(self.backbone)
        self._max_tokens, self._ask_alone = settings.max_tokens, settings.ask_alone
        self._skip_broken = settings.skip_broken
        self.detailed_format = settings.detailed_format
        self.positions = self._watching.position_policy()
        self._group: Group | None = None
        self._extents: dict[Video, Extent] = {}

    def fitted(self, policy: Policy, video: Video, extent: Extent | None = None) -> Family:
        """The model as a policy watches a video with it; see `Offline.fitted`.

        Args:
            extent: of the video; None: look through it, where that has not been done.

        Raises:
            EvaluationError: its RoPE is scaled for fewer positions than it needs.
        """
        if not self._watching.scales:
            return self.backbone
        if video not in self._extents:
            self._extents[video] = extent if video.exact and extent else open_footage(video).extent()
        extent = self._extents[video]
        questions = [text for question in video.questions for text in (question.text, question.retrieve_by)]
        seconds = [time_s - video.begin_s for time_s in extent.seconds
                   if video.begin_s <= time_s and (video.end_s is None or time_s <= video.end_s)]
        # Captions are read at positions of their own, which have a bound.
        positions = 'contiguous' if policy.is_rlivs else policy.options.get('positions', '')
        try:
            return self._watching.fitted(self.backbone, seconds, extent.height, extent.width, questions, self._max_tokens,
                                         positions)
        except ParameterError as error:
            raise EvaluationError(f'{video.place or video.source}: {error}') from error

    def run(self, job: Job) -> list[dict]:
        """The results of a job, one for each of its videos.

        Raises:
            EvaluationError: a source or a question turned out bad on the way, or its videos cannot be watched together, and that
                is not to be skipped.
        """
        try:
            return self._run(job)
        except StateKVError as error:
            if not self._skip_broken:
                raise
            return [failed(name, video, job, str(error)) for name, video in zip(job.names, job.videos)]

    def _run(self, job: Job) -> list[dict]:
        backbones = {backbone.max_position: backbone for backbone in (self.fitted(job.policy, video) for video in job.videos)}
        if len(backbones) > 1:
            raise EvaluationError(f'{job.videos[0].source} and the videos after it need their RoPE scaled for {min(backbones)} to '
                                  f'{max(backbones)} positions, so they cannot go in lockstep: leave --lockstep out, or set '
                                  f'--rope-length to {max(backbones)}')
        [backbone] = backbones.values()
        if len(job.videos) == 1:
            return [run_job(backbone, job, self._max_tokens, self.detailed_format, self.positions)]
        if self._group is None or self._group.videos != job.videos:
            self._group = None      # one at a time: its frames take memory
            self._group = Group(backbone, job.videos)
        return run_together(self._group, job, self._max_tokens, self.detailed_format, self._ask_alone, self.positions)


def failed(name: str, video: Video, job: Job, error: str) -> dict:
    """The result of a video that could not be watched or asked: no answer of it is right or wrong."""
    return {'job': name, 'source': video.title, 'prefill_policy': job.policy.prefill, 'error': error,
            'unanswered': len(video.questions) * len(job.policy.answers)}


def run_all(jobs: Sequence[Job], folder: RunFolder, results: Callable[[Sequence[Job]], Results]) -> None:
    """Run the jobs whose results are not in the folder, and keep each result as it comes.

    Args:
        results: from jobs to their results, in any order: `in_process(...)`, `on_ray(...)` or the online mode.
    """
    left = [job for job in jobs if not folder.has(job.names)]
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), unit='job', disable=None) as bar:
        for made in results(left) if left else ():
            for result in made:
                folder.save(result)
            bar.update()


def in_process(worker: Worker, jobs: Sequence[Job]) -> Iterator[list[dict]]:
    """The results of jobs, one after the other."""
    for job in jobs:
        yield worker.run(job)


def check_ray() -> None:
    """Raises EvaluationError when Ray is not installed."""
    if importlib.util.find_spec('ray') is None:
        raise EvaluationError("--ray needs the package ray, which is not installed: pip install 'statekv_ros[ray]', or leave "
                              '--ray out; the results are the same')


def on_ray(settings: Settings, address: str, jobs: Sequence[Job]) -> Iterator[list[dict]]:
    """The results of jobs, in the order in which they are done, from as many workers as the cluster has room for. A worker that
    dies costs the job that it was at, which another one does again.

    Every machine needs this package, the model and the sources under the same paths; results come back to this process.

    Args:
        address: of a running cluster, or LOCAL_RAY to start one on this machine for the time being.

    Raises:
        EvaluationError: Ray is missing or not to be reached, or a job failed.
    """
    check_ray()
    import ray
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address == LOCAL_RAY else None,
                 configure_logging=False)
    except Exception as error:   # Ray raises whatever its parts do
        raise EvaluationError(f'no Ray cluster at {address!r}: {" ".join(str(error).split())}') from error
    try:
        room = ray.cluster_resources()
        on_gpu = room.get('GPU', 0) >= 1 and settings.device != 'cpu'
        slots = room['GPU'] if on_gpu else room.get('CPU', 1) / settings.threads
        actor = ray.remote(num_cpus=settings.threads, num_gpus=int(on_gpu))(Worker)
        # A worker without a GPU of its own must not look for one.
        told = settings if on_gpu else replace(settings, device='cpu')
        waiting, lost, running = list(jobs), Counter(), {}

        def go_on(worker) -> None:
            if waiting:
                job = waiting.pop(0)
                running[worker.run.remote(job)] = worker, job

        for _ in range(max(1, min(int(slots), len(jobs)))):
            go_on(actor.remote(told))
        while running:
            [done], _ = ray.wait(list(running), num_returns=1)
            worker, job = running.pop(done)
            try:
                results = ray.get(done)
            except ray.exceptions.RayActorError as error:       # killed, out of memory, or its machine is gone
                lost[job.names] += 1
                if lost[job.names] == _TRIES:
                    raise EvaluationError(f'{job.names[0]}: {_TRIES} workers died of it, the last one so: '
                                          f'{" ".join(str(error).split())}') from error
                waiting.append(job)
                worker, results = actor.remote(told), None
            go_on(worker)
            if results is not None:
                yield results
    except ray.exceptions.RayTaskError as error:
        raise EvaluationError(str(error.cause)) from error
    except ray.exceptions.RayError as error:
        raise EvaluationError(f'Ray failed: {" ".join(str(error).split())}') from error
    finally:
        ray.shutdown()
