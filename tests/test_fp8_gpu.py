"""FP8 on a GPU: torch's scaled products against the reference, without host synchronisation, and under graph capture."""

import pytest
import torch
from small_models import prompts, small_config

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, FP8Config
from modeling_diffusiongemma.layers.experts import Experts
from modeling_diffusiongemma.weights.fp8 import FP8Experts, scale_name
from modeling_diffusiongemma.weights.fp8_math import (
    dequantized_product,
    fp8_grouped_product,
    fp8_product,
    has_scaled_products,
    quantize_rows,
    quantize_weight,
    reference_product,
)

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("without_gradients"),
]
needs_hopper = pytest.mark.skipif(not HOPPER, reason="torch's scaled products need compute capability 9.0")
# bfloat16 output rounds to 2**-9; Hopper sums FP8 products with about 14 bits, so a sum of cancelling terms keeps an absolute error.
TOLERANCE = {"rtol": 2**-7, "atol": 0.02}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda().to(torch.bfloat16)


def edges(inputs):
    inputs[0] = 0
    inputs[1, 3] = 3e4
    return inputs


@needs_hopper
@pytest.mark.parametrize("rows", [1, 7, 256])
@pytest.mark.parametrize(("columns", "outputs"), [(2816, 2112), (704, 2816), (64, 48)])
def test_scaled_product_equals_the_reference(rows, columns, outputs):
    assert has_scaled_products(torch.device("cuda", 0), outputs, columns)
    inputs, weight = numbers(rows, columns), quantize_weight(numbers(outputs, columns, seed=1) * columns**-0.5)
    inputs = edges(inputs) if rows > 1 else inputs
    expected = reference_product(inputs, *weight)
    scale = expected.abs().amax(dim=1, keepdim=True).clamp(min=1)
    for got in (fp8_product(inputs, *weight), dequantized_product(*quantize_rows(inputs), *weight, torch.bfloat16)):
        torch.testing.assert_close(got.float() / scale, expected / scale, **TOLERANCE)


@needs_hopper
@pytest.mark.parametrize("sizes", [(0, 1, 256, 2), (256, 0, 0, 0), (0, 0, 0, 1), (3, 5, 7, 11)])
def test_grouped_product_equals_the_reference_of_each_group(sizes):
    inputs = edges(numbers(257, 2816))
    weight, scale = quantize_weight(numbers(4, 1408, 2816, seed=1) * 2816**-0.5)
    rows = torch.randint(0, 257, (sum(sizes),), generator=torch.Generator().manual_seed(2)).cuda()
    ends = torch.tensor(sizes).cumsum(0).to("cuda", torch.int32)
    got = fp8_grouped_product(inputs, rows, weight, scale, ends)
    expected = torch.cat([reference_product(part, weight[i], scale[i]) for i, part in enumerate(inputs[rows].split(sizes))])
    size = expected.abs().amax(dim=1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(got.float() / size, expected / size, **TOLERANCE)


def cuda_experts():
    config = small_config().text_config
    config.num_experts, config.hidden_size, config.moe_intermediate_size = 8, 64, 48
    plain = Experts(config)
    experts = FP8Experts(plain)
    for name in ("gate_up_proj", "down_proj"):
        weight, scale = quantize_weight(torch.randn(getattr(plain, name).shape, generator=torch.Generator().manual_seed(0)) / 8)
        getattr(experts, name).copy_(weight)
        getattr(experts, scale_name(name)).copy_(scale)
    hidden = numbers(256, 64)
    chosen = torch.rand(256, 8, generator=torch.Generator().manual_seed(1)).topk(2).indices.cuda()
    return experts, hidden, chosen, torch.full((256, 2), 0.5, device="cuda")


def test_experts_on_a_gpu_equal_those_on_a_cpu():
    experts, *inputs = cuda_experts()
    expected = experts(inputs[0].cpu().float(), *(tensor.cpu() for tensor in inputs[1:]))
    got = experts.cuda()(*inputs).cpu().float()
    assert (got - expected).norm() < 0.02 * expected.norm()  # bfloat16, and e4m3 of sums that differ in a last bit


@needs_hopper
def test_experts_never_wait_for_the_host_and_can_be_captured():
    experts, *inputs = cuda_experts()
    experts.cuda()
    expected = experts(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = experts(*inputs)
    graph.replay()
    assert torch.equal(got, expected)


def test_quantised_model_generates_on_a_gpu(tmp_path):
    DiffusionGemmaForMaskedBlockLM(small_config()).to(torch.bfloat16).save_pretrained(tmp_path)
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path, quantization_config=FP8Config(), device_map="cuda")
    assert model.model.decoder.layers[0].experts.gate_up_proj.is_cuda
    output = model.generate(prompts(2, 9)[0].cuda(), max_new_tokens=10, max_denoising_steps=4, seed=0)
    assert output.shape == (2, 19)
    model.save_pretrained(tmp_path / "saved")
    again = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path / "saved", device_map="cuda")
    weights = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)) for one, other in weights)
