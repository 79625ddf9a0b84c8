"""The low pass against explicit DFT sums, its printed values, and its algebra."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyclip.lowpass import KERNELS, half_spectrum_weights, low_pass, resolve_sigma
from tests import reference

X4 = np.array([[1, 2, -1, 0.5], [0.3, -0.7, 1.2, 2.2], [-1.5, 0.8, 0.4, -0.2]])
X5 = np.concatenate([X4, [[0.25], [-0.4], [1.1]]], axis=1)
X4_CENTRED = np.array(
    [
        [1.1284152403, 1.6659543393, -0.6365785649, 0.3422089854],
        [0.3528763938, -0.5296205087, 1.1471236062, 2.0296205087],
        [-1.2211475878, 0.5740239817, 0.4555965271, -0.3084729209],
    ]
)
X4_REPO = np.array(
    [
        [0.8032653299, 1.7055701256, -0.8032653299, 0.5006721308],
        [0.3004032785, -0.5028620514, 1.0233420754, 1.8266074052],
        [-1.2484753598, 0.6663817357, 0.2777287669, -0.1368835942],
    ]
)
X5_BOTH = np.array(
    [
        [1.0486195455, 1.6526594025, -0.6051974364, 0.3139722688, 0.3399462197],
        [0.1107541254, -0.4565779567, 1.1394570235, 1.9060598841, -0.0996930763],
        [-1.0667300923, 0.5506741806, 0.3929617235, -0.0166579014, 0.7397520895],
    ]
)
WIDTHS = (1, 2, 3, 4, 5, 8, 15, 33, 64, 192, 384, 768)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def matrix(width: int, **options) -> np.ndarray:
    """The low pass as a D x D matrix: its answer to each unit vector."""
    return low_pass(torch.eye(width, dtype=torch.float64), **options).numpy()


@pytest.mark.parametrize(
    ("x", "kernel", "expected"),
    [
        (X4, "centred", X4_CENTRED),
        (X4, "repo", X4_REPO),
        (X5, "centred", X5_BOTH),
        (X5, "repo", X5_BOTH),
    ],
    ids=["X4-centred", "X4-repo", "X5-centred", "X5-repo"],
)
def test_filtered_tokens_equal_the_known_values(x, kernel, expected):
    ours = low_pass(torch.from_numpy(x), kernel=kernel).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-10)
    np.testing.assert_allclose(reference.low_pass(x, kernel=kernel), expected, atol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("sigma", [None, 0.3, 2.5, 40.0, math.inf])
def test_low_pass_equals_explicit_sums_in_float64(width, sigma, kernel):
    x = noise(3, width, seed=width)
    ours = low_pass(torch.from_numpy(x), sigma, kernel)
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours.numpy(), reference.low_pass(x, sigma, kernel), atol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("width", WIDTHS)
def test_float32_stays_within_1e_5_of_the_reference(width, kernel):
    x = noise(2, 3, width).astype(np.float32)
    ours = low_pass(torch.from_numpy(x), kernel=kernel)
    assert ours.dtype == torch.float32
    wanted = np.stack([reference.low_pass(image, kernel=kernel) for image in x])
    np.testing.assert_allclose(ours.numpy(), wanted, atol=1e-5 * np.abs(x).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_filtered_in_float32(dtype):
    x = torch.from_numpy(noise(2, 5, 48)).to(dtype)
    ours = low_pass(x)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, low_pass(x.float()))


def test_autocast_does_not_touch_the_transform():
    x = torch.from_numpy(noise(2, 5, 48)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = low_pass(x)
    assert torch.equal(inside, low_pass(x))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("width", [1, 2, 5, 8, 192])
def test_sigma_zero_is_the_mean_of_the_channels(width, kernel):
    x = torch.from_numpy(noise(2, 3, width))
    wanted = x.mean(dim=-1, keepdim=True).expand_as(x)
    torch.testing.assert_close(low_pass(x, 0, kernel), wanted, atol=1e-12, rtol=0)
    # And it is the limit of small sigma of the centred kernel.
    torch.testing.assert_close(low_pass(x, 0.05), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sigma_infinity_is_the_identity_and_the_limit_of_large_sigma(kernel):
    x = torch.from_numpy(noise(2, 3, 16))
    assert torch.equal(low_pass(x, math.inf, kernel), x)
    torch.testing.assert_close(low_pass(x, 1e7, kernel), x, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("width", [2, 5, 8, 33, 64])
def test_low_pass_is_a_real_symmetric_circulant_matrix(width, kernel):
    M = matrix(width, kernel=kernel)
    np.testing.assert_allclose(M, M.T, atol=1e-14)
    for row in range(width):
        np.testing.assert_allclose(M[row], np.roll(M[0], row), atol=1e-14)
    weights = reference.gaussian_weights(width, math.sqrt(width), kernel)
    np.testing.assert_allclose(M[0], np.fft.ifft(weights).real, atol=1e-14)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_token_times_the_matrix_is_the_filtered_token(kernel):
    x = noise(4, 24)
    ours = low_pass(torch.from_numpy(x), kernel=kernel).numpy()
    np.testing.assert_allclose(x @ matrix(24, kernel=kernel), ours, atol=1e-13)


@pytest.mark.parametrize(("width", "spread"), [(384, 3.12), (768, 4.41), (1024, 5.09)])
def test_the_matrix_is_a_gaussian_over_sqrt_of_width_by_two_pi_channels(width, spread):
    row = matrix(width)[0]
    away = np.minimum(np.arange(width), width - np.arange(width))
    assert math.sqrt((row * away**2).sum()) == pytest.approx(spread, abs=0.01)
    shape = np.exp(-(away**2) / (2 * (math.sqrt(width) / (2 * math.pi)) ** 2))
    np.testing.assert_allclose(row / row[0], shape, atol=1e-9)


def test_small_widths_have_negative_lobes():
    assert matrix(8)[0].min() < 0


@pytest.mark.parametrize(("width", "gain"), [(4, 0.8825), (768, 0.99935), (64, None), (5, 1.0)])
def test_dc_gain_is_one_for_centred_and_less_for_repo_with_even_width(width, gain):
    ones = torch.ones(1, 1, width, dtype=torch.float64)
    assert float(low_pass(ones)[0, 0, 0]) == pytest.approx(1.0, abs=1e-12)
    repo = float(low_pass(ones, kernel="repo")[0, 0, 0])
    wanted = math.exp(-1 / (2 * width)) if width % 2 == 0 else 1.0
    assert repo == pytest.approx(wanted, abs=1e-12)
    if gain is not None:
        assert repo == pytest.approx(gain, abs=5e-5)


@pytest.mark.parametrize("width", [3, 5, 33, 191])
def test_both_kernels_agree_for_odd_widths(width):
    x = torch.from_numpy(noise(2, width))
    torch.testing.assert_close(low_pass(x, kernel="repo"), low_pass(x), atol=1e-13, rtol=0)


@pytest.mark.parametrize(("width", "share"), [(384, 0.0011), (768, 0.0006)])
def test_the_kernels_differ_by_little_on_white_features(width, share):
    x = torch.from_numpy(noise(2000, width))
    centred, repo = low_pass(x), low_pass(x, kernel="repo")
    assert float((repo - centred).norm() / centred.norm()) == pytest.approx(share, rel=0.15)


def test_the_filter_passes_the_share_of_energy_that_theory_says():
    x = torch.from_numpy(noise(500, 768))
    smooth = low_pass(x)
    assert float((smooth**2).sum() / (x**2).sum()) == pytest.approx(0.064, abs=0.002)
    overlap = float((x * smooth).sum() / (x.norm() * smooth.norm()))
    assert overlap == pytest.approx(0.36, abs=0.005)


@given(
    width=st.integers(1, 40),
    sigma=st.one_of(st.none(), st.floats(0, 50), st.just(math.inf)),
    kernel=st.sampled_from(KERNELS),
    seed=st.integers(0, 999),
)
def test_weights_lie_within_zero_and_one_and_the_filter_is_linear(width, sigma, kernel, seed):
    deviation = resolve_sigma(sigma, width)
    if not math.isinf(deviation):
        weights = half_spectrum_weights(width, deviation, kernel)
        assert weights.shape == (width // 2 + 1,)
        assert bool(((weights >= 0) & (weights <= 1)).all())
    a, b = torch.from_numpy(noise(2, 3, width, seed=seed))
    together = low_pass(2.5 * a - b, sigma, kernel)
    apart = 2.5 * low_pass(a, sigma, kernel) - low_pass(b, sigma, kernel)
    torch.testing.assert_close(together, apart, atol=1e-12, rtol=0)


def test_cached_weights_serve_training_after_inference_mode():
    with torch.inference_mode():
        low_pass(torch.ones(1, 1, 37))
    x = torch.ones(1, 1, 37, requires_grad=True)
    low_pass(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_low_pass_works_on_the_meta_device_and_in_one_compiled_graph():
    assert low_pass(torch.empty(2, 3, 8, device="meta")).shape == (2, 3, 8)
    compiled = torch.compile(low_pass, fullgraph=True, backend="aot_eager")
    x = torch.from_numpy(noise(2, 3, 12)).float()
    torch.testing.assert_close(compiled(x), low_pass(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sigma", [-1, -0.001, math.nan, True, "sqrt"])
def test_a_sigma_that_is_no_width_is_refused_with_its_value(sigma):
    with pytest.raises(ValueError, match=f"sigma is {sigma!r}"):
        low_pass(torch.ones(1, 1, 4), sigma)


def test_an_unknown_kernel_and_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="kernel is 'gauss'; use one of centred, repo"):
        low_pass(torch.ones(1, 1, 4), kernel="gauss")
    with pytest.raises(ValueError, match="int64"):
        low_pass(torch.ones(1, 1, 4, dtype=torch.int64))
