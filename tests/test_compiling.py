"""`compile_config`: the layers run through torch.compile, in one graph each, with the same tokens, and only while it is asked for."""

import shutil
import threading

import pytest
import torch
from small_models import prompts, small_model
from torch._dynamo.utils import counters
from transformers import CompileConfig

from generation.mixin import DECODERS
from modeling_diffusiongemma.model.compiling import compile_settings


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def generate(model, rows=1, length=9, **settings):
    ids, mask = prompts(rows, length, padded=3 if rows > 1 else 0)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=20, generation_config={"max_denoising_steps": 4}, seed=list(range(rows)), **settings
    )


def layers(model):
    return model.model.decoder.layers


@pytest.mark.parametrize(
    "settings",
    [{"rows": 3}, {"cache_implementation": "static"}, {"decoding": "autoregressive"}],
    ids=["rows that leave", "static cache", "autoregressive"],
)
def test_compiled_layers_give_the_same_tokens(model, settings):
    """`fullgraph`: a break in a layer's graph raises. torch's eager backend runs the same operations; experts are in a graph what they
    are in reference arithmetic."""
    with model.reference_arithmetic():
        expected = generate(model, **settings)
    got = generate(model, compile_config=CompileConfig(backend="eager", fullgraph=True), **settings)
    assert torch.equal(got, expected)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor on a CPU needs a C++ compiler")
@torch.no_grad()
def test_inductor_gives_the_same_numbers():
    """transformers' own default mode, which asks for CUDA graphs. One canvas pass of one layer: a graph takes ten seconds to compile.
    1e-4: fused, a sum's last bit is another one."""
    model = small_model(num_hidden_layers=1, layer_types=["full_attention"])
    cache, canvas = model.prefill(prompts(2, 9)[0]).past_key_values, prompts(2, 10, seed=1)[0]
    expected = model.denoise(canvas, cache).last_hidden_state
    with model.compiling(CompileConfig()):
        got = model.denoise(canvas, cache).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1 and counters["inductor"]


def test_a_second_call_compiles_nothing_anew_and_new_shapes_little(model):
    config = CompileConfig(backend="eager")
    generate(model, compile_config=config)
    first = counters["stats"]["unique_graphs"]
    generate(model, compile_config=config)
    assert counters["stats"]["unique_graphs"] == first
    for rows, length in ((2, 7), (3, 11), (2, 17)):
        generate(model, rows, length, compile_config=config)
    settled = counters["stats"]["unique_graphs"]
    generate(model, 4, 13, compile_config=config)
    assert counters["stats"]["unique_graphs"] == settled < 64


def test_layers_run_as_before_afterwards(model, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("stopped")

    own = layers(model)[0]
    own.compile(backend="eager")
    before = own._compiled_call_impl
    generate(model, compile_config=CompileConfig(backend="eager"))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setitem(DECODERS, "diffusion", failing)
        generate(model, compile_config=CompileConfig(backend="eager"))
    assert own._compiled_call_impl is before
    assert all(layer._compiled_call_impl is None for layer in layers(model)[1:])
    own._compiled_call_impl = None


def test_calls_of_two_threads_that_end_in_any_order_leave_layers_as_they_were(model):
    """Each put back what it had found: the second to begin found what the first had set, and the layers stayed compiled for good."""
    begun, ended = threading.Event(), threading.Event()
    config, inside = CompileConfig(backend="eager"), []

    def first():
        with model.compiling(config):
            begun.set()
            ended.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    with model.compiling(config):
        mine = layers(model)[0]._compiled_call_impl
        ended.set()
        thread.join(60)
        inside += [layer._compiled_call_impl for layer in layers(model)]
    assert inside[0] is mine and None not in inside, "the call that goes on lost its compiled layers"
    assert all(layer._compiled_call_impl is None for layer in layers(model))


def test_disable_compile_has_precedence(model):
    generate(model, compile_config=CompileConfig(backend="eager"), disable_compile=True)
    assert not counters["stats"]


def test_modes_with_cuda_graphs_become_the_same_without():
    """`generate` records the whole step itself; a graph within a graph cannot be recorded."""
    assert compile_settings(CompileConfig())["mode"] is None
    assert compile_settings(CompileConfig(mode="max-autotune"))["mode"] == "max-autotune-no-cudagraphs"
    assert compile_settings(CompileConfig(options={"max_autotune": False}))["options"] == {"max_autotune": False}


@pytest.mark.parametrize(
    "config, told",
    [
        (CompileConfig(backend="nothing"), "`compile_config.backend` is 'nothing'; expected one of"),
        (CompileConfig(mode="fastest"), "`compile_config.mode` is 'fastest'; expected one of"),
        (CompileConfig(mode="max-autotune", options={"max_autotune": True}), "both the mode 'max-autotune' and options"),
        ({"back_end": "eager"}, "`compile_config`"),
    ],
)
def test_wrong_settings_are_refused(model, config, told):
    with pytest.raises(ValueError, match=told):
        generate(model, compile_config=config)
