"""The denoising step as one unit: it reads nothing back from the device, and recorded it gives the same tokens.

A CUDA graph itself needs a GPU (tests/test_gpu.py). Here the same buffers and the same loop run with a plain replay, and the step is
run on tensors without data, which raise wherever somebody wants to look at them.
"""

import copy

import pytest
import torch
from small_models import prompts, small_model
from torch.utils import _pytree as pytree

from generation.call.plan import Plan, make_plan
from generation.call.progress import start_progress
from generation.call.prompt import Prompt
from generation.call.settings import resolve_config
from generation.constraints.automaton import closed, make_automaton
from generation.fast import recording
from generation.fast.proofs import difference
from generation.fast.recording import Held, NeverWaits, Recording
from generation.loop.predict import StepInputs, draw_step, take_step
from generation.rules.draws import row_draws
from generation.rules.state import start_canvas

VOCAB = 5001  # two pieces of the vocabulary


def alternating(vocab_size=VOCAB):
    """An automaton over ids: low and high ones in turn, as many of each, none of them below 10."""
    classes = 1 + (torch.arange(vocab_size) > vocab_size // 2).long()
    classes[:10] = 0
    edges = torch.tensor([[0, 1, 1], [1, 2, 0]])
    return make_automaton(classes, *edges.T, torch.tensor([True, False]))


@pytest.fixture(scope="module")
def model():
    built = small_model(vocab_size=VOCAB)
    built.generation_config.update(eos_token_id=[], pad_token_id=0)
    return built


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "top_k": 7, "top_p": 0.9, "suppress_tokens": [3, 4]},
        {"sampler": "predictor_corrector", "max_denoising_steps": 3},
        {"sampler": "fixed_steps"},
        {"do_sample": False},
        {"min_new_tokens": 13, "eos_token_id": list(range(2000))},
        {"constraint": alternating(), "eos_token_id": [1]},
        {"constraint": alternating(), "eos_token_id": [1], "cache_implementation": "static", "top_k": 3, "do_sample": False},
        {"constraint": [alternating(), None, alternating()], "eos_token_id": [1], "cache_implementation": "static"},
    ],
    ids=[
        "dynamic",
        "static",
        "filters",
        "predictor-corrector",
        "fixed steps",
        "greedy",
        "hidden ends",
        "constrained",
        "all constrained",
        "some constrained",
    ],
)
def test_recorded_steps_give_the_same_tokens(model, settings, request, monkeypatch):
    """Over several canvases, past the sliding window, at every step. Both with as many slots as a recorded step has: those not filled are
    masked, but make sums of another length, which random weights make grow."""
    monkeypatch.setattr(Plan, "slots", property(lambda plan: plan.lengths.cache))
    rows = 3 if "cache_implementation" in settings else 1
    ids, mask = prompts(rows, 9, padded=3 if rows > 1 else 0)
    settings = {"attention_mask": mask, "max_new_tokens": 35, "max_denoising_steps": 4, "seed": list(range(1, 1 + rows)), **settings}
    plain = model.generate(ids, **settings)
    request.getfixturevalue("records")
    refused = []
    monkeypatch.setattr("generation.fast.recording.logger.warning_once", refused.append)
    recorded = model.generate(ids, **settings)
    assert torch.equal(recorded, plain) and refused == []


def test_settings_of_a_call_go_over_those_of_the_call_before(model, records):
    """Elsewhere a compiled sampler keeps the first call's entropy bound."""
    ids = prompts(1, 9)[0]
    settings = {"max_new_tokens": 10, "max_denoising_steps": 6, "seed": 0, "confidence_threshold": 1e-9, "cache_implementation": "static"}
    by_bound = [model.generate(ids, entropy_bound=bound, **settings) for bound in (1e-6, 100.0, 1e-6)]
    assert torch.equal(by_bound[0], by_bound[2]) and not torch.equal(by_bound[0], by_bound[1])
    by_temperature = [model.generate(ids, temperature=scale, **settings) for scale in (0.1, 1.0)]
    assert not torch.equal(*by_temperature)


def test_disable_compile_records_nothing(model, records, monkeypatch):
    monkeypatch.setattr(Recording, "on", lambda *a: pytest.fail("recorded"))
    model.generate(prompts(1, 9)[0], max_new_tokens=5, max_denoising_steps=2, disable_compile=True)


