"""Formats of the detailed cache: how far a stored number may be off, and that a page knows nothing of the others."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statekv_ros.backbones.base import KVLayout
from statekv_ros.errors import ParameterError
from statekv_ros.memory.detailed.formats import FORMATS, Stored, find_format

PACKED = [each for each in FORMATS if each.bits]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def pages(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a page whose channels differ in size and offset by many orders of magnitude."""
    layers, kv_heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 65))
    head_dim = draw(st.sampled_from((2, 6, 32, 80)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size, offset = 10.0 ** draw(st.integers(-9, 2)), 10.0 ** draw(st.integers(-3, 3)) * draw(st.sampled_from((0, 1)))

    def numbers():
        channels = torch.randn(layers, kv_heads, 1, head_dim, generator=generator)
        x = torch.randn(layers, kv_heads, tokens, head_dim, generator=generator) * size * channels.exp() + offset * channels
        x[..., 0] = draw(st.sampled_from((0.0, 1.0, -0.3, 900.0)))  # a channel that is the same all over the page
        return x.clamp(-60_000, 60_000).to(draw(st.sampled_from(DTYPES)))
    return numbers(), numbers()


@pytest.mark.parametrize('form', PACKED, ids=lambda form: form.name)
@settings(max_examples=150, deadline=None)
@given(page=pages())
def test_no_number_is_off_by_more_than_half_its_stored_scale(form, page):
    for exact, stored in zip(page, form.encode(*page)):
        exact = exact.double()
        off = (form.decode(stored).double() - exact).abs()
        scale, zero = (part.double().unsqueeze(-2) for part in stored[1:])
        # Codes up to 255 and sums of about the zero's size are rounded to fp32 on the way.
        assert (off <= scale / 2 * (1 + 2**-14) + (exact.abs() + zero.abs()) * 2**-22).all()


@pytest.mark.parametrize('form', PACKED, ids=lambda form: form.name)
@settings(max_examples=100, deadline=None)
@given(page=pages())
def test_the_stored_scale_is_that_of_the_channels_range_but_for_fp16_rounding(form, page):
    for exact, stored in zip(page, form.encode(*page)):
        least, greatest = exact.double().aminmax(dim=-2)
        exact_scale = (greatest - least) / (2**form.bits - 1)
        # What the zero lost to fp16 the range gains: at most 2**-10 of it; and fp16 goes in steps of 2**-24 near 0.
        room = (least.abs() * 2**-10 + 2**-24) / (2**form.bits - 1)
        assert (stored.scale.double() <= (exact_scale + room) * (1 + 2**-10) + 2**-24).all()


@pytest.mark.parametrize('form', FORMATS, ids=lambda form: form.name)
@settings(max_examples=50, deadline=None)
@given(page=pages())
def test_what_is_stored_comes_back_the_same_from_its_bytes(form, page):
    for stored in form.encode(*page):
        copies = Stored(*(part if part is None else torch.frombuffer(
            bytearray(part.contiguous().view(torch.uint8).numpy().tobytes()), dtype=part.dtype).view(part.shape)
            for part in stored))
        assert torch.equal(form.decode(copies), form.decode(stored))


@pytest.mark.parametrize('form', FORMATS, ids=lambda form: form.name)
@settings(max_examples=50, deadline=None)
@given(page=pages(), heads=st.integers(1, 3))
def test_layers_and_heads_of_a_page_know_nothing_of_each_other(form, page, heads):
    for whole, part in zip(form.encode(*page), form.encode(*(tensor[:, :heads] for tensor in page))):
        assert torch.equal(form.decode(whole)[:, :heads], form.decode(part))


@pytest.mark.parametrize('form', FORMATS, ids=lambda form: form.name)
def test_bytes_per_token_are_those_of_what_is_stored(form):
    layout = KVLayout(3, 2, 32, torch.bfloat16, torch.device('cpu'))
    stored = form.encode(*(torch.randn(3, 2, 9, 32, dtype=torch.bfloat16) for _ in range(2)))
    held = sum(part.nbytes for each in stored for part in each if part is not None)
    assert form.bytes_per_token(layout, 9) * 9 == pytest.approx(held)


def test_four_bits_put_two_channels_into_a_byte_the_even_one_low():
    form = find_format('int4')
    numbers = torch.tensor([[0., 15.], [15., 0.], [5., 8.]])[None, None]
    stored = form.encode(numbers, numbers)[0]
    assert stored.codes.flatten().tolist() == [0xf0, 0x0f, 0x85]
    assert stored.scale.flatten().tolist() == [1, 1] and stored.zero.flatten().tolist() == [0, 0]


@pytest.mark.parametrize('form', PACKED, ids=lambda form: form.name)
def test_a_page_of_one_token_keeps_it_to_fp16(form):
    numbers = torch.tensor([[[[0.1, -1000.3]]]])
    decoded = form.decode(form.encode(numbers, numbers)[0])
    torch.testing.assert_close(decoded, numbers, rtol=2**-10, atol=0)


@pytest.mark.parametrize('form', PACKED, ids=lambda form: form.name)
def test_numbers_beyond_fp16_are_cut_off_and_nan_stays_to_be_seen(form):
    numbers = torch.tensor([[[[1e6, 1.0], [-1e6, float('nan')]]]])
    decoded = form.decode(form.encode(numbers, numbers)[0])[0, 0]
    assert decoded[:, 0].tolist() == pytest.approx([65504, -65504], rel=0.01) and decoded[:, 1].isnan().all()


def test_heads_that_a_format_cannot_hold_are_named():
    with pytest.raises(ParameterError, match="'int4' puts 2 channels into a byte, .* multiple of 2, got 63: take 'bf16'"):
        find_format('int4').encode(torch.ones(1, 1, 4, 63), torch.ones(1, 1, 4, 63))
    with pytest.raises(ParameterError, match='multiple of 1, got 0'):
        find_format('int8').check(0)
    with pytest.raises(ParameterError, match='positive number of tokens, got 0'):
        find_format('int8').bytes_per_token(KVLayout(1, 1, 8, torch.float32, torch.device('cpu')), 0)
    with pytest.raises(ParameterError, match="detailed_format must be one of bf16, int8, int4, got 'int3'"):
        find_format('int3')
