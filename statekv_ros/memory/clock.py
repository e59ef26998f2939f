"""Wall time of the phases of a step, without stopping the GPU between them."""
import time

import torch


class PhaseClock:
    """Marks moments on the device's own time line; reading them waits once, at the end."""

    def __init__(self, device: torch.device):
        self._cuda, self._device = device.type == 'cuda', device
        self._marks: list = []
        self.mark()

    def mark(self) -> None:
        """Note the present moment."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))   # the present device may be another one
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def phases_ms(self) -> list[float]:
        """Durations between successive marks, in ms; waits for the device to reach the last one."""
        if not self._cuda:
            return [(b - a) * 1e3 for a, b in zip(self._marks, self._marks[1:])]
        self._marks[-1].synchronize()
        return [a.elapsed_time(b) for a, b in zip(self._marks, self._marks[1:])]
