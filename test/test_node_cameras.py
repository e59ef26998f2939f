"""A node with four cameras over real DDS: their images go through the model together, and each memory stays its own."""
import itertools

import pytest

from live import SECOND, image, memory_node
from statekv_ros.srv import Reset

CAMERAS = ('front', 'rear', 'left', 'right')


@pytest.mark.timeout(300)
def test_four_cameras_share_steps_and_keep_their_own_memories_whatever_they_do_meanwhile(tmp_path, tiny_model_dir):
    held, sizes, clock = dict.fromkeys(CAMERAS, 0), dict.fromkeys(CAMERAS, 64), itertools.count(1)
    with memory_node(tmp_path, tiny_model_dir, cameras=f'[{",".join(CAMERAS)}]') as (node, graph):
        graph.wait_for_state('active')

        def see(cameras) -> None:
            """One image of each, all under way at once, and all in the memory at the end."""
            second = next(clock)
            for number, name in enumerate(cameras):
                graph.publish(image(second * SECOND, height=sizes[name], seed=number), f'/{name}/image_raw')
            for name in cameras:
                held[name] += 1
                graph.wait_for_camera(name, frames_held=held[name])

        see(CAMERAS)
        for _ in range(200):    # which of them wait at the same moment is for DDS to say
            see(CAMERAS)
            if any(timing.cameras > 1 for timing in graph.timings):
                break
        together = {timing.cameras for timing in graph.timings}
        assert together <= {1, 2, 3, 4} and max(together) > 1
        see(CAMERAS[:2])            # two pause
        sizes['rear'] = 96          # within its step
        see(CAMERAS)
        assert graph.ask('is the door open?', camera='left').success
        assert graph.response(graph.reset.call_async(Reset.Request(camera='left'))).success
        held['left'] = 0
        for _ in range(4):
            see(CAMERAS)
        for name in CAMERAS:
            counts = graph.camera(name)
            assert [int(counts[key]) for key in ('dropped', 'rejected', 'failed_steps', 'frames_held')] == [0, 0, 0, held[name]]
        response = graph.ask('is the door open?')
        assert response.success and sorted(answer.camera for answer in response.answers) == sorted(CAMERAS)
        assert {answer.camera: answer.frames_covered for answer in response.answers} == held
        assert node.alive and 'Traceback' not in node.log
