"""A question's and a watch's arguments, checked before a message takes them: rclpy's errors name neither argument nor remedy."""
import math
from numbers import Integral, Real

from builtin_interfaces.msg import Time
from geometry_msgs.msg import PointStamped
from rclpy.time import Time as ClockTime

from statekv_ros.action import Ask
from statekv_ros.srv import Frames, Watch

_MAX_TOKENS = 65536
_LARGEST = 3.4e38       # of a float32


def make_goal(question: str, camera: str, timeout_s: float, max_tokens: int, temperature: float, seed: int, answer_policy: str,
              from_stamp, to_stamp, near=None, within_m: float = 0.0, with_images: bool = False) -> Ask.Goal:
    """The goal with these fields; what they may be is in `StateKVClient.ask`.

    Raises:
        ValueError: a value that cannot work; says which, and what was expected.
    """
    _require_texts(question=question, camera=camera, answer_policy=answer_policy)
    _require(_is_number(timeout_s) and 0 < timeout_s < _LARGEST, 'timeout_s', 'a positive number of seconds', timeout_s)
    _require(_is_number(temperature) and 0 <= temperature < _LARGEST, 'temperature', '0 (greedy) or a positive number',
             temperature)
    _require(_is_whole(max_tokens) and 0 <= max_tokens <= _MAX_TOKENS, 'max_tokens',
             f"a whole number from 0 (the node's default) to {_MAX_TOKENS}", max_tokens)
    _require(_is_whole(seed) and 0 <= seed < 2**64, 'seed', 'a whole number from 0 to 2**64 - 1', seed)
    _require(_is_number(within_m) and 0 <= within_m < _LARGEST, 'within_m', '0 (not cut by place) or a positive number of metres',
             within_m)
    _require(isinstance(with_images, bool), 'with_images', 'True or False', with_images)
    expected = '0 where near is not given' if near is None else 'above 0 where near is given'
    _require((near is None) == (within_m == 0), 'within_m', expected, within_m)
    return Ask.Goal(question=question, camera=camera, timeout_s=float(timeout_s), max_tokens=int(max_tokens),
                    temperature=float(temperature), seed=int(seed), answer_policy=answer_policy,
                    from_stamp=_stamp('from_stamp', from_stamp), to_stamp=_stamp('to_stamp', to_stamp),
                    near=_point(near), within_m=float(within_m), with_images=with_images)


def make_request(stamps, camera: str, from_stamp, to_stamp, max_images: int, tolerance_s: float) -> Frames.Request:
    """The request for pictures with these fields; what they may be is in `StateKVClient.frames`.

    Raises:
        ValueError: as `make_goal`.
    """
    most = Frames.Request.MOST_IMAGES
    _require_texts(camera=camera)
    _require(isinstance(stamps, (list, tuple)) and len(stamps) <= most, 'stamps', f'a list of at most {most} header stamps',
             stamps)
    _require(_is_whole(max_images) and 0 <= max_images <= most, 'max_images', f'a whole number from 0 (16) to {most}', max_images)
    _require(_is_number(tolerance_s) and 0 <= tolerance_s < _LARGEST, 'tolerance_s',
             '0 (as far as the nearest is) or a positive number of seconds', tolerance_s)
    for stamp in stamps:
        _require(isinstance(stamp, (Time, ClockTime)), 'stamps', 'header stamps (builtin_interfaces.msg.Time)', stamp)
    return Frames.Request(camera=camera, stamps=[_stamp('stamps', stamp) for stamp in stamps], max_images=int(max_images),
                          from_stamp=_stamp('from_stamp', from_stamp), to_stamp=_stamp('to_stamp', to_stamp),
                          tolerance_s=float(tolerance_s))


def make_watch(question: str, camera: str, condition: str, every_steps: int, every_s: float, debounce: int, expires_s: float,
               max_tokens: int, answer_policy: str) -> Watch.Request:
    """The request with these fields; what they may be is in `StateKVClient.watch`.

    Raises:
        ValueError: a value that cannot work; says which, and what was expected.
    """
    _require_texts(question=question, camera=camera, condition=condition, answer_policy=answer_policy)
    for name, value in (('every_steps', every_steps), ('debounce', debounce), ('max_tokens', max_tokens)):
        _require(_is_whole(value) and 0 <= value < 2**32, name, 'a whole number from 0', value)
    for name, value in (('every_s', every_s), ('expires_s', expires_s)):
        _require(_is_number(value) and 0 <= value < _LARGEST, name, '0 or a positive number of seconds', value)
    return Watch.Request(question=question, camera=camera, condition=condition, every_steps=int(every_steps),
                         every_s=float(every_s), debounce=int(debounce), expires_s=float(expires_s),
                         max_tokens=int(max_tokens), answer_policy=answer_policy)


def _require_texts(**texts: str) -> None:
    for name, value in texts.items():
        _require(isinstance(value, str), name, 'a string', value)
        # What Python lets stand in a string (half a surrogate pair), UTF-8 has no bytes for.
        _require(_encodes(value), name, 'text that UTF-8 can express', value)
    if not texts.get('question', 'some').strip():
        raise ValueError('question is empty: ask something')


def _stamp(name: str, value) -> Time:
    if value is None:
        return Time()
    if isinstance(value, ClockTime):
        return value.to_msg()
    _require(isinstance(value, Time), name, 'a header stamp (builtin_interfaces.msg.Time), an rclpy.time.Time or None', value)
    return value


def _point(near) -> PointStamped:
    if near is None:
        return PointStamped()
    _require(isinstance(near, PointStamped), 'near', 'a point (geometry_msgs.msg.PointStamped) or None', near)
    point = near.point
    _require(all(map(math.isfinite, (point.x, point.y, point.z))), 'near', 'a point of finite numbers', near)
    _require(bool(near.header.frame_id), 'near', 'a point whose header.frame_id says in which frame it is', near)
    return near


def _require(holds: bool, name: str, expected: str, value) -> None:
    if not holds:
        text = repr(value)
        raise ValueError(f'{name} must be {expected}, got {text if len(text) <= 80 else text[:77] + "..."}')


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def _is_whole(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _encodes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
