"""Which way of computing the experts is used, and that the choice changes nothing but rounding."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import programs
import pytest
import tiny
import torch
from tiny import CANVAS, close, pair, same_weights, tokens

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM
from modeling_diffusiongemma.layers.experts import DENSE_LIMIT, Experts, choose_experts, dense_experts, eager_experts, experts_by

ROOT = Path(__file__).parents[1]


def experts(dtype, **text):
    torch.manual_seed(0)
    module = Experts(tiny.tiny_config(**text).text_config).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def routed(module, count=21):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(count, module.hidden_dim, generator=generator).to(module.gate_up_proj.dtype)
    weights, chosen = torch.randn(count, module.num_experts, generator=generator).softmax(dim=-1).topk(2)
    return hidden, chosen, weights


@pytest.mark.parametrize(
    ("dtype", "text", "expected"),
    [
        (torch.float32, {}, "eager"), (torch.float16, {}, "eager"), (torch.bfloat16, {}, "dense_mm"),
        (torch.bfloat16, {"num_experts": 16, "moe_intermediate_size": 192}, "eager"),
        (torch.float32, {"num_experts": 17}, "grouped_mm"),
        (torch.bfloat16, {"num_experts": 128, "moe_intermediate_size": 64}, "grouped_mm"),
    ],
    ids=str,
)  # fmt: skip
def test_the_choice_follows_dtype_and_size(dtype, text, expected):
    """And is what then runs, to the last bit."""
    module = experts(dtype, **text)
    assert choose_experts(module) == expected
    found = {}
    for way in ("auto", "eager", "grouped_mm", "dense_mm"):
        module.config._experts_implementation = way
        found[way] = module(*routed(module))
        torch.testing.assert_close(found[way].float(), found["auto"].float(), atol=0.05, rtol=0.02)  # 8 bits of mantissa in bfloat16
    assert torch.equal(found["auto"], found[expected]) and not torch.equal(found["dense_mm"], found["eager"])


def test_limits_are_where_they_were_measured():
    few, many = {"num_experts": 16}, {"num_experts": 17}
    assert [choose_experts(experts(torch.float32, **text)) for text in (few, many)] == ["eager", "grouped_mm"]
    assert experts(torch.bfloat16).gate_up_proj.numel() <= DENSE_LIMIT
    assert choose_experts(experts(torch.float32).to("meta")) == "grouped_mm"


@pytest.mark.parametrize("way", ["eager", "dense_mm"])
def test_gradients_equal_those_of_grouped_mm(way):
    """1e-5: other sums. One expert is chosen by no token."""
    module, gradients = experts(torch.float32), []
    hidden, _, _ = routed(module)
    weights, chosen = torch.randn(len(hidden), module.num_experts - 1).softmax(dim=-1).topk(2)
    for each in ("grouped_mm", way):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weights)]
        module.zero_grad()
        module.config._experts_implementation = each
        module(inputs[0], chosen, inputs[1]).square().sum().backward()
        gradients.append([tensor.grad for tensor in (*inputs, *module.parameters())])
    for got, expected in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "tanh", "linear"])
def test_activations_that_keep_what_they_gave_train(activation):
    """Their output was multiplied in place, which autograd refused."""
    module = experts(torch.float32, hidden_activation=activation)
    hidden, chosen, weights = routed(module)
    gradients = []
    for way in (eager_experts, dense_experts):
        module.zero_grad()
        way(module, hidden, chosen, weights).square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_experts_of_other_ranks_are_left_out():
    """Expert parallelism marks them with the id behind the last one."""
    module = experts(torch.float32)
    module.config._experts_implementation = "eager"
    hidden, chosen, weights = routed(module)
    alone = module(hidden, chosen, weights * torch.tensor([1.0, 0.0]))
    marked = chosen.clone()
    marked[:, 1] = module.num_experts
    torch.testing.assert_close(module(hidden, marked, weights), alone)


def test_a_choice_of_the_callers_wins(oracle_checkpoint):
    """Also `"grouped_mm"`, which transformers would take by default, in bfloat16, where ours would not."""
    for given, expected in ((None, "auto"), ("grouped_mm", "grouped_mm"), ("eager", "eager"), ("dense_mm", "dense_mm")):
        options = {} if given is None else {"experts_implementation": given}
        model = DiffusionGemmaForMaskedBlockLM.from_pretrained(oracle_checkpoint, dtype=torch.bfloat16, **options)
        assert model.config.text_config._experts_implementation == expected
        module = model.model.decoder.layers[0].experts
        inputs = routed(module)
        wanted = dense_experts(module, *inputs) if expected in ("auto", "dense_mm") else None
        if wanted is not None:
            assert torch.equal(module(*inputs), wanted)
        else:
            assert not torch.equal(module(*inputs), dense_experts(module, *inputs))
    model.set_experts_implementation("grouped_mm")
    assert model.config.text_config._experts_implementation == "grouped_mm"
    with pytest.raises(ValueError, match="fastest"):
        model.set_experts_implementation("fastest")


@torch.no_grad()
def test_reference_arithmetic_gives_transformers_bits(tmp_path):
    """On every CPU: experts are then computed as transformers' own model computes them by default, but not where a way was named."""
    oracle, model = pair()
    inputs = {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, CANVAS, 1)}
    expected = oracle(attention_mask=torch.ones(2, 9), **inputs).logits
    assert model.config.text_config._experts_implementation == "auto"
    close(model(**inputs).logits, expected)
    named = same_weights(oracle, experts="dense_mm")
    with model.reference_arithmetic():
        close(model(**inputs).logits, expected, 0)
        assert not torch.equal(named(**inputs).logits, expected)
    model.save_pretrained(tmp_path)
    assert "experts_implementation" not in (tmp_path / "config.json").read_text()


def test_a_way_asked_for_holds_in_its_own_thread_and_block_alone():
    """Two calls of `generate` on one model at a time: neither changes how the other one rounds."""
    module = experts(torch.bfloat16)
    inputs, found = routed(module), {}
    for way in ("grouped_mm", "dense_mm", "auto"):
        module.config._experts_implementation = way
        found[way] = module(*inputs)
    assert torch.equal(found["auto"], found["dense_mm"]) and not torch.equal(found["auto"], found["grouped_mm"])
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="stopped"), experts_by("grouped_mm"):
        assert torch.equal(pool.submit(module, *inputs).result(), found["dense_mm"])
        assert torch.equal(module(*inputs), found["grouped_mm"])
        raise RuntimeError("stopped")
    assert torch.equal(module(*inputs), found["dense_mm"])


@pytest.mark.parametrize("few_bits", [False, True])
def test_the_benchmark_prints_a_table(few_bits):
    if few_bits:
        pytest.importorskip("bitsandbytes")
    command = ["benchmarks/experts.py", "--tokens", "3", "--shape", "4", "2", "16", "8", "--rounds", "1", "--threads", "1"]
    done = programs.run(*command, *(["--four-bit"] if few_bits else []))
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| 4, 2, 16, 8")]
    assert len(rows) == 2 and all(float(cell) > 0 for row in rows for cell in row[2:-1])
    assert [row[-1].strip() for row in rows] == (["eager", "eager"] if few_bits else ["eager", "dense_mm"])
