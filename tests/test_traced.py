"""The whole model through `torch.compile(model, fullgraph=True)` and `torch.export`: no check reads values back while a graph is traced.

Operations are the same but for rounding: a mask that hides nothing is not known to do so, and attention with one rounds otherwise.
Two layers, one of each type: tracing takes a second a layer.
"""

import functools
import traceback

import pytest
import tiny
import torch
from tiny import CANVAS, LAYERS, VOCAB, WINDOW, caches, close, pad_rows, rows_of, tokens

CANVAS_IDS = {"decoder_input_ids": tokens(2, CANVAS, 1)}


def fresh():
    return tiny.same_weights(tiny.build_oracle(num_hidden_layers=2, layer_types=list(LAYERS[:2])))


@functools.cache
def ours():
    """Shared between tests: not to be changed."""
    return fresh()


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend="eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def padded(lengths=(4, 9)):
    ids, mask = pad_rows(rows_of(lengths), "left")
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("prompt", [{"input_ids": tokens(2, 9)}, padded()], ids=["plain", "padded"])
def test_prompt_and_canvas_are_one_graph(prompt):
    got = compiled(ours())(**prompt, **CANVAS_IDS)
    expected = ours()(**prompt, **CANVAS_IDS)
    close(got.logits, expected.logits)
    assert got.cache.get_seq_length() == expected.cache.get_seq_length() == 9


@torch.no_grad()
def test_right_padding_past_the_window_is_right_where_its_side_is_not_known():
    ids, mask = pad_rows(rows_of((4, 2 * WINDOW)), "right")
    inputs = {"input_ids": ids, "attention_mask": mask, **CANVAS_IDS}
    close(compiled(ours())(**inputs).logits, ours()(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "masked"), [("windowed", False), ("keep_all", True), ("static", True)])
def test_canvas_over_a_cache_is_one_graph(kind, masked):
    prompt = padded() if masked else {"input_ids": tokens(2, 9)}
    cache = caches(ours())[kind]
    ours().prefill(**prompt, cache=cache)
    inputs = {"cache": cache, "self_conditioning_logits": torch.randn(2, CANVAS, VOCAB), **CANVAS_IDS}
    if masked:
        inputs["decoder_attention_mask"] = torch.nn.functional.pad(prompt["attention_mask"], (0, CANVAS), value=1)
    close(compiled(ours())(**inputs).logits, ours()(**inputs).logits)


def test_loss_of_a_given_canvas_is_one_graph():
    inputs = {"input_ids": tokens(2, 9), "labels": tokens(2, CANVAS, 2), **CANVAS_IDS}
    model = fresh()
    expected = tiny.gradients(model, lambda model: model(**inputs).loss)
    try:
        got = tiny.gradients(model, lambda model: compiled(model, "aot_eager")(**inputs).loss)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if "_grouped_mm_fallback_backward" not in "".join(traceback.format_exception(error)):
            raise
        pytest.skip("on a CPU the backward of this transformers' grouped_mm looks at its numbers, which no graph takes")
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_training_objective_runs_compiled_in_several_graphs():
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[:, :4] = -100
    losses = []
    for model in (ours(), torch.compile(ours(), backend="eager")):
        torch.manual_seed(0)
        losses.append(model(ids, labels=labels).loss)
    close(losses[1], losses[0])


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exported_program_takes_prompts_of_any_length(strict):
    """`use_cache=False`, since a cache is no type that a program puts out; and the model is as before, which a leaked symbol would show."""
    model = fresh()
    length = torch.export.Dim("length", min=2, max=64)
    given = {**padded(), **CANVAS_IDS, "use_cache": False}
    shapes = {name: {1: length} if name in ("input_ids", "attention_mask") else None for name in given}
    with torch.no_grad():
        program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=strict)
        for lengths in ((4, 9), (20, 13), (2, 3)):
            inputs = {**padded(lengths), **CANVAS_IDS, "use_cache": False}
            close(program.module()(**inputs).logits, model(**inputs).logits)


def test_checks_stay_outside_of_graphs():
    """What a graph does not check the plain model does."""
    with pytest.raises(ValueError, match="`decoder_input_ids` holds ids"):
        ours()(tokens(2, 9), decoder_input_ids=torch.full((2, CANVAS), VOCAB))
    with pytest.raises(ValueError, match="image tokens"):
        ours()(torch.full((2, 9), tiny.IMAGE), **CANVAS_IDS)
