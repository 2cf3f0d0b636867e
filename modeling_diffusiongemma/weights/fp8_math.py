"""FP8 arithmetic: e4m3 numbers with one scale a row, and the products of such matrices.

The layout of `RedHatAI/diffusiongemma-26B-A4B-it-FP8-dynamic`: weights have one scale an output channel, fixed; activations
one a token, taken anew from each token. `reference_product` defines the result. Beside it stand two ways to the same numbers:
torch's scaled products (`scaled_product`, `scaled_grouped_product`), which Hopper has units for, and the products of the
dequantised operands, which run everywhere.

Knows nothing of modules, models or files. e4m3: Micikevicius et al. 2022 (arXiv 2209.05433).

How far FP8 is from the numbers it replaces: with `s = max|x| / 448`, rounding moves every x by at most
`max(|x| / 16, s / 1024)`: three bits of mantissa, and steps of `s / 512` below the smallest normal number, `s / 64`. A weight's
scale is moreover rounded to bf16, which may push its row's largest value beyond 448, where it saturates: still within 1/16.
`rounding_bound` sums this over a dot product (`tests/test_fp8_math.py` holds it).
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from transformers.utils import logging

from generation.fast.proofs import FastPath, numbers, works

from .fp8_apart import matrices_of
from .fp8_numbers import E4M3, widen

try:
    from torch.nn.functional import ScalingType, scaled_grouped_mm, scaled_mm
except ImportError:  # an older torch
    scaled_mm = None

logger = logging.get_logger(__name__)

LARGEST = 448.0  # of e4m3
MULTIPLE = 16  # of both sizes of a weight, for torch's scaled products
_DEQUANTISED = "FP8 weights are dequantised for every product, one at a time: same numbers, less speed"
EXACT = (torch.float32, torch.bfloat16)  # dtypes that hold every e4m3 number and every sum of products


def quantize_rows(values: torch.Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds each row to e4m3 on a scale of its own: `row ~ quantized * scale` with `scale = max|row| / 448`.

    A row of zeros, or of nothing above 5e-36 (which would need a subnormal scale), gets the scale 1 and becomes zero. NaN and
    infinity in a row make its scale NaN or infinite.

    Args: floating `(..., K)`, and what the scale is rounded to before the rows are divided by it: bfloat16 for weights as published.
    Returns e4m3 `(..., K)` and the scales, float32 `(..., 1)`.
    """
    scale = torch.linalg.vector_norm(values, float("inf"), dim=-1, keepdim=True).float() / LARGEST
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    if scale_dtype == torch.float32:
        return (values / scale).to(E4M3), scale  # at most 448 and a last bit, which rounds to 448
    scale = scale.to(scale_dtype).float()
    return (values / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of a weight `(out, K)` or of stacked ones `(E, out, K)`, with scales rounded to bfloat16.

    Stacked weights go one by one, so that no float32 copy of all of them is made.
    """
    if weight.dim() == 2:
        return quantize_rows(weight, torch.bfloat16)
    quantized = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
    scale = torch.empty(*weight.shape[:-1], 1, dtype=torch.float32, device=weight.device)
    for index, one in enumerate(weight):
        quantized[index], scale[index] = quantize_weight(one)
    return quantized, scale


def dequantize(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`quantized * scale` in `dtype`; the product itself is taken in float32."""
    return (widen(quantized, torch.float32) * scale).to(dtype)


def reference_product(inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What every FP8 product here computes, in float32: `(q(x) @ q(w)^T) * s(x) * s(w)^T`.

    Args: floating `(N, K)`, quantised here by row; e4m3 `(out, K)`, float32 `(out, 1)`.
    """
    quantized, input_scale = quantize_rows(inputs)
    return (quantized.float() @ weight.float().T) * input_scale * scale.T


def rounding_bound(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """How far `reference_product` of the quantised `weight` may be from `inputs @ weight.T`: float32 `(N, out)`.

    `|x w - x' w'| <= |x| dw + dx |w| + dx dw`, with dx and dw from the head of this file, summed over the dot product.
    """

    def moved(values):
        scale = values.abs().amax(dim=-1, keepdim=True) / LARGEST
        return torch.maximum(values.abs() / 16, scale / 1024) * (1 + 2**-7)  # 2**-8 for the scale's bf16, the rest for float32

    inputs, weight = inputs.float(), weight.float()
    moved_inputs, moved_weight = moved(inputs), moved(weight)
    return inputs.abs() @ moved_weight.T + moved_inputs @ (weight.abs() + moved_weight).T


@torch.compiler.assume_constant_result
def has_scaled_products(device: torch.device, *sizes: int, grouped: bool = False) -> bool:
    """Whether torch's scaled products, or its `grouped` ones, are proven on `device` and take weights of these sizes; if not, one warning
    a process says why."""
    reason = _missing_units(device)
    if reason is None and (unfit := [size for size in sizes if size % MULTIPLE]):
        reason = f"they need sizes that are multiples of {MULTIPLE}, and {unfit} are none"
    if reason is not None:
        logger.warning_once(f"{_DEQUANTISED}. torch's scaled products are not used: {reason}.")
        return False
    return works(SCALED_GROUPED if grouped else SCALED, device)


def scaled_product(quantized: torch.Tensor, input_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`(quantized @ weight.T) * input_scale * scale.T` in one kernel: bfloat16 on a GPU, float32 on a CPU.

    Args: e4m3 `(N, K)`, float32 `(N, 1)`, e4m3 `(out, K)`, float32 `(out, 1)`. Returns `(N, out)`.
    """
    output_dtype = torch.bfloat16 if quantized.is_cuda else torch.float32
    rows = ScalingType.RowWise
    return scaled_mm(quantized, weight.T, input_scale, rows, scale.T, rows, output_dtype=output_dtype)


def scaled_grouped_product(
    quantized: torch.Tensor, input_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """`scaled_product` of consecutive groups of rows, each with its own weight: Hopper only.

    Args: e4m3 `(M, K)`, float32 `(M, 1)`, e4m3 `(E, out, K)`, float32 `(E, out, 1)`, and where each group ends, int32 `(E,)`.
    Returns bfloat16 `(M, out)`.
    """
    rows = ScalingType.RowWise
    return scaled_grouped_mm(quantized, weight.mT, input_scale.squeeze(-1), rows, scale.squeeze(-1), rows, offs=ends)


def dequantized_product(
    quantized: torch.Tensor, input_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`scaled_product` on any device, in `dtype`: e4m3 numbers are exact in float32 and bfloat16, so only the scales wait. `weight` may be
    in `exact_dtype` already."""
    exact = exact_dtype(dtype)
    return ((widen(quantized, exact) @ widen(weight, exact).T).float() * input_scale * scale.T).to(dtype)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the operands of a product in `dtype` are multiplied in: a sum of products overflows float16."""
    return dtype if dtype in EXACT else torch.float32


@torch.compiler.disable  # a loop over numbers on the host: one break in a compiled graph instead of many
def dequantized_grouped_product(
    quantized: torch.Tensor, input_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`scaled_grouped_product` on any device, in `dtype`, with one dequantised weight at a time."""
    output = torch.empty(len(quantized), weight.shape[1], dtype=dtype, device=quantized.device)
    plain = torch.empty(weight.shape[1:], dtype=exact_dtype(dtype), device=weight.device)
    for expert, rows in groups(ends):
        matrices = matrices_of(weight, expert)
        for place, matrix in zip(plain.split([len(matrix) for matrix in matrices]), matrices, strict=True):
            widen(matrix, plain.dtype, place)
        output[rows] = dequantized_product(quantized[rows], input_scale[rows], plain, scale[expert], dtype)
    return output


def groups(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Every group that has rows, and these; waits for the device."""
    return ((group, slice(start, end)) for group, (start, end) in enumerate(pairwise([0, *ends.tolist()])) if start < end)


def _missing_units(device: torch.device) -> str | None:
    """Why torch's scaled products are not for `device`; None where they are."""
    if device.type != "cuda":
        return f"they need a GPU of compute capability 9.0, and the device is {device.type!r}"
    if scaled_mm is None:
        return f"torch {torch.__version__} has none"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 9 else f"they need compute capability 9.0, and {torch.cuda.get_device_name(device)} has {major}.{minor}"


def _prove_scaled(device: torch.device):
    """One row, and more than a tile of them; a weight that is no square."""
    weight = [tensor.to(device) for tensor in quantize_weight(numbers(48, 64))]
    inputs = [[tensor.to(device) for tensor in quantize_rows(numbers(rows, 64, seed=1))] for rows in (1, 150)]
    expected = [dequantized_product(*rows, *weight, torch.float32) for rows in inputs]
    return [scaled_product(*rows, *weight) for rows in inputs], expected


def _prove_scaled_grouped(device: torch.device):
    """Groups of none, of one and of many rows."""
    weight = [tensor.to(device) for tensor in quantize_weight(numbers(5, 48, 64))]
    inputs = [tensor.to(device) for tensor in quantize_rows(numbers(154, 64, seed=1))]
    ends = torch.tensor([0, 1, 151, 151, 154], dtype=torch.int32, device=device)
    expected = dequantized_grouped_product(*inputs, *weight, ends, torch.float32)
    return scaled_grouped_product(*inputs, *weight, ends), expected


# 2^-6: what comes out is rounded to bfloat16, and Hopper adds up e4m3 products with some 14 bits.
SCALED = FastPath("scaled FP8 product", _DEQUANTISED, _missing_units, _prove_scaled, 2**-6)
SCALED_GROUPED = FastPath("scaled grouped FP8 product", _DEQUANTISED, _missing_units, _prove_scaled_grouped, 2**-6)


def _product(inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *grouped: torch.Tensor) -> torch.Tensor:
    """Args: `grouped`: nothing, or rows, and their groups' ends."""
    quantized, input_scale = quantize_rows(inputs)
    scaled, dequantized, ends = scaled_product, dequantized_product, grouped[1:]
    if grouped:
        scaled, dequantized, rows = scaled_grouped_product, dequantized_grouped_product, grouped[0]
        quantized, input_scale = quantized.view(torch.uint8)[rows].view(E4M3), input_scale[rows]  # torch indexes bytes everywhere
    if len(quantized) and has_scaled_products(inputs.device, *weight.shape[-2:], grouped=bool(grouped)):
        return scaled(quantized, input_scale, weight, scale, *ends).to(inputs.dtype)
    return dequantized(quantized, input_scale, weight, scale, *ends, inputs.dtype)


class _Product(torch.autograd.Function):
    """Straight-through: rounding the activations counts as the identity, the weight is fixed."""

    @staticmethod
    def forward(ctx, inputs, weight, scale, *grouped):
        ctx.save_for_backward(weight, scale, *grouped)
        ctx.shape = inputs.shape
        return _product(inputs, weight, scale, *grouped)

    @staticmethod
    def backward(ctx, gradient):
        weight, scale, *grouped = ctx.saved_tensors
        if not grouped:
            return gradient @ dequantize(weight, scale, gradient.dtype), None, None
        total, (rows, ends) = gradient.new_zeros(ctx.shape), grouped
        for expert, group in groups(ends):
            total.index_add_(0, rows[group], gradient[group] @ dequantize(weight[expert], scale[expert], gradient.dtype))
        return total, None, None, None, None


def fp8_product(inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`inputs @ weight.T` in FP8, by the fastest way the device has; its gradient is that of the dequantised weight.

    Args: floating `(N, K)`, and from `quantize_weight` e4m3 `(out, K)` and float32 `(out, 1)`. Returns `(N, out)` in the dtype of `inputs`.
    """
    return _differentiable(inputs, weight, scale)


def fp8_grouped_product(
    inputs: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """`fp8_product` of `inputs[rows]`, in consecutive groups that have a weight each. No host synchronisation where torch's
    scaled products run.

    Args: floating `(N, K)`, of which each row is quantised once; int64 `(M,)`, rows of it, group after group; e4m3 `(E, out, K)`, float32
    `(E, out, 1)`; and where each group ends in `rows`, int32 `(E,)`; a group may be empty.
    """
    return _differentiable(inputs, weight, scale, rows, ends)


def _differentiable(inputs: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return (_Product.apply if inputs.requires_grad and torch.is_grad_enabled() else _product)(inputs, *others)


__all__ = [
    "E4M3", "LARGEST", "SCALED", "SCALED_GROUPED", "dequantize", "dequantized_grouped_product", "dequantized_product",
    "fp8_grouped_product", "fp8_product", "has_scaled_products", "quantize_rows", "quantize_weight", "reference_product",
    "rounding_bound", "scaled_grouped_product", "scaled_product",
]  # fmt: skip
