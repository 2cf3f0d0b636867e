"""e4m3 numbers by a table: the bits of torch's conversion, for every byte and pair of bytes, and torch's own way for the rest."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from generation.fast.proofs import WITHOUT, difference, verdict
from modeling_diffusiongemma.weights import fp8_numbers
from modeling_diffusiongemma.weights.fp8_math import (
    dequantize,
    dequantized_grouped_product,
    dequantized_product,
    fp8_grouped_product,
    fp8_product,
    quantize_weight,
)
from modeling_diffusiongemma.weights.fp8_numbers import E4M3, E4M3_TABLE, ENTRIES, LOOKED_UP, has_table, looked_up, widen
from modeling_diffusiongemma.weights.nvfp4 import dequantize_nvfp4

CPU = torch.device("cpu")
DTYPES = tuple(ENTRIES)


def codes(*shape, seed=0):
    """e4m3 of random bytes: NaN among them."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).view(E4M3)


def same_bits(got, expected):
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    return torch.equal(got.contiguous().view(-1).view(torch.uint8), expected.contiguous().view(-1).view(torch.uint8))


@pytest.fixture
def torchs_way(monkeypatch):
    """Of a function: what it gives where no table is used."""

    def called(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(fp8_numbers, "has_table", lambda *_: False)
            return function(*arguments)

    return called


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_bytes_has_the_bits_of_torchs_conversion(dtype):
    pairs = torch.cartesian_prod(*[torch.arange(256).to(torch.uint8)] * 2).view(E4M3)  # (65536, 2)
    assert has_table(pairs, dtype) and same_bits(looked_up(pairs, dtype), pairs.to(dtype))
    assert int(widen(pairs, dtype).isnan().sum()) == 2 * 2 * 256  # both NaN, in both places, beside every byte


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_how_denormals_are_treated(dtype):
    verdict.cache_clear()
    fp8_numbers._table.cache_clear()
    values = codes(64)
    expected = values.to(dtype)
    torch.set_flush_denormal(True)
    try:
        assert same_bits(widen(values, dtype), expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    "values",
    [codes(0), codes(1), codes(2), codes(63), codes(7, 9), codes(7, 10), codes(2 * LOOKED_UP + 2), codes(3, 2 * LOOKED_UP)],
    ids=lambda values: str(tuple(values.shape)),
)
def test_any_number_of_elements_is_right(values, dtype):
    assert same_bits(widen(values, dtype), values.to(dtype))
    out = torch.full(values.shape, 7.0, dtype=dtype)
    assert widen(values, dtype, out) is out and same_bits(out, values.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_right(dtype):
    """Transposed, with gaps, broadcast, and beginning between two pairs."""
    values = codes(9, 33)
    views = {
        "transposed": values.T, "every second": values[:, ::2], "broadcast": values[:1].expand(4, -1), "a row": values[1],
        "an even row": values[2], "a column": values[:, 3], "no dimension": values[2, 2], "inner": values[2:4, 5:20],
    }  # fmt: skip
    for name, view in views.items():
        got = widen(view, dtype)
        assert same_bits(got, view.to(dtype)), name
        assert got.stride() == view.to(dtype).stride(), name  # by which a product may take another way through its sums
    assert has_table(values[2:4], dtype) and not has_table(values[1:3], dtype) and not has_table(values.T, dtype)


def test_result_is_new_memory():
    values = codes(64)
    widen(values, torch.float32).zero_()
    assert same_bits(widen(values, torch.float32), values.to(torch.float32))


def test_tensors_without_numbers_stay_without():
    assert widen(codes(4, 6).to("meta"), torch.bfloat16).is_meta
    with FakeTensorMode(allow_non_fake_inputs=True):
        values = torch.empty(4, 6, dtype=E4M3)
        assert widen(values, torch.bfloat16).shape == (4, 6)
    assert type(widen(codes(4, 6), torch.bfloat16)) is torch.Tensor  # no table of somebody's mode is kept


def test_weight_that_wants_a_gradient_is_converted_by_torch():
    weight = torch.nn.Parameter(codes(4, 6))
    assert widen(weight, torch.float32).requires_grad
    assert not widen(weight.requires_grad_(False), torch.float32).requires_grad


def test_table_made_in_inference_mode_serves_outside():
    verdict.cache_clear()
    fp8_numbers._table.cache_clear()
    weight, scale = quantize_weight(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    with torch.inference_mode():
        widen(weight, torch.float32)
    inputs = torch.ones(3, 8, requires_grad=True)
    fp8_product(inputs, weight, scale).sum().backward()
    assert inputs.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_whatever_is_dequantised_has_the_bits_of_torchs_way(dtype, torchs_way):
    values = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    stacked = quantize_weight(torch.randn(5, 48, 64, generator=torch.Generator().manual_seed(0)))
    one = [tensor[1] for tensor in stacked]
    rows, ends = torch.tensor([6, 0, 3, 3, 1, 2]), torch.tensor([0, 1, 1, 4, 6], dtype=torch.int32)
    groups = (values, rows, *stacked, ends)
    cases = [(dequantize, *stacked, dtype), (dequantize, *one, dtype), (fp8_product, values, *one), (fp8_grouped_product, *groups)]
    quantized = (codes(6, 64), torch.rand(6, 1, generator=torch.Generator().manual_seed(2)))
    cases += [(dequantized_product, *quantized, *one, dtype), (dequantized_grouped_product, *quantized, *stacked, ends, dtype)]
    packed = codes(8, 16).view(torch.uint8)
    cases += [(dequantize_nvfp4, packed, codes(8, 2), torch.tensor(0.25), dtype)]
    for function, *arguments in cases:
        assert same_bits(function(*arguments), torchs_way(function, *arguments)), function.__name__


def test_gradients_have_the_bits_of_torchs_way(torchs_way):
    weight, scale = quantize_weight(torch.randn(3, 48, 64, generator=torch.Generator().manual_seed(0)))
    rows, ends = torch.tensor([0, 2, 0, 1]), torch.tensor([2, 2, 4], dtype=torch.int32)

    def gradient():
        inputs = torch.linspace(-2, 2, 4 * 64).view(4, 64).requires_grad_()
        (fp8_grouped_product(inputs, rows, weight, scale, ends).square().sum() + fp8_product(inputs, weight[0], scale[0]).sum()).backward()
        return inputs.grad

    assert same_bits(gradient(), torchs_way(gradient))


def test_compiled_product_has_the_numbers_of_the_table():
    weight, scale = quantize_weight(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    inputs = torch.ones(3, 8)
    expected = fp8_product(inputs, weight, scale)
    with torch.no_grad():
        got = torch.compile(fp8_product, backend="eager", fullgraph=False)(inputs, weight, scale)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_table_that_lies_is_not_used(told, monkeypatch, nothing_proven, dtype):
    """One entry of 65,536 with another bit."""
    table = fp8_numbers._table(dtype).clone()
    table[12_345] ^= 1
    monkeypatch.setattr(fp8_numbers, "_table", lambda dtype: table)
    assert difference(*E4M3_TABLE.prove(CPU, dtype)) is not None
    values = codes(64)
    assert same_bits(widen(values, dtype), values.to(dtype))
    assert len(set(told)) == 1 and "e4m3 table failed its proof on cpu" in told[0] and "converted by torch" in told[0]


def test_table_can_be_left_out_by_name(told, monkeypatch, nothing_proven):
    monkeypatch.setenv(WITHOUT, E4M3_TABLE.name)
    values = codes(64)
    assert not has_table(values, torch.bfloat16) and same_bits(widen(values, torch.bfloat16), values.to(torch.bfloat16))
    assert len(set(told)) == 1 and WITHOUT in told[0]
    assert E4M3_TABLE.missing(torch.device("cuda", 0), torch.bfloat16) is not None
