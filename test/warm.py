"""Python programs in processes of their own that need not import torch and Transformers again, which takes seconds."""
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

_FORKS = multiprocessing.get_context('forkserver')
_FORKS.set_forkserver_preload(['statekv_ros.backbones'])    # nothing of ROS: each process begins its own


class WarmPython:
    """`python -m NAME ARGUMENTS` or `python -c SOURCE ARGUMENTS`, forked from a process that holds the libraries.

    To its owner it is what `subprocess.Popen` is. Python's own settings in `environment` (PYTHON...) come too late for it.
    """

    def __init__(self, command: list[str], environment: dict[str, str], output: Path):
        """output: file that gets stdout and stderr."""
        self._process = _FORKS.Process(target=_run, args=(command, environment, output), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As of `subprocess.Popen`: None while it runs, negative: ended by that signal."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, seconds: float | None = None) -> int:
        """The exit code; raises subprocess.TimeoutExpired."""
        self._process.join(seconds)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f'process {self.pid}', seconds)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(command: list[str], environment: dict[str, str], output: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with output.open('ab') as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
            stream.reconfigure(line_buffering=True)
    kind, program, *arguments = command
    sys.argv = [kind, *arguments]
    if kind == '-m':
        runpy.run_module(program, run_name='__main__', alter_sys=True)
    else:
        exec(compile(program, '<string>', 'exec'), {'__name__': '__main__'})
