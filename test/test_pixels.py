"""Our pixel path gives, to the last bit, what the library's own PIL/numpy image processors give."""
import ast
import inspect

import numpy as np
import pytest
import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from statekv_ros.backbones import patches, pixels
from statekv_ros.backbones.patches import patchify, square_pixels
from statekv_ros.backbones.pixels import HALF, IMAGENET, OPENAI_CLIP, PixelSpec, SquareSpec, prepare
from statekv_ros.errors import FrameError

SIZES = [(480, 640), (720, 1280), (64, 64), (37, 500), (1080, 1920), (7, 9)]
PATCHES = {'qwen3_vl': PixelSpec(16, 2, 2, 64 * 64, 448 * 448, **HALF),
           'qwen2_5_vl': PixelSpec(14, 2, 2, 56 * 56, 28 * 28 * 256, **OPENAI_CLIP)}
SQUARES = {'internvl': SquareSpec(448, **IMAGENET), 'llava_onevision': SquareSpec(384, **HALF),
           'eagle2_5': SquareSpec(448, **HALF)}


def image_of(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def stacked(*frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(frames))


def library_square(family: str, spec: SquareSpec, image: np.ndarray) -> np.ndarray:
    """[3, size, size] as the family's own image processor computes it for one whole image."""
    settings = dict(size={'height': spec.size, 'width': spec.size}, image_mean=spec.mean, image_std=spec.std)
    if family == 'internvl':
        return GotOcr2ImageProcessorPil(crop_to_patches=False, **settings)(image, return_tensors='np')['pixel_values'][0]
    if family == 'llava_onevision':  # its first patch is the whole image
        return LlavaOnevisionImageProcessorPil(**settings)(image, return_tensors='np')['pixel_values'][0][0]
    return SiglipImageProcessorPil(**settings)(image, return_tensors='np')['pixel_values'][0]


@pytest.mark.parametrize('family', PATCHES)
@pytest.mark.parametrize('size', SIZES)
def test_patches_equal_the_library_processor(family, size):
    spec, image = PATCHES[family], image_of(*size)
    processor = Qwen2VLImageProcessorPil(
        patch_size=spec.patch_size, merge_size=spec.merge_size, temporal_patch_size=spec.temporal_patch_size,
        size={'shortest_edge': spec.min_pixels, 'longest_edge': spec.max_pixels}, image_mean=spec.mean, image_std=spec.std)
    expected = processor(images=[image], return_tensors='np')
    ours = patchify(stacked(*[prepare(image, spec)] * spec.temporal_patch_size), spec).numpy()
    tall, wide = spec.frame_size(*size)
    assert expected['image_grid_thw'].tolist() == [[1, tall // spec.patch_size, wide // spec.patch_size]]
    assert ours.dtype == np.float32 and ours.shape == expected['pixel_values'].shape
    assert np.abs(ours - expected['pixel_values']).max() == 0


@pytest.mark.parametrize('family', SQUARES)
@pytest.mark.parametrize('size', SIZES)
def test_squares_equal_the_library_processor(family, size):
    spec, image = SQUARES[family], image_of(*size)
    ours = square_pixels(stacked(prepare(image, spec)), spec).numpy()
    expected = library_square(family, spec, image)
    assert ours.dtype == np.float32 and ours.shape == (1, *expected.shape)
    assert np.abs(ours[0] - expected).max() == 0


def test_two_frames_of_a_patch_keep_their_order():
    spec = PATCHES['qwen3_vl']
    first, second = (np.full((64, 64, 3), value, np.uint8) for value in (0, 255))
    patches = patchify(stacked(first, second), spec).reshape(-1, 3, 2, 16, 16)
    assert (patches[:, :, 0] == -1).all() and (patches[:, :, 1] == 1).all()


@pytest.mark.parametrize('spec', [*PATCHES.values(), *SQUARES.values()])
def test_the_smallest_and_a_huge_image_become_frames(spec):
    for height, width in ((1, 1), (6000, 8000)):
        frame = np.broadcast_to(np.array((0, 128, 255), np.uint8), (height, width, 3))
        prepared = prepare(frame, spec)
        assert prepared.shape[:2] == spec.frame_size(height, width)
        assert (prepared == (0, 128, 255)).all()


@pytest.mark.parametrize('spec', [*PATCHES.values(), *SQUARES.values()])
def test_an_empty_image_is_an_error(spec):
    with pytest.raises(FrameError, match='at least one pixel, got 5x0'):
        prepare(np.zeros((0, 5, 3), np.uint8), spec)


@pytest.mark.parametrize('spec', PATCHES.values())
def test_an_image_too_long_for_patches_is_an_error_that_names_its_size(spec):
    with pytest.raises(FrameError, match='got 2001x10'):
        prepare(np.zeros((10, 2001, 3), np.uint8), spec)


def test_pixels_come_from_numpy_pil_and_torch_alone():
    """So that they are the same numbers whether torchvision is installed or not."""
    imports = {name.split('.')[0] for module in (pixels, patches) for node in ast.walk(ast.parse(inspect.getsource(module)))
               for name in ([node.module] if isinstance(node, ast.ImportFrom) else
                            [a.name for a in node.names] if isinstance(node, ast.Import) else [])}
    assert imports == {'math', 'dataclasses', 'functools', 'numpy', 'PIL', 'torch', 'statekv_ros'}
