"""Image sizes as benchmarks take them."""
import re

from statekv_ros.errors import ParameterError


def parse_size(option: str, text: str) -> tuple[int, int]:
    """(width, height) in pixels, from 640x480.

    Raises:
        ParameterError: it is no size; names the option.
    """
    if not (match := re.fullmatch(r'\s*([1-9]\d*)x([1-9]\d*)\s*', text)):
        raise ParameterError(f'{option} must be WIDTHxHEIGHT in pixels, for example 640x480, got {text!r}')
    return int(match[1]), int(match[2])
