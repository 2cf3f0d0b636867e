"""Experts in 4 bits through bitsandbytes."""

import importlib.util
import sys

import pytest
import torch
from tiny import ours, tokens
from transformers import AutoModelForCausalLM

from modeling_diffusiongemma import FourBitConfig
from modeling_diffusiongemma.weights.four_bit import FourBitExperts

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def load(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FourBitConfig(), **settings)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_alone_are_in_four_bits(oracle_checkpoint, dtype):
    model = load(oracle_checkpoint, dtype=dtype)
    plain = ours().state_dict()
    experts = {name for name in plain if ".experts." in name}
    for name, tensor in model.state_dict().items():
        if ".experts." not in name:
            assert torch.equal(tensor, plain[name].to(dtype)), name
    assert {tensor.dtype for name, tensor in model.state_dict().items() if ".experts." in name} == {torch.uint8, torch.float32}
    for name in experts:
        module, _, weight = name.rpartition(".")
        got = getattr(model.get_submodule(module), weight)
        assert got.dtype == dtype and got.shape == plain[name].shape
        error = (got.float() - plain[name]).norm() / plain[name].norm()
        assert 0.02 < error < 0.12  # NF4 on normal numbers: 0.09


@needs_bitsandbytes
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "dense_mm"])
def test_every_experts_implementation_runs_on_them(oracle_checkpoint, implementation):
    model = load(oracle_checkpoint)
    model.set_experts_implementation(implementation)
    layer = model.model.decoder.layers[0].experts
    assert isinstance(layer, FourBitExperts)
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([[0, 3]]).repeat(7, 1)
    weights = torch.full((7, 2), 0.5)
    expected = torch.zeros(7, 32)
    for expert in (0, 3):
        gate, up = (hidden @ layer.gate_up_proj[expert].T).chunk(2, dim=-1)
        expected += 0.5 * (layer.act_fn(gate) * up) @ layer.down_proj[expert].T
    with torch.no_grad():
        torch.testing.assert_close(layer(hidden, chosen, weights), expected, atol=1e-4, rtol=1e-4)
        assert model(tokens(1, 9), decoder_input_ids=tokens(1, 5)).logits.isfinite().all()


@needs_bitsandbytes
def test_saving_is_refused(oracle_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        load(oracle_checkpoint).save_pretrained(tmp_path)


def test_a_missing_library_is_named(oracle_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="FourBitConfig needs bitsandbytes"):
        load(oracle_checkpoint)


@pytest.mark.parametrize("size", [0, 63, 32, "64"])
def test_block_size_is_one_of_bitsandbytes(size):
    with pytest.raises(ValueError, match="`block_size` is .*; expected one of"):
        FourBitConfig(block_size=size)
