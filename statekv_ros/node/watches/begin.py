"""The watches at the node's start: those of its parameters, and those that a restart brings back."""
from collections.abc import Callable
from pathlib import Path

from statekv_ros.backbones.base import Backbone
from statekv_ros.node.camera import Camera
from statekv_ros.node.disk import Disk
from statekv_ros.node.parameters import Parameters
from statekv_ros.node.watches.checks import Checks
from statekv_ros.node.watches.configured import configured
from statekv_ros.node.watches.kept import KeptWatches, answers_of
from statekv_ros.node.watches.table import WatchTable
from statekv_ros.node.watches.watch import Alert


def begin_watches(settings: Parameters, cameras: list[Camera], disk: Disk | None, folder: Path, backbone: Backbone,
                  tell: Callable[[Alert, str], None], log: Callable[[str], None]) -> tuple[Checks, KeptWatches | None]:
    """What checks the watches, and what keeps them, None where nothing does.

    Args:
        disk: writes them; None: they are not kept.
        folder: of the memory.
        backbone: whose answers they are.
        tell: takes each alert and the frame_id of its camera's newest image; called in the engine's thread.
        log: takes what did not come back, and what goes wrong.
    """
    by_name = {camera.name: camera for camera in cameras}
    table = WatchTable(by_name, settings['max_watches'])
    watches, _ = configured(settings.__getitem__)
    kept = KeptWatches(folder, answers_of(backbone), disk.submit, log) if disk is not None else None
    if kept is not None:
        kept.restore(table, watches)
    else:
        table.put(watches)
    checks = Checks(table, {name: camera.stream for name, camera in by_name.items()}, lambda: settings['watch_share'],
                    lambda: settings['evidence_frames'],
                    lambda alert: tell(alert, by_name[alert.definition.camera].frame_id),
                    lambda: kept.save(table) if kept is not None else None, log)
    return checks, kept