def test_a_step_that_cannot_be_recorded_runs_plainly_with_a_warning(model, records, monkeypatch):
    ids, settings = prompts(1, 9)[0], {"max_new_tokens": 25, "max_denoising_steps": 3, "seed": 0}

    def fail(run, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    expected = model.generate(ids, **settings)
    monkeypatch.setattr("generation.fast.recording.record_plainly", fail)
    said = []
    monkeypatch.setattr("generation.fast.recording.logger.warning_once", said.append)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert len(said) == 1 and "when stream is capturing" in said[0]


@pytest.mark.parametrize("fault", ["stale", "others", "strange"])
def test_a_recording_that_does_not_give_what_the_step_gives_is_not_used(model, records, monkeypatch, fault):
    """The first replay is held against the plain step: a recording that does nothing, one that computes something else, and an error of
    a kind that only a compiler of kernels raises."""
    ids, settings = prompts(1, 9)[0], {"max_new_tokens": 25, "max_denoising_steps": 3, "seed": 0}
    expected = model.generate(ids, **settings)

    class Strange(Exception):
        pass

    def record(run, device):
        if fault == "strange":
            raise Strange("ptxas fell over")
        held = Held(pytree.tree_map_only(torch.Tensor, torch.zeros_like, run()))

        def others():
            held.fill(pytree.tree_map_only(torch.Tensor, lambda one: one * 2 if one.is_floating_point() else one, run()))

        return (lambda: None) if fault == "stale" else others, held.value

    monkeypatch.setattr(recording, "record_plainly", record)
    said = []
    monkeypatch.setattr("generation.fast.recording.logger.warning_once", said.append)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert len(said) == 1 and ("Strange: ptxas fell over" if fault == "strange" else "numbers in value") in said[0]


def test_the_proof_of_recording_finds_a_recording_that_lies(monkeypatch):
    device = torch.device("cpu")
    assert difference(*recording.RECORDED_STEP.prove(device)) is None
    monkeypatch.setattr(recording, "record_plainly", lambda run, device: (lambda: None, Held(run()).value))  # never computes again
    assert difference(*recording.RECORDED_STEP.prove(device)) is not None


@pytest.mark.parametrize(
    "waiting", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: x.to("meta")]
)
def test_what_waits_is_found_before_it_is_recorded(waiting):
    numbers, places = torch.arange(6.0), torch.tensor([1, 0])
    with NeverWaits(torch.device("cpu")):
        assert (numbers[places] + torch.full((), 2.0)).shape == (2,)
        with pytest.raises(RuntimeError, match="waits for the device|copies between devices"):
            waiting(numbers)
    waiting(numbers)


def test_held_values_refuse_what_they_cannot_copy():
    with pytest.raises(ValueError, match="cannot hold a object"):
        Held({"mask": object()})
    held = Held((torch.zeros(2), 3))
    with pytest.raises(ValueError, match="structure"):
        held.fill((torch.zeros(2),))
    with pytest.raises(ValueError, match="expected 3"):
        held.fill((torch.zeros(2), 4))


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}, {"sampler": "predictor_corrector"}, {"do_sample": False}]
)
@pytest.mark.parametrize("constrained", [False, True])
@torch.no_grad()
def test_a_step_never_looks_at_the_device(model, settings, constrained):
    """Tensors without data raise where a value, or a size that depends on values, is asked for; and no CPU tensor may come in."""
    model = copy.deepcopy(model).to(torch.bfloat16)  # grouped products without data know no other dtype
    config, _ = resolve_config(None, model.generation_config, {"min_new_tokens": 3, **settings})
    cache = model.prefill(prompts(2, 9)[0]).past_key_values
    view = model.prepare_canvas(cache, (2, 10), torch.ones((2, 19), dtype=torch.bool), slots=19)
    device = torch.device("meta")
    model = model.to(device)
    ids = torch.zeros((2, 9), dtype=torch.int64, device=device)
    plan = make_plan(model, config, Prompt(ids, ids.bool(), {"input_ids": ids}, None), 10)
    view = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), view)
    soft_embeds = torch.zeros((2, 10, model.config.text_config.hidden_size), dtype=model.dtype, device=device)
    state = start_canvas(torch.zeros((2, 10), dtype=torch.int64, device=device), soft_embeds, plan.rules.stopping)
    steps, temperatures = plan.steps(device)
    filters = plan.rules.shaping.filters
    on_cpu = state._replace(canvas=state.canvas.new_zeros((2, 10), device="cpu"))
    drawn = draw_step(plan, row_draws([5, 6], None, 2, 1), on_cpu, filters, constrained)
    drawn = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), drawn)
    inputs = StepInputs(state, steps[1], temperatures[1], drawn, filters)
    if constrained:
        progress = start_progress([closed(alternating(), [1], 0)] * 2, 0, device).on(10, 17)
        inputs = inputs._replace(progress=progress)
    with NeverWaits(device):  # what looks before a GPU records agrees
        prediction, after = take_step(model, plan, view, inputs)
    assert after.canvas.shape == (2, 10) and prediction.bad.shape == (2,) and after.soft_embeds.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(prediction.bad.any())
