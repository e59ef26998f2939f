"""Where the package's data files are: config/, launch/ and models/ beside the source tree, or in the installed share folder."""
import os
import sys
from pathlib import Path


def find_share(path: str) -> Path | None:
    """A data file or folder of the package by its path in the source tree, as 'config/statekv.yaml'; None when not found."""
    prefixes = [*filter(None, os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep)), sys.prefix]
    roots = [Path(__file__).resolve().parents[1], *(Path(prefix) / 'share' / 'statekv_ros' for prefix in prefixes)]
    return next((root / path for root in roots if (root / path).exists()), None)
