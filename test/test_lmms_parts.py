"""What the model `statekv` of lmms-eval is made of: messages, ways to decode, frames of videos."""
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('lmms_eval', reason='lmms-eval is not installed: its tests run with "make test-lmms"')

from lmms_data import moving_square, write_video  # noqa: E402
from statekv_ros.errors import BagError, EvaluationError, ParameterError  # noqa: E402
from statekv_ros.lmms.generation import Generation, parse_generation  # noqa: E402
from statekv_ros.lmms.requests import from_messages  # noqa: E402
from statekv_ros.lmms.sampling import frame_indices  # noqa: E402
from statekv_ros.lmms.video import DECODERS, check_video  # noqa: E402


@pytest.mark.parametrize('roles, contents, message', [
    (('user',), [[('text', 'first'), ('video', 'v')]], 'text before its video'),
    (('user',), [[('video', 'v'), ('video', 'v'), ('text', 'which?')]], 'must have one video, a file, got video, video'),
    (('user',), [[('image', 'v'), ('text', 'what?')]], 'got image'),
    (('user',), [[('video', 'v')]], 'has no question'),
    (('system', 'user'), [[('text', 'be brief')], [('video', 'v'), ('text', 'what?')]], 'system_prompt='),
    (('user', 'assistant'), [[('video', 'v'), ('text', 'what?')], [('text', 'a cat')]], 'leave few-shot out'),
])
def test_messages_that_are_not_one_video_and_a_question_are_refused(roles, contents, message, tmp_path):
    (tmp_path / 'v').touch()
    with pytest.raises(EvaluationError, match=message):
        from_messages(chat(roles, contents, tmp_path), 'a place', {})


def chat(roles, contents, folder: Path) -> list[dict]:
    return [{'role': role, 'content': [{'type': kind, **({'text': what} if kind == 'text' else {'url': str(folder / what)})}
                                       for kind, what in content]} for role, content in zip(roles, contents)]


def test_pieces_of_text_become_one_question(tmp_path):
    (tmp_path / 'v').touch()
    messages = chat(('user',), [[('video', 'v'), ('text', 'What '), ('text', 'is it?')]], tmp_path)
    request = from_messages(messages, 'a place', {'max_new_tokens': 5, 'until': ['\n', '.']})
    assert (request.question, request.generation) == ('What is it?', Generation(5, 0.0, ('\n', '.')))


def test_blank_space_before_an_answer_is_no_stop():
    generation = Generation(16, 0., ('\n\n', 'D'))
    assert [generation.cut(text) for text in ('\n\n B\n\nmore', ' CD', '\n\nA', ' A')] == ['B', 'C', '\n\nA', ' A']


@pytest.mark.parametrize('kwargs, message', [({'num_beams': 3}, 'num_beams must be 1, got 3'),
                                             ({'max_new_tokens': 0}, 'max_new_tokens must be'),
                                             ({'temperature': .7, 'top_p': .9}, 'top_p and top_k are not known here')])
def test_ways_to_decode_that_there_are_not_are_refused(kwargs, message):
    with pytest.raises(ParameterError, match=message):
        parse_generation(kwargs)


@pytest.mark.parametrize('decoder', DECODERS)
@pytest.mark.parametrize('suffix', ['mp4', 'mkv'])
def test_frames_are_those_of_the_harness_at_their_times(decoder, suffix, tmp_path):
    """Which frames, and their pictures; Matroska does not say how many there are."""
    pytest.importorskip(decoder)
    from lmms_eval.models.model_utils.load_video import read_video
    pictures = moving_square(3, frames=50)
    path = str(write_video(tmp_path / f'video.{suffix}', pictures, 8))
    video = DECODERS[decoder](path)
    assert (video.frames, float(video.rate_hz)) == (50, 8)
    for fps, most in ((1, 512), (2, 512), (8, 512), (100, 512), (8, 7), (1, 1)):
        indices = frame_indices(video.frames, video.rate_hz, fps, most)
        read = list(video.read(indices))
        assert [stamp for stamp, _ in read] == [10**9 + index * 125_000_000 for index in indices]
        assert all(np.array_equal(frame, pictures[index]) for index, (_, frame) in zip(indices, read, strict=True))
        if suffix == 'mp4':
            assert np.array_equal(np.stack([frame for _, frame in read]), read_video(path, num_frm=most, fps=fps))


def test_a_video_of_less_than_a_second_gives_its_first_frame():
    assert frame_indices(5, 30, 1, 512).tolist() == [0]


def test_a_video_that_ends_too_early_is_an_error(tmp_path):
    path = write_video(tmp_path / 'video.mp4', moving_square(3, frames=50), 8)
    video = DECODERS['av'](str(path))
    video.frames = 80       # as where the head says more than there is
    with pytest.raises(BagError, match='cut off: it says that it has 80 frames, but none can be read past frame'):
        list(video.read(range(0, 80, 8)))


def test_a_file_with_sound_alone_is_no_video(tmp_path):
    import av
    with av.open(str(tmp_path / 'sound.mp4'), 'w') as container:
        stream = container.add_stream('aac', rate=8000, layout='mono')
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format='fltp', layout='mono')
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(BagError, match='has no pictures'):
        check_video(str(tmp_path / 'sound.mp4'))
