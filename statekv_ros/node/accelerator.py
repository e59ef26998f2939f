"""What /diagnostics says of the device that computes: kernels it has to do without, what is not replayed, the warm-up."""
import torch
from rclpy.impl.rcutils_logger import RcutilsLogger

from statekv_ros.backbones import Backbone
from statekv_ros.memory import PrefillPolicy, VideoStream
from statekv_ros.memory.together import Together
from statekv_ros.memory.warmup import WarmUp, problems, warm_up


def prepare(backbone: Backbone, policy: PrefillPolicy, frame_size: tuple[int, int], positions: str, detailed_format: str,
            cameras: int, log: RcutilsLogger) -> WarmUp | None:
    """Warm up, and say what came of it; arguments and result as of `warm_up`."""
    warm = warm_up(backbone, policy, frame_size, positions, detailed_format, cameras)
    if warm is not None:
        # rclpy wants a place in the code to log at one level only.
        if warm.problems:
            log.warning(str(warm))
        else:
            log.info(str(warm))
    return warm


class Accelerator:
    """The device of a configured node; asked from the thread that publishes diagnostics."""

    def __init__(self, device: torch.device, streams: dict[str, VideoStream], together: Together, warm: WarmUp | None):
        """streams: by camera; together: steps them; warm: None where nothing had to be warmed up."""
        self._device, self._streams, self._together, self._warm = device, streams, together, warm

    @property
    def problem(self) -> str:
        """What makes it slower than it could be; '' when nothing does."""
        told = list(problems(self._device))
        for name, stream in self._streams.items():
            told += [f'camera {name}: {recorded.problem}'
                     for recorded in (stream.graphs, stream.commits, stream.decodes) if recorded and recorded.problem]
        if problem := self._together.problem:
            told.append(problem)
        return '; '.join(told)

    def facts(self) -> dict:
        """For the engine's status; nothing on a CPU."""
        if self._warm is None:
            return {}
        graphs = [*(stream.graphs for stream in self._streams.values()), self._together.graphs]
        return {'attention': 'naive' if problems(self._device) else 'triton', 'warm_up_s': round(self._warm.seconds, 1),
                'replayed_steps': sum(each.replays for each in graphs if each is not None),
                'replayed_tokens': sum(each.decodes.replays for each in self._streams.values() if each.decodes is not None)}
