"""FP8 arithmetic against a float32 reference, at the edges of the format, and against the numbers it replaces."""

import pytest
import torch
from tiny import needs_scaled_product

from modeling_diffusiongemma.weights.fp8_math import (
    E4M3,
    dequantize,
    dequantized_grouped_product,
    dequantized_product,
    fp8_grouped_product,
    fp8_product,
    quantize_rows,
    quantize_weight,
    reference_product,
    rounding_bound,
    scaled_product,
)

IN, OUT = 63, 33


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def every_e4m3():
    """All 253 finite numbers of the format but minus zero."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    return values[values.isfinite()].unique()


def edge_rows():
    """Activations at the format's edges, `(N, IN)`: zeros, one outlier, huge, tiny, subnormal, and everyday rows."""
    rows = numbers(9, IN, seed=3)
    rows[0] = 0
    rows[1] *= 1e-3
    rows[1, 5] = 3e4  # an outlier: everything else of the row lies in the format's subnormal numbers
    rows[2] *= 1e30
    rows[3] *= 1e-30
    rows[4] *= 1e-42  # float32's own subnormal numbers: as good as zero
    rows[5] = 448.0
    rows[6, 7] = -448.0
    return rows


def edge_weight():
    weight = numbers(OUT, IN, seed=4)
    weight[0] = 0
    weight[1, 2] = 1e4
    weight[2] *= 1e-6
    return weight


def test_every_number_of_the_format_survives():
    values = every_e4m3()
    quantized, scale = quantize_rows(values[None])
    assert scale.item() == 1 and torch.equal(quantized.float()[0], values)


def test_scale_of_a_row_is_its_largest_magnitude_over_448():
    rows = numbers(5, IN)
    quantized, scale = quantize_rows(rows)
    assert torch.equal(scale, rows.abs().amax(dim=1, keepdim=True) / 448)
    assert torch.equal(quantized.float().abs().amax(dim=1), torch.full((5,), 448.0))
    assert quantized.dtype == E4M3 and scale.dtype == torch.float32 and scale.shape == (5, 1)


def test_row_of_zeros_has_scale_one_and_product_zero():
    quantized, scale = quantize_rows(torch.zeros(2, IN))
    assert torch.equal(scale, torch.ones(2, 1)) and not quantized.float().any()
    assert not fp8_product(torch.zeros(2, IN), *quantize_weight(numbers(OUT, IN))).any()


