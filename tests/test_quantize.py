"""The quantizer: closed forms, exactness of codes, best scales, gradients."""

import numpy as np
import pytest
import torch
from nets import WIDTHS

from ajpq.quantize import act_range, decode, encode, fake_quantize, fake_quantize_act, grid, within
from ajpq.step_sizes import _counted, _rounded, fit_scale

CODED = WIDTHS[:-1]


def kernels(kind: str = "normal", count: int = 6, size: int = 288, seed: int = 0) -> torch.Tensor:
    """Kernels of different magnitudes, float32 (count, size / 9, 3, 3)."""
    random = np.random.default_rng(seed)
    values = getattr(random, kind)(0, 1, (count, size // 9, 3, 3)) * 10.0 ** random.uniform(-3, 1, (count, 1, 1, 1))
    return torch.from_numpy(values).float()


def full(count: int, bits: int) -> torch.Tensor:
    return torch.full((count,), bits, dtype=torch.uint8)


def test_one_bit_is_plus_or_minus_the_mean_magnitude():
    weight = kernels()
    scale = fit_scale(weight, full(6, 1))
    mean = weight.abs().mean(dim=(1, 2, 3))
    assert torch.allclose(scale, 2 * mean, rtol=1e-6)
    values = fake_quantize(weight, full(6, 1), scale)
    assert torch.allclose(values, weight.sign() * mean[:, None, None, None], rtol=1e-6)


@pytest.mark.parametrize("bits", CODED)
def test_codes_fill_their_range_and_no_more(bits):
    weight = torch.linspace(-3, 3, 4001)[None]
    top = 2 ** (bits - 1)
    codes = encode(weight, full(1, bits), torch.tensor([2.0 / top]))
    assert codes.dtype == torch.int8
    assert (codes.min(), codes.max()) == ((-top, top - 1) if bits <= 3 else (1 - top, top - 1))
    levels = fake_quantize(weight, full(1, bits), torch.tensor([2.0 / top])).unique()
    assert len(levels) == (2**bits if bits <= 3 else 2**bits - 1)
    assert torch.equal(levels, -levels.flip(0))  # symmetric
    assert (0 in levels) == (bits > 3)
    assert torch.allclose(levels.diff(), torch.tensor(2.0 / top))  # uniform


def test_the_grid_by_hand():
    low, high, offset = grid(torch.tensor([0, 1, 2, 3, 4, 8, 32], dtype=torch.uint8))
    assert low.tolist() == [0, -1, -2, -4, -7, -127, 0]
    assert high.tolist() == [0, 0, 1, 3, 7, 127, 0]
    assert offset.tolist() == [0, 0.5, 0.5, 0.5, 0, 0, 0]


def test_values_by_hand():
    weight = torch.tensor([[-0.9, -0.2, 0.1, 0.6, 9.0]]).repeat(4, 1)
    bits = torch.tensor([1, 2, 4, 32], dtype=torch.uint8)
    got = fake_quantize(weight, bits, torch.tensor([1.0, 0.5, 0.25, 1.0]))
    assert got.tolist() == [
        [-0.5, -0.5, 0.5, 0.5, 0.5],
        [-0.75, -0.25, 0.25, 0.75, 0.75],
        [-1.0, -0.25, 0.0, 0.5, 1.75],
        weight[0].tolist(),
    ]


def test_zero_bits_are_zero_and_32_bits_are_untouched():
    weight = kernels(count=4)
    bits = torch.tensor([0, 32, 0, 32], dtype=torch.uint8)
    scale = fit_scale(weight, bits)
    assert torch.isfinite(scale).all()
    values = fake_quantize(weight, bits, scale)
    assert (values[::2] == 0).all() and torch.equal(values[1::2], weight[1::2])
    assert (encode(weight, bits, scale) == 0).all() and (decode(encode(weight, bits, scale), bits, scale) == 0).all()


def test_decoded_codes_are_the_fake_quantized_weights_bit_for_bit():
    weight = kernels(count=90)
    bits = torch.tensor(CODED, dtype=torch.uint8).repeat_interleave(10)[:90]
    bits = torch.cat([bits, full(90 - len(bits), 0)])
    scale = fit_scale(weight, bits)
    exact, codes = fake_quantize(weight, bits, scale), encode(weight, bits, scale)
    assert torch.equal(decode(codes, bits, scale), exact)
    assert torch.equal(fake_quantize(exact, bits, scale), exact)  # idempotent
    assert torch.equal(encode(exact, bits, scale), codes)
    assert torch.allclose(fake_quantize(-weight, bits, scale), -exact)


def test_every_kernel_is_quantized_on_its_own():
    weight = kernels(count=9)
    bits = torch.tensor(WIDTHS[:9], dtype=torch.uint8)
    together = fit_scale(weight, bits)
    alone = torch.cat([fit_scale(weight[k : k + 1], bits[k : k + 1]) for k in range(9)])
    assert torch.equal(together, alone)
    scaled = fit_scale(weight * 8, bits)
    assert torch.allclose(scaled[:-1], 8 * together[:-1]) and scaled[-1] == together[-1] == 1  # 32 bits have no step


@pytest.mark.parametrize("kind", ("normal", "laplace"))
@pytest.mark.parametrize("bits", CODED)
def test_scales_are_nearly_the_best_there_are(kind, bits):
    weight = kernels(kind)
    flat, width = weight.flatten(1), full(6, bits)

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (fake_quantize(weight, width, scale).flatten(1) - flat).square().mean(1)

    peak = flat.abs().amax(1) / 2 ** (bits - 1)
    best = torch.stack([error(peak * part) for part in torch.linspace(0.05, 2.2, 1000).tolist()]).amin(0)
    assert (
        error(fit_scale(weight, width)) <= (1.02 if bits <= 4 else 1.3) * best
    ).all()  # above 4 bits the error itself is negligible


def test_scales_of_depthwise_kernels_are_nearly_the_best_there_are():
    weight, width = kernels(count=64, size=9), full(64, 4)
    flat = weight.flatten(1)

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (fake_quantize(weight, width, scale).flatten(1) - flat).square().mean(1)

    peak = flat.abs().amax(1) / 8
    best = torch.stack([error(peak * part) for part in torch.linspace(0.05, 2.2, 1000).tolist()]).amin(0)
    assert (error(fit_scale(weight, width)) / best).mean() <= 1.1


@pytest.mark.parametrize("bits", CODED)
def test_counting_sorted_magnitudes_gives_what_rounding_them_gives(bits):
    weight = kernels(size=4608).flatten(1).abs().sort(1).values
    _, top, offset = (t.item() for t in grid(torch.tensor([bits])))
    steps = weight[:, -1:] / (top + offset) * torch.tensor([1.1, 0.7, 0.3])
    cross, energy = _counted(weight, steps, int(top), offset)
    right = _rounded(weight.double(), steps.double(), int(top), offset)
    assert torch.allclose(cross, right[0], rtol=1e-6) and torch.allclose(energy, right[1], rtol=1e-6)


def test_constant_and_empty_kernels_have_finite_scales():
    weight = torch.stack([torch.zeros(8), torch.ones(8), -torch.full((8,), 1e-20)])
    for bits in WIDTHS:
        scale = fit_scale(weight, full(3, bits))
        assert torch.isfinite(scale).all() and (scale > 0).all()
        assert torch.isfinite(fake_quantize(weight, full(3, bits), scale)).all()
    scale = fit_scale(weight, full(3, 8))
    assert torch.allclose(fake_quantize(weight, full(3, 8), scale)[1], torch.ones(8), rtol=1e-5)


@pytest.mark.parametrize("bits", CODED)
def test_gradients_follow_their_formulas(bits):
    weight, width = kernels(count=2).double(), full(2, bits)
    scale = fit_scale(weight.float(), width).double() * 0.8  # so that weights are clipped at every width
    weight.requires_grad_(), scale.requires_grad_()
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (fake_quantize(weight, width, scale) * upstream).sum().backward()

    low, high, offset = (t[0].item() for t in grid(width))
    ratio = weight.detach() / scale.detach()[:, None, None, None]
    inside = (ratio - offset >= low) & (ratio - offset <= high)
    assert inside.any() and (~inside).any()
    assert torch.allclose(weight.grad, torch.where(inside, upstream, 0.0))
    level = torch.round((ratio - offset).clamp(low, high)) + offset
    step = torch.where(inside, level - ratio, level)  # LSQ, equation 3
    damp = (weight[0].numel() * 2.0 ** (bits - 1)) ** -0.5
    assert torch.allclose(scale.grad, (upstream * step).sum((1, 2, 3)) * damp)


def test_the_scale_gradient_of_clipped_weights_is_the_numeric_one():
    weight, width = torch.tensor([[5.0, -7.0, 9.0]], dtype=torch.float64), full(1, 4)
    scale = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    fake_quantize(weight, width, scale).square().sum().backward()
    h = 1e-6
    numeric = (
        fake_quantize(weight, width, scale.detach() + h).square().sum()
        - fake_quantize(weight, width, scale.detach() - h).square().sum()
    ) / (2 * h)
    assert scale.grad.item() == pytest.approx(numeric.item() * (3 * 8) ** -0.5, rel=1e-6)


def test_32_bits_pass_the_gradient_and_0_bits_stop_it():
    weight = kernels(count=2).requires_grad_()
    bits = torch.tensor([0, 32], dtype=torch.uint8)
    fake_quantize(weight, bits, torch.ones(2)).sum().backward()
    assert (weight.grad[0] == 0).all() and (weight.grad[1] == 1).all()


def test_a_scale_learns():
    """Gradient descent on the scale alone finds one of the least error from a bad start."""
    weight, width = kernels(count=1) / kernels(count=1).std(), full(1, 3)
    best = fit_scale(weight, width)
    scale = (best * 2.5).requires_grad_()
    optimizer = torch.optim.SGD([scale], lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        (fake_quantize(weight, width, scale) - weight).square().mean(dim=(1, 2, 3)).sum().backward()
        optimizer.step()

    def error(scale: torch.Tensor) -> float:
        return (fake_quantize(weight, width, scale) - weight).square().mean().item()

    assert error(scale) < 1.05 * error(best) < 0.5 * error(best * 2.5)


# -- activations ------------------------------------------------------------------------------------------------------


def test_activation_ranges_by_hand():
    assert [act_range(b, False) for b in (1, 2, 8)] == [(0, 1), (0, 3), (0, 255)]
    assert [act_range(b, True) for b in (1, 2, 8)] == [(-1, 0), (-2, 1), (-128, 127)]


@pytest.mark.parametrize("signed", (False, True))
@pytest.mark.parametrize("bits", CODED)
def test_activations_are_the_same_in_training_and_after(bits, signed):
    x = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(bits)) * 3
    scale = torch.tensor(0.037 * 2.0 ** (8 - bits))
    low, high = act_range(bits, signed)
    plain = fake_quantize_act(x, scale, bits, signed)
    learning = fake_quantize_act(x.clone().requires_grad_(), scale.clone().requires_grad_(), bits, signed)
    assert torch.equal(plain, learning.detach()) and learning.requires_grad
    steps = plain / scale
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert steps.round().min() == low and steps.round().max() == high
    inside = (x / scale > low) & (x / scale < high)
    assert ((plain - x).abs()[inside] <= scale / 2 * 1.0001).all()
    assert torch.equal(fake_quantize_act(x, scale, 32, signed), x)


@pytest.mark.parametrize("signed", (False, True))
def test_activation_gradients_follow_their_formulas(signed):
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale = torch.tensor(0.3, requires_grad=True)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (fake_quantize_act(x, scale, 3, signed) * upstream).sum().backward()
    low, high = act_range(3, signed)
    ratio = x.detach() / 0.3
    inside = (ratio >= low) & (ratio <= high)
    assert inside.any() and (~inside).any()
    assert torch.equal(x.grad, torch.where(inside, upstream, 0.0))
    step = torch.where(inside, ratio.round() - ratio, ratio.clamp(low, high))
    assert scale.grad.item() == pytest.approx(((upstream * step).sum() / (x.numel() * high) ** 0.5).item(), rel=1e-4)


def neighbours(x: torch.Tensor, count: int = 4) -> torch.Tensor:
    """x, and the float32 numbers next to it on either side."""
    found = [x]
    for to in (torch.inf, -torch.inf):
        at = x
        for _ in range(count):
            found.append(at := torch.nextafter(at, torch.tensor(to)))
    return torch.cat(found)


@pytest.mark.parametrize("signed", (False, True))
@pytest.mark.parametrize("bits", CODED)
def test_activations_and_their_mask_are_those_of_torch_bit_for_bit(bits, signed):
    low, high = act_range(bits, signed)
    random = torch.Generator().manual_seed(bits)
    for scale in torch.exp(torch.empty(40).uniform_(-15, 6, generator=random)):
        middles = (torch.arange(low - 1, high + 1) + 0.5) * scale
        ends = torch.tensor([float(end) for end in (low, high) if end]) * scale
        x = torch.cat([torch.randn(200, generator=random) * scale * max(high, 1), neighbours(middles)])
        x = torch.cat([x, neighbours(ends), torch.zeros(1)])
        zero = torch.zeros((), dtype=torch.int32)
        expected = torch.fake_quantize_per_tensor_affine(x, scale, zero, low, high)
        assert torch.equal(fake_quantize_act(x, scale, bits, signed), expected)
        inside = (x / scale >= low) & (x / scale <= high)
        assert torch.equal(within(torch.ones_like(x), x, scale, low, high), inside.float())
        assert torch.equal(within(torch.ones_like(x).double(), x.double(), scale.double(), low, high) > 0,
                           (x.double() / scale.double() >= low) & (x.double() / scale.double() <= high))  # fmt: skip


@pytest.mark.parametrize("signed", (False, True))
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_activations_in_bfloat16_are_those_of_float32_but_for_a_rounding(bits, signed):
    random = torch.Generator().manual_seed(bits)
    x = torch.randn(8, 4, 32, 32, generator=random).bfloat16().contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(x.shape, generator=random).bfloat16()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        put, scale = x.to(dtype, copy=True).requires_grad_(), torch.tensor(3 / 2**bits, requires_grad=True)
        out = fake_quantize_act(put, scale, bits, signed)
        out.backward(upstream.to(dtype))
        assert out.dtype == put.grad.dtype == dtype and scale.grad.dtype == torch.float32
        found.append((out.detach().float(), put.grad.float(), scale.grad))
    (exact, to_x, to_scale), (near, near_to_x, near_to_scale) = found
    apart = (near - exact).abs() / scale.detach()
    assert apart.max() <= 1 and apart.mean() < (0.01 if bits < 8 else 0.25)  # codes, and the last bit of the values
    assert torch.equal(to_x, near_to_x)
    noise = upstream.float().norm() / (x.numel() * max(act_range(bits, signed)[1], 1)) ** 0.5  # of codes wrong by one
    assert (near_to_scale - to_scale).abs() < 0.5 * noise


@pytest.mark.parametrize("signed", (False, True))
def test_one_bit_activations_have_a_finite_gradient(signed):
    x = torch.randn(2, 3, 5, 5).requires_grad_()
    scale = torch.tensor(0.3, requires_grad=True)
    fake_quantize_act(x, scale, 1, signed).sum().backward()
    assert torch.isfinite(scale.grad) and torch.isfinite(x.grad).all()
