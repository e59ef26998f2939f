"""What the launch files' text arguments mean, as node parameters. Knows neither launch nor rclpy."""
import re
from collections.abc import Iterable

NODE_NAME = 'statekv'

_NAME = re.compile(r'[A-Za-z][A-Za-z0-9_]*')
_TOPIC = re.compile(r'(~/|/)?[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*')
# What image topics commonly end in; what stands before names the camera.
_IMAGE_WORDS = re.compile(r'(/(image|image_raw|image_rect|image_color|image_rect_color|compressed|color|rgb))+$')


def parse_cameras(text: str) -> dict[str, str]:
    """Topic of each camera named in `front=/front/image_raw,rear=/rear/image_raw/compressed`, in that order.

    A name alone has an empty topic: the node's default for that camera. Raises ValueError naming the bad entry.
    """
    cameras: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(','))):
        name, equals, topic = (part.strip() for part in entry.partition('='))
        if not _NAME.fullmatch(name):
            raise ValueError(f'cameras: {name!r} in {text!r} is not a camera name: expected a letter, then letters, '
                             'digits and underscores, as in cameras:=front=/front/image_raw')
        if equals and not _TOPIC.fullmatch(topic):
            raise ValueError(f'cameras: {topic!r} in {text!r} is not a topic name: expected one as in '
                             f'cameras:={name}=/{name}/image_raw')
        if name in cameras:
            raise ValueError(f'cameras: {name!r} is there twice in {text!r}: give each camera a name of its own')
        cameras[name] = topic
    return cameras


def parse_switch(name: str, text: str) -> bool:
    """The launch argument `name` as a bool. Raises ValueError for anything but true and false (any case)."""
    if text.strip().lower() not in ('true', 'false'):
        raise ValueError(f'{name} must be true or false, got {text!r}')
    return text.strip().lower() == 'true'


def node_parameters(model: str, cameras: str, autostart: str, use_sim_time: str) -> dict[str, object]:
    """Node parameters that override the parameter file: those whose argument is not empty.

    Raises ValueError naming the argument that cannot be read.
    """
    parameters: dict[str, object] = {'model': model} if model else {}
    for name, text in (('autostart', autostart), ('use_sim_time', use_sim_time)):
        if text:
            parameters[name] = parse_switch(name, text)
    topics = parse_cameras(cameras)
    if topics:
        parameters['cameras'] = list(topics)
    return parameters | {f'{name}.topic': topic for name, topic in topics.items() if topic}


def cameras_of_topics(topics: Iterable[str]) -> dict[str, str]:
    """Topic of each camera that image topics tell of: `/front/image_raw` is camera `front`.

    Where a camera has several topics (raw and compressed), the one whose name sorts first is taken: the raw one.
    """
    cameras: dict[str, str] = {}
    for topic in sorted(topics):
        words = re.sub(r'[^A-Za-z0-9_]+', '_', _IMAGE_WORDS.sub('', topic)).strip('_')
        name = words if _NAME.fullmatch(words) else f'camera_{words}' if words else 'camera'
        cameras.setdefault(name, topic)
    return cameras


def absolute_topic(topic: str, namespace: str) -> str:
    """Full name of a topic that the node in `namespace` knows as `topic`."""
    if topic.startswith('/'):
        return topic
    relative = f'{NODE_NAME}/{topic[2:]}' if topic.startswith('~/') else topic
    return '/' + '/'.join(part for part in (namespace.strip('/'), relative) if part)


def format_cameras(cameras: dict[str, str]) -> str:
    """The text that `parse_cameras` reads as `cameras`."""
    return ','.join(f'{name}={topic}' if topic else name for name, topic in cameras.items())
