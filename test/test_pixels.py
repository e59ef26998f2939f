"""Our pixel path gives what the library's own numpy image processor gives."""
import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from statekv_ros.backbones.pixels import PixelSpec, patchify, resize, target_size

SPECS = [PixelSpec(16, 2, 2, 64 * 64, 448 * 448), PixelSpec(14, 2, 2, 56 * 56, 28 * 28 * 100, mean=(.48, .45, .40), std=(.27, .26, .28))]


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('size', [(480, 640), (720, 1280), (64, 64), (37, 500), (1080, 1920), (7, 9)])
def test_pixels_equal_the_library_processor(spec, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(
        patch_size=spec.patch_size, merge_size=spec.merge_size, temporal_patch_size=spec.temporal_patch_size,
        size={'shortest_edge': spec.min_pixels, 'longest_edge': spec.max_pixels}, image_mean=spec.mean, image_std=spec.std)
    expected = processor(images=[image], return_tensors='np')
    ours = patchify([resize(image, spec)], spec)
    tall, wide = target_size(*size, spec)
    assert expected['image_grid_thw'].tolist() == [[1, tall // spec.patch_size, wide // spec.patch_size]]
    assert ours.shape == expected['pixel_values'].shape
    assert np.abs(ours - expected['pixel_values']).max() < 1e-6


def test_two_frames_of_a_patch_keep_their_order():
    spec = SPECS[0]
    first, second = (np.full((64, 64, 3), value, np.uint8) for value in (0, 255))
    patches = patchify([first, second], spec).reshape(-1, 3, 2, 16, 16)
    assert (patches[:, :, 0] == -1).all() and (patches[:, :, 1] == 1).all()
