"""Plays a bag's images and poses through DDS: serialised bytes go out as they were recorded, at a rate, with /clock."""
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from statekv_ros.errors import BagError
from statekv_ros.replay.bag_options import check_topic
from statekv_ros.replay.bag_reader import IMAGE_TYPES, BagImage, BagInfo, iterate_images
from statekv_ros.replay.cdr import restamped
from statekv_ros.replay.publishers import CLOCK_PERIOD_S, Publishers


@dataclass(frozen=True)
class PlayOptions:
    """How to play. Header stamps stay as recorded (and go back when a loop begins) unless `restamp`.

    rate: bag seconds per wall second; math.inf: as fast as reliable subscribers take the images.
    remap: other names for topics. clock: publish /clock, in bag time.
    reliable: what is offered. Reliable suits best-effort subscribers too, and waits for none of them.
    restamp: header stamps (and /clock) are the wall time of publishing, as with a live camera.
    wait_subscribers: do not begin before each topic has so many; BagError if they do not come within wait_s seconds.
    """

    rate: float = 1.0
    loop: bool = False
    remap: dict[str, str] = field(default_factory=dict)
    clock: bool = True
    reliable: bool = True
    restamp: bool = False
    wait_subscribers: int = 1
    wait_s: float = 30.0

    def __post_init__(self):
        if not self.rate > 0:
            raise BagError(f'rate must be a number above 0, or "max", got {self.rate}')
        if self.wait_subscribers < 0 or not self.wait_s >= 0:
            raise BagError(f'cannot wait for {self.wait_subscribers} subscribers for {self.wait_s} s: neither may be '
                           'negative')


@dataclass
class PlayReport:
    """What was played. wall_s and bag_s run from the first image to the last."""

    topics: Counter = field(default_factory=Counter)        # images published per (remapped) topic
    wall_s: float = 0.0
    bag_s: float = 0.0
    interrupted: bool = False

    @property
    def frames(self) -> int:
        return self.topics.total()

    @property
    def rate(self) -> float:
        """Bag seconds per wall second."""
        return self.bag_s / self.wall_s if self.wall_s else 0.0

    @property
    def frames_per_s(self) -> float:
        return (self.frames - 1) / self.wall_s if self.wall_s else 0.0


def play(info: BagInfo, topics: dict[str, str], options: PlayOptions = PlayOptions(), *,
         stop: threading.Event | None = None, on_frame: Callable[[BagImage], None] = lambda image: None,
         on_warning: Callable[[str], None] = lambda text: None, poses: dict[str, str] | None = None) -> PlayReport:
    """Play the images of `topics` (name -> type, from bag_reader.choose_topics) and report.

    stop: ends the playing when it is set. on_frame: called after each image. on_warning: told what may go wrong. poses: topics
    that are played along, from bag_reader.pose_topics.

    The ROS context is its own, so the caller's rclpy.init() does not matter; the environment must name the transport
    profile before (statekv_ros.transport). Raises BagError when no subscriber comes, or the bag turns out damaged.
    """
    stop = stop or threading.Event()
    poses = poses or {}
    names = {topic: options.remap.get(topic, topic) for topic in (*topics, *poses)}
    types = {names[topic]: kind for topic, kind in topics.items()}
    for name in names.values():
        try:
            check_topic(name)
        except BagError as error:
            raise BagError(f'{error}: give it another name, --remap {name}:=/NEW/NAME') from error
    if len(set(names.values())) < len(names):
        raise BagError(f'two topics cannot be played under one name: {names}')
    report = PlayReport()
    unpaced = math.isinf(options.rate)
    beside = {names[topic]: kind for topic, kind in poses.items()}
    with Publishers(types, options.reliable, options.clock, beside) as publishers:
        if publishers.wait_for_subscribers(options.wait_subscribers, options.wait_s, stop,
                                           lambda: time.time_ns() if options.restamp else info.start_ns):
            if unpaced and (names_lost := publishers.topics_without_flow_control()):
                on_warning(f'rate max follows reliable subscribers only: those of {", ".join(names_lost)} ask for '
                           'best-effort and may lose images')
            _publish_all(info, topics | poses, names, options, publishers, stop, report, on_frame)
            publishers.let_arrive(stop)
    report.interrupted = stop.is_set()
    return report


def _publish_all(info: BagInfo, topics: dict[str, str], names: dict[str, str], options: PlayOptions,
                 publishers: Publishers, stop: threading.Event, report: PlayReport, on_frame) -> None:
    began_s = None
    for image, elapsed_ns in _timeline(info, topics, options.loop):
        began_s = time.monotonic() if began_s is None else began_s
        due_s = began_s + elapsed_ns / 1e9 / options.rate       # an infinite rate makes all of them due now
        while (ahead_s := due_s - time.monotonic()) > 0 and not stop.is_set():
            publishers.tell_clock(_clock_ns(image, ahead_s, options))
            stop.wait(min(ahead_s, CLOCK_PERIOD_S))
        if stop.is_set():
            return
        publishers.tell_clock(_clock_ns(image, 0.0, options))
        cdr = restamped(image.cdr, time.time_ns()) if options.restamp else image.cdr
        publishers.publish(names[image.topic], cdr)
        if image.type not in IMAGE_TYPES:
            continue
        if math.isinf(options.rate):
            publishers.wait_until_taken(names[image.topic], stop)
        report.topics[names[image.topic]] += 1
        report.wall_s, report.bag_s = time.monotonic() - began_s, elapsed_ns / 1e9
        on_frame(image)


def _timeline(info: BagInfo, topics: dict[str, str], loop: bool) -> Iterator[tuple[BagImage, int]]:
    """Images with the bag time (ns) since the very first; loops follow each other one mean image period apart."""
    before_ns = 0
    while True:
        count, first_ns, begin_ns, end_ns, last_ns = 0, None, 0, 0, 0
        for image in iterate_images(info, topics):
            last_ns = image.log_ns
            first_ns = last_ns if first_ns is None else first_ns
            if image.type in IMAGE_TYPES:
                begin_ns, end_ns, count = begin_ns if count else last_ns, last_ns, count + 1
            yield image, before_ns + last_ns - first_ns
        if not loop:
            return
        # One image has no period; a tenth of a second keeps its loop from spinning.
        period_ns = (end_ns - begin_ns) // (count - 1) if count > 1 else 10**8
        before_ns += max(last_ns, end_ns + period_ns) - first_ns


def _clock_ns(image: BagImage, ahead_s: float, options: PlayOptions) -> int:
    """What /clock says `ahead_s` seconds before the image is published."""
    if options.restamp:
        return time.time_ns()
    return max(0, image.log_ns - round(ahead_s * options.rate * 1e9)) if ahead_s else image.log_ns
