"""A few answers with the frames that they are about, right ones and wrong ones, to look at."""
import base64
from collections.abc import Iterable, Sequence

import cv2
import numpy as np

from statekv_ros.errors import StateKVError
from statekv_ros.evaluation.footage import open_footage
from statekv_ros.evaluation.schema import Video

_EACH = 3               # of right ones and of wrong ones
_WIDTH = 240            # pixels
_BEFORE_S = 1.0         # the frame on show when a question was asked is at most so old


def samples(jobs: Iterable[dict], videos: Sequence[Video], policy: dict) -> list[dict]:
    """Answers under a policy, each of another kind of question as far as there are so many.

    Returns:
        [{'right', 'kind', 'question', 'answer', 'accepted', 'time_s', 'looked', 'jpeg'}]: `jpeg` in base64 is the frame at
        `time_s`, which the answer looked at most if `looked`, else the one on show when it was asked.
    """
    by_title = {video.title: video for video in videos}
    told = [(by_title[job['source']], answer) for job in jobs for answer in job['answers'] if job['source'] in by_title
            and (job['prefill_policy'], answer['answer_policy'], job['mode']) == (policy['prefill'], policy['answer'], policy['mode'])]
    found = []
    for right in (True, False):
        kinds: dict[str, tuple[Video, dict]] = {}
        for video, answer in told:
            if answer['right'] is right:
                kinds.setdefault(answer['kind'], (video, answer))
        for video, answer in list(kinds.values())[:_EACH]:
            looked = bool(answer['evidence'])
            time_s = answer['evidence'][0][0] if looked else max(0.0, answer['ask_at'] - _BEFORE_S)
            if (frame := _frame(video, time_s)) is not None:
                found.append({'right': right, 'kind': answer['kind'], 'question': answer['text'], 'answer': answer['answer'],
                              'accepted': answer['accepted'], 'time_s': time_s, 'looked': looked, 'jpeg': _jpeg(frame)})
    return found


def _frame(video: Video, time_s: float) -> np.ndarray | None:
    try:
        return next((frame for _, _, frame in open_footage(video).clip(time_s)), None)
    except StateKVError:        # a source that has gone since costs a picture, not the report
        return None


def _jpeg(frame: np.ndarray) -> str:
    height, width = frame.shape[:2]
    small = cv2.resize(frame, (_WIDTH, max(1, round(height * _WIDTH / width))), interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode('.jpg', cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    return base64.b64encode(data.tobytes()).decode()
