"""The report of a shift: asks the same questions about each stretch of it, and writes a Markdown table.

    python report_of_a_shift.py 'how many people are in view?' 'is the door open?' --every 600 --camera front > report.md

Each line tells the stretch, the answer, and the moment that the answer looked at most, with the place if that is known.
"""
import argparse
import sys
from datetime import datetime, timezone

import rclpy
from builtin_interfaces.msg import Time
from rclpy.utilities import remove_ros_args

from statekv_ros.client import Result, StateKVClient


def stamp(seconds: float) -> Time:
    return Time(sec=int(seconds), nanosec=int(seconds % 1 * 1e9))


def seconds(time: Time) -> float:
    return time.sec + time.nanosec / 1e9


def clock(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).strftime('%H:%M:%S')


def line(start: float, end: float, question: str, reply) -> str:
    """One row; the reason where there is no answer."""
    if reply.result is not Result.SUCCEEDED:
        return f'| {clock(start)} - {clock(end)} | {question} | *{reply.error}* | | |'
    answer = reply.answer
    best = answer.evidence[0] if answer.evidence else None
    place = f'{best.pose.pose.position.x:.1f}, {best.pose.pose.position.y:.1f}' if best and best.has_pose else ''
    return (f'| {clock(start)} - {clock(end)} | {question} | {answer.text} | '
            f'{clock(seconds(best.last_stamp)) if best else ""} | {place} |')


def main() -> int:
    parser = argparse.ArgumentParser(description='ask the same questions about each stretch of a shift')
    parser.add_argument('questions', nargs='+')
    parser.add_argument('--camera', default='', help='name of one camera; all when left out')
    parser.add_argument('--every', type=float, default=600.0, help='seconds of a stretch')
    arguments = parser.parse_args(remove_ros_args(sys.argv)[1:])
    rclpy.init(args=sys.argv)
    with StateKVClient() as memory:
        if not memory.wait_until_ready(30.0):
            sys.exit('no memory node was found')
        # One token is enough to hear what the memory covers.
        covered = memory.ask(arguments.questions[0], arguments.camera, max_tokens=1)
        if covered.result is not Result.SUCCEEDED:
            sys.exit(covered.error)
        first, last = seconds(covered.answer.first_stamp), seconds(covered.answer.last_stamp)
        print(f'# {datetime.fromtimestamp(first, timezone.utc):%Y-%m-%d}, {covered.answer.frames_covered} frames of '
              f'{covered.answer.camera}\n\n| time (UTC) | question | answer | seen at | place (m) |\n|---|---|---|---|---|')
        start = first
        while start <= last:
            end = min(start + arguments.every, last)
            for question in arguments.questions:
                reply = memory.ask(question, arguments.camera, from_stamp=stamp(start), to_stamp=stamp(end))
                print(line(start, end, question, reply), flush=True)
            start += arguments.every
    rclpy.shutdown()
    return 0


if __name__ == '__main__':
    sys.exit(main())