def test_largest_number_saturates_where_the_scale_is_rounded_down():
    """`.to(float8)` alone makes NaN of numbers beyond 464 in some versions of torch."""
    row = torch.full((1, 4), 448 * 1.0035)  # 1.0035 is 1 in bfloat16
    quantized, scale = quantize_rows(row, torch.bfloat16)
    assert scale.item() == 1 and torch.equal(quantized.float(), torch.full((1, 4), 448.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_moves_a_number_by_a_sixteenth_at_most(dtype):
    rows = edge_rows()[[0, 1, 2, 3, 5, 6, 7, 8]]
    quantized, scale = quantize_rows(rows, dtype)
    moved = (dequantize(quantized, scale, torch.float32) - rows).abs()
    bound = torch.maximum(rows.abs() / 16, rows.abs().amax(dim=1, keepdim=True) / 448 / 1024)
    assert (moved <= bound * (1 + 2**-7)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_shows_in_the_scale(value):
    rows = numbers(3, IN)
    rows[1, 2] = value
    scale = quantize_rows(rows)[1]
    assert not scale[1].isfinite() and scale[[0, 2]].isfinite().all()


def test_stacked_weights_equal_each_alone():
    stacked = numbers(3, OUT, IN)
    quantized, scale = quantize_weight(stacked)
    assert scale.shape == (3, OUT, 1) and torch.equal(scale, scale.to(torch.bfloat16).float())
    for index in range(3):
        alone, alone_scale = quantize_weight(stacked[index])
        assert torch.equal(quantized[index].view(torch.uint8), alone.view(torch.uint8)) and torch.equal(scale[index], alone_scale)


def test_reference_stays_within_the_bound_of_the_format():
    rows, weight = edge_rows(), edge_weight()
    error = (reference_product(rows, *quantize_weight(weight)) - rows @ weight.T).abs()
    assert (error <= rounding_bound(rows, weight) + 1e-35).all()  # below 5e-36 a row counts as zero


def test_reference_is_within_a_tenth_on_everyday_numbers():
    """Far below the bound, which adds up the worst case: errors of a dot product are independent."""
    rows, weight = numbers(256, 704), numbers(128, 704, seed=1)
    expected = rows @ weight.T
    error = (reference_product(rows, *quantize_weight(weight)) - expected).norm() / expected.norm()
    assert 0.01 < error < 0.05


def test_dequantised_product_equals_the_reference_in_float32():
    rows, weight = edge_rows(), quantize_weight(edge_weight())
    expected = reference_product(rows, *weight)
    torch.testing.assert_close(fp8_product(rows, *weight), expected, rtol=1e-5, atol=1e-38)


@needs_scaled_product
@pytest.mark.parametrize("rows", [0, 1, 256])
def test_scaled_product_of_torch_equals_the_reference(rows):
    """torch's row-wise kernel, on a CPU: the same call as on a GPU."""
    inputs, weight = numbers(rows, 64), quantize_weight(numbers(48, 64, seed=1))
    if rows:
        inputs[0] = 0
    expected = reference_product(inputs, *weight)
    torch.testing.assert_close(scaled_product(*quantize_rows(inputs), *weight), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_from_the_reference_by_its_own_rounding(dtype):
    """Sums of products reach 448 * 448 * IN, far beyond float16: only the end result may be rounded to it."""
    inputs, weight = numbers(21, IN).to(dtype), quantize_weight(numbers(OUT, IN, seed=1))
    expected = reference_product(inputs, *weight)
    got = fp8_product(inputs, *weight)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=2**-7, atol=2**-7)  # twice half a unit of bfloat16


def test_a_row_does_not_depend_on_its_neighbours():
    rows, weight = edge_rows(), quantize_weight(edge_weight())
    together = fp8_product(rows, *weight)
    alone = torch.cat([fp8_product(row[None], *weight) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-38)  # sums of another order


@pytest.mark.parametrize("sizes", [(0, 1, 256, 2), (256, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 0), (3, 5, 7, 11)])
def test_groups_of_any_size_equal_the_reference_of_each(sizes):
    """An expert without a token, with one, with all 256."""
    inputs = numbers(257, IN)
    inputs[0] = 0
    weight, scale = quantize_weight(numbers(4, OUT, IN, seed=1))
    rows = torch.randint(0, 257, (sum(sizes),), generator=torch.Generator().manual_seed(2))
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    got = fp8_grouped_product(inputs, rows, weight, scale, ends)
    expected = torch.cat([reference_product(part, weight[i], scale[i]) for i, part in enumerate(inputs[rows].split(sizes))])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_gradient_is_that_of_the_dequantised_weight():
    weight, scale = quantize_weight(numbers(OUT, IN, seed=1))
    inputs = numbers(5, IN).requires_grad_()
    probe = numbers(5, OUT, seed=2)
    fp8_product(inputs, weight, scale).backward(probe)
    torch.testing.assert_close(inputs.grad, probe @ dequantize(weight, scale, torch.float32))


def test_gradient_of_groups_adds_up_where_a_row_is_used_twice():
    weight, scale = quantize_weight(numbers(3, OUT, IN, seed=1))
    rows, ends = torch.tensor([0, 2, 0, 1]), torch.tensor([2, 2, 4], dtype=torch.int32)
    inputs = numbers(4, IN).requires_grad_()
    probe = numbers(4, OUT, seed=2)
    fp8_grouped_product(inputs, rows, weight, scale, ends).backward(probe)
    plain = dequantize(weight, scale, torch.float32)
    each = torch.stack([probe[0] @ plain[0], probe[1] @ plain[0], probe[2] @ plain[2], probe[3] @ plain[2]])
    torch.testing.assert_close(inputs.grad, torch.zeros(4, IN).index_add(0, rows, each))


def test_products_of_groups_and_of_one_agree():
    inputs, (weight, scale) = numbers(7, IN), quantize_weight(numbers(1, OUT, IN, seed=1))
    quantized = quantize_rows(inputs)
    ends = torch.tensor([7], dtype=torch.int32)
    grouped = dequantized_grouped_product(*quantized, weight, scale, ends, torch.float32)
    assert torch.equal(grouped, dequantized_product(*quantized, weight[0], scale[0], torch.float32))
