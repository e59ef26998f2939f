"""Small data sets in the formats of lmms-eval's own tasks: their columns, their folders, videos of two seconds."""
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import yaml

LETTERS = 'ABCD'


def tasks_folder() -> Path:
    """The harness's own tasks."""
    import lmms_eval
    return Path(lmms_eval.__file__).parent / 'tasks'


def write_video(path: Path, frames: Iterable[np.ndarray], rate_hz: int) -> Path:
    """Without loss, so that every reader sees the same pictures; frames are uint8 [height, width, 3] RGB."""
    import av
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264rgb', rate=rate_hz, options={'qp': '0', 'preset': 'ultrafast'})
        stream.pix_fmt = 'rgb24'
        for frame in frames:
            stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
        container.mux(stream.encode())
    return path


def moving_square(seed: int, frames: int = 16, side: int = 64) -> list[np.ndarray]:
    """Noise with a square that drifts, so that no two frames are alike."""
    random = np.random.default_rng(seed)
    pictures = [random.integers(0, 90, (side, side, 3), dtype=np.uint8) for _ in range(frames)]
    for index, picture in enumerate(pictures):
        picture[index % 48:index % 48 + 16, 8:40] = (200, (40 + 6 * index) % 256, 20 * seed % 256)
    return pictures


class Datasets:
    """A folder with videos, documents and task files.

    Attributes:
        home: to be HF_HOME; tasks: for --include_path.
    """

    def __init__(self, folder: Path):
        self.folder, self.home, self.tasks = folder, folder / 'home', folder / 'tasks'
        self.tasks.mkdir(parents=True)

    def videomme(self, name: str, videos: Sequence[str], questions: int = 2) -> None:
        """The task `name`, videomme's in all but its documents: so many questions about each video."""
        documents = [{'video_id': f'{number:03d}', 'duration': 'short', 'domain': 'Knowledge', 'sub_category': 'Astronomy',
                      'url': '', 'videoID': video, 'question_id': f'{number:03d}-{turn}', 'task_type': 'Counting Problem',
                      'question': f'How many squares are there in part {turn + 1}?',
                      'options': [f'{letter}. {count}.' for count, letter in enumerate(LETTERS)], 'answer': LETTERS[turn]}
                     for number, video in enumerate(videos) for turn in range(questions)]
        self._add(name, documents, 'videomme/videomme.yaml')

    def mlvu(self, name: str, videos: Sequence[str]) -> None:
        """As `videomme`, for mlvu_dev."""
        documents = [{'video_name': f'{video}.mp4', 'duration': 2, 'question': f'What drifts?\n(A) {kind}\n(B) nothing',
                      'candidates': [kind, 'nothing'], 'answer': 'A', 'task_type': task}
                     for video in videos for kind, task in (('a square', 'plotQA'), ('noise', 'count'))]
        self._add(name, documents, 'mlvu/mlvu_dev.yaml')

    def ovobench(self, name: str, part: str, chunks: Path, ids: Sequence[int]) -> None:
        """As `videomme`, for `part` of ovobench: backward, realtime or forward, with chunks of video named by the ids."""
        documents = [{'id': each, 'task': {'backward': 'EPM', 'realtime': 'OJR'}[part], 'video': f'{each}.mp4', 'realtime': 2,
                      'question': 'What did drift?', 'answer': 'a square', 'options': ['noise', 'a square'], 'gt': 1}
                     for each in ids] if part != 'forward' else [
                    {'id': each, 'task': 'SSR', 'video': f'{each}.mp4', 'test_info': [
                        {'realtime': 1, 'type': 0, 'step': 'draw a square'}, {'realtime': 2, 'type': 1, 'step': 'move it'}]}
                    for each in ids]
        self._add(name, documents, f'ovobench/ovo_{part}.yaml', dataset_name=None,
                  lmms_eval_specific_kwargs={'default': {'data_dir': str(chunks)}})

    def _add(self, name: str, documents: list[dict], task_file: str, **changes) -> None:
        """The task `name`: the harness's own, with other documents."""
        data = self.folder / 'documents' / name
        data.mkdir(parents=True)
        (data / 'test.jsonl').write_text(''.join(json.dumps(document) + '\n' for document in documents))
        (self.tasks / f'{name}.yaml').write_text(yaml.safe_dump(
            {'include': str(tasks_folder() / task_file), 'task': name, 'dataset_path': str(data), **changes}))
