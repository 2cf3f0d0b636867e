"""What may change a step from outside: `callback_on_step_end`, a sampler and a stopping rule of the caller's, the thresholds that are None,
and the self-conditioning of the first step."""

import random
from dataclasses import dataclass

import pytest
import torch
from small_models import CANVAS, PAD, VOCAB, prompts, small_model, small_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from generation import (
    Choice,
    DiffusionGenerationConfig,
    EntropyBoundSampler,
    Never,
    PredictorCorrectorSampler,
    Proposal,
    StableAndConfident,
    Watcher,
)
from generation.call.configuration import RELEASED_DEFAULTS
from generation.call.plan import Plan
from generation.call.settings import resolve_config
from generation.watch.callback import ALWAYS, NAMES
from jobs import TEXT_JOBS
from modeling_diffusiongemma import default_checkpoint

HIDDEN = 32
SETTINGS = {"max_new_tokens": 2 * CANVAS, "max_denoising_steps": 4, "eos_token_id": [], "pad_token_id": PAD, "confidence_threshold": 1e-9}
# Of decoding in more than one way: what denoising alone reads stands in the config.
GREEDY = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": [], "pad_token_id": PAD,
          "generation_config": {"max_denoising_steps": 3}}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def text():
    path = default_checkpoint()
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def run(model, callback, rows=1, **settings):
    ids, mask = prompts(rows, 9)
    common = {name: value for name, value in SETTINGS.items() if "stopping" not in settings or name != "confidence_threshold"}
    output = model.generate(
        ids, attention_mask=mask, callback_on_step_end=callback, return_dict_in_generate=True,
        **{**common, "seed": list(range(rows)), **settings},
    )  # fmt: skip
    return output.sequences[:, 9:], output.denoising_steps.tolist()


# What it is given


def test_the_state_says_what_it_holds(model):
    seen = []

    def callback(called, step, noise_proportion, state):
        assert called is model
        seen.append(
            (state["canvas_index"], step, noise_proportion, {name: value for name, value in state.items() if name != "canvas_index"})
        )

    run(model, callback, rows=3)
    assert [each[:3] for each in seen] == [(canvas, step, 1 - (step + 1) / 4) for canvas in range(2) for step in range(4)]
    positions = {
        **dict.fromkeys(("canvas", "argmax", "sample", "changed_at", "revisions"), torch.int64),
        **dict.fromkeys(("entropy", "log_probs"), torch.float32),
        "accepted": torch.bool,
    }
    expected = {name: ((3, CANVAS), dtype) for name, dtype in positions.items()}
    expected |= {"soft_embeds": ((3, CANVAS, HIDDEN), torch.float32), "finished": ((3,), torch.bool)}
    expected |= dict.fromkeys(("passes", "rows"), ((3,), torch.int64))
    for *_, state in seen:
        assert {name: (tuple(value.shape), value.dtype) for name, value in state.items()} == expected
        assert state["rows"].tolist() == [0, 1, 2]


def test_the_state_holds_what_is_asked_for_and_logits_are_those_of_the_step(model):
    seen = []
    names = ["logits", "argmax", "entropy"]
    run(model, lambda *told: seen.append(told[3]), rows=2, callback_on_step_end_tensor_inputs=names)
    for state in seen:
        assert set(state) == {*names, *ALWAYS} and state["logits"].shape == (2, CANVAS, VOCAB)
        assert torch.equal(state["logits"].argmax(dim=-1), state["argmax"])
        torch.testing.assert_close(torch.distributions.Categorical(logits=state["logits"]).entropy(), state["entropy"])
    with pytest.raises(ValueError, match=r"`callback_on_step_end_tensor_inputs` holds \['prompt'\]; expected names among \['canvas'"):
        run(model, print, callback_on_step_end_tensor_inputs=["canvas", "prompt"])
    with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs` is given; expected `callback_on_step_end` with it"):
        run(model, None, callback_on_step_end_tensor_inputs=["canvas"])


def test_a_callback_that_changes_nothing_changes_nothing(model):
    expected = run(model, None, rows=3)
    for answer in (lambda state: None, lambda state: {}, lambda state: state, lambda state: state.clear(), lambda state: dict(state)):
        found = run(model, lambda called, step, noise, state, answer=answer: answer(state), rows=3)
        assert torch.equal(found[0], expected[0]) and found[1] == expected[1]


# What it may change


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("way", ["returned", "in the dict", "in place", "in place and returned"])
def test_tokens_are_pinned_however_it_is_said(model, way, inference):
    def callback(called, step, noise, state):
        changed = {}
        for name in ("canvas", "argmax"):
            changed[name] = state[name] if "in place" in way else state[name].clone()
            changed[name][:, 2] = 7
        if way == "in the dict":
            state.update(changed)
        return {"returned": changed, "in place and returned": state}.get(way)

    with torch.inference_mode(inference):
        tokens, steps = run(model, callback, rows=2)
    assert tokens[:, [2, 12]].tolist() == [[7, 7]] * 2 and steps == [8, 8]


def test_what_the_canvas_holds_is_what_the_next_pass_reads(model):
    """And the argmax is committed: pinned at the last step alone it changes no other token."""
    passes = []

    class Sees(Watcher):
        def step(self, canvas_index, step, places, state, prediction):
            passes.append(state.canvas)

    fill = torch.full((1, CANVAS), 17)
    run(model, lambda *told: {"canvas": fill.int()}, watcher=Sees())
    assert all(torch.equal(canvas, fill) for canvas in passes), "a watcher is told of what the callback made"
    free, _ = run(model, None, max_new_tokens=CANVAS)
    last, _ = run(model, lambda m, step, n, state: {"argmax": fill} if step == 3 else None, max_new_tokens=CANVAS)
    assert torch.equal(last, fill) and not torch.equal(free, fill)


def test_self_conditioning_is_said_as_logits_or_as_soft_embeddings(model):
    logits = torch.randn(2, CANVAS, VOCAB, generator=torch.Generator().manual_seed(3)) * 3
    by_logits, _ = run(model, lambda *told: {"self_conditioning_logits": logits}, rows=2)
    by_embeds, _ = run(model, lambda *told: {"soft_embeds": model.soft_embed(logits)}, rows=2)
    one, _ = run(model, lambda *told: {"self_conditioning_logits": logits[0]}, rows=2)
    same, _ = run(model, lambda *told: {"self_conditioning_logits": logits[:1].expand(2, -1, -1)}, rows=2)
    assert torch.equal(by_logits, by_embeds) and torch.equal(one, same)
    seen = []
    for callback in (None, lambda *told: {"self_conditioning_logits": logits}):

        class Sees(Watcher):
            def step(self, canvas_index, step, places, state, prediction):
                seen.append(prediction.entropy)

        run(model, callback, rows=2, watcher=Sees(), max_new_tokens=CANVAS)
    assert torch.equal(seen[0], seen[4]) and not torch.equal(seen[1], seen[5]), "it counts from the second step on"


def test_finished_has_the_last_word_on_the_stopping_rules(model):
    """The rules end every row at once; a callback that says False lets all of them go on, and one that says True ends them."""
    at_once = {"stability_threshold": 0, "confidence_threshold": 1e9}
    assert run(model, None, rows=3, **at_once)[1] == [2, 2, 2]
    assert run(model, lambda m, s, n, state: {"finished": torch.zeros_like(state["finished"])}, rows=3, **at_once)[1] == [8, 8, 8]

    def second(model, step, noise, state):
        return {"finished": (state["rows"] == 1) & (step == 1)}

    for kind in ("dynamic", "static"):
        assert run(model, second, rows=3, cache_implementation=kind)[1] == [8, 4, 8]


def test_the_argmax_of_a_row_that_it_ends_stays(model):
    """Whether the row leaves the batch or not, and whatever is said of the others later."""
    ends = torch.full((1, CANVAS), 21)

    def callback(called, step, noise, state):
        first = (state["rows"] == 0)[:, None]
        argmax = torch.where(first, 21, 50 + step)
        return {"argmax": argmax.expand(-1, CANVAS), "finished": first[:, 0]}

    for kind in ("dynamic", "static"):
        tokens, steps = run(model, callback, rows=3, cache_implementation=kind, max_new_tokens=CANVAS)
        assert steps == [1, 4, 4] and torch.equal(tokens, torch.cat((ends, torch.full((2, CANVAS), 53))))


# Rows, batches, recorded steps


class Script:
    """Pins a token of each request's, ends one early; keeps which steps of which requests it was asked about."""

    def __init__(self, requests):
        self.requests, self.asked = requests, []

    def __call__(self, model, step, noise, state):
        requests = [self.requests[row] for row in state["rows"].tolist()]
        self.asked += [(request, state["canvas_index"], step) for request in requests]
        tokens = torch.tensor(requests)[:, None] + 300
        first = torch.arange(state["canvas"].shape[1]) == 0
        finished = state["finished"] | (torch.tensor(requests) == 2) & (step == 1)
        return {"canvas": torch.where(first, tokens, state["canvas"]), "argmax": torch.where(first, tokens, state["argmax"]),
                "finished": finished}  # fmt: skip


@pytest.mark.parametrize("way", ["dynamic", "static", "late flags"])
def test_a_row_that_is_changed_equals_that_row_alone(text, way, monkeypatch):
    """And the callback is asked about it as often: a row that has finished is not shown while it waits for others."""
    if way == "late flags":
        monkeypatch.setattr("generation.call.plan.reads_late", lambda device: True)
    model, tokenizer = text
    rng = random.Random(5)
    wanted = [job.sample(rng, "test")[0] for job in TEXT_JOBS.values()][:5]

    def answers(requests):
        chats = [[{"role": "user", "content": wanted[request]}] for request in requests]
        inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt")
        script = Script(requests)
        output = model.generate(
            **inputs, callback_on_step_end=script, seed=[100 + request for request in requests], canvas_length=16, max_new_tokens=32,
            max_denoising_steps=8, cache_implementation="static" if way == "static" else None, return_dict_in_generate=True,
        )  # fmt: skip
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        rows = [row[:length].tolist() for row, length in zip(new, output.lengths.tolist(), strict=True)]
        asked = {request: [each[1:] for each in script.asked if each[0] == request] for request in requests}
        return dict(zip(requests, zip(rows, output.denoising_steps.tolist(), strict=True), strict=True)), asked

    together, asked = answers([3, 0, 4, 1, 2])
    assert len({steps for _, steps in together.values()}) > 1, "rows end at different steps"
    for request in range(5):
        alone, asked_alone = answers([request])
        assert alone[request] == together[request] and asked_alone[request] == asked[request]
        assert len(asked[request]) == together[request][1], "once a pass that the row needed"


@pytest.mark.parametrize("rows", [1, 3])
def test_a_recorded_step_equals_an_unrecorded_one(rows, request, monkeypatch):
    model = small_model(vocab_size=5001)
    monkeypatch.setattr(Plan, "slots", property(lambda plan: plan.lengths.cache))  # sums of one length
    kind = {} if rows == 1 else {"cache_implementation": "static"}

    def callback(called, step, noise, state):
        state["canvas"][:, 3] = 7
        state["soft_embeds"].mul_(0.5)
        return {"finished": (state["rows"] == 0) & (step == 2)}

    plain = run(model, callback, rows=rows, **kind)
    request.getfixturevalue("records")
    recorded = run(model, callback, rows=rows, **kind)
    assert torch.equal(recorded[0], plain[0]) and recorded[1] == plain[1]


def test_drafts_that_are_verified_may_be_changed_and_a_pass_without_steps_has_none(model):
    ids = prompts(1, 9)[0]
    fill = torch.full((1, CANVAS), 17)
    expected = model.generate(ids, decoding="autoregressive", **GREEDY)
    found = model.generate(ids, decoding="verified", callback_on_step_end=lambda *told: {"argmax": fill}, **GREEDY)
    assert torch.equal(found, expected)
    with pytest.raises(
        ValueError, match="`decoding` is 'autoregressive', which has no steps; expected another with `callback_on_step_end`"
    ):
        model.generate(ids, decoding="autoregressive", callback_on_step_end=print, **GREEDY)
    with pytest.raises(ValueError, match="got 2 rows; expected one together with `callback_on_step_end`"):
        model.generate(prompts(2, 9)[0], decoding="verified", callback_on_step_end=print, **GREEDY)


# What is refused


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (3, "`callback_on_step_end` returned 3; expected None, or a dict of what it changes"),
        ({"x0": 1, "rows": torch.zeros(2)}, r"changed \['rows', 'x0'\]; expected changes of \['canvas', 'argmax', 'soft_embeds'"),
        ({"entropy": torch.zeros(2, CANVAS)}, r"changed \['entropy'\]"),
        ({"canvas": [1] * CANVAS}, r"`canvas` is \[1, .*; expected a tensor"),
        ({"canvas": torch.zeros(2, CANVAS)}, "`canvas` is Tensor torch.float32 .*expected an integer tensor"),
        ({"argmax": torch.zeros(2, 3, dtype=torch.int64)}, r"`argmax` has shape \(2, 3\); expected \(2, 10\)"),
        ({"canvas": torch.full((2, CANVAS), VOCAB)}, "`canvas` holds ids from 100 to 100; expected ids from 0 to 99"),
        ({"argmax": torch.full((2, CANVAS), -1)}, "`argmax` holds ids from -1 to -1"),
        ({"finished": torch.zeros(2)}, "`finished` is torch.float32; expected torch.bool"),
        ({"finished": torch.zeros(3, dtype=torch.bool)}, r"`finished` has shape \(3,\); expected \(2,\)"),
        ({"finished": True}, "`finished` is True; expected a tensor"),
        ({"soft_embeds": torch.zeros(2, CANVAS, HIDDEN).double()}, "`soft_embeds` is torch.float64; expected torch.float32"),
        ({"soft_embeds": torch.zeros(2, CANVAS, 4)}, r"`soft_embeds` has shape \(2, 10, 4\); expected \(2, 10, 32\)"),
        ({"canvas": torch.zeros(2, CANVAS, dtype=torch.int64, device="meta")}, "`canvas` is on meta; expected cpu"),
        ({"self_conditioning_logits": torch.zeros(2, CANVAS, 4)}, r"`self_conditioning_logits` has shape \(2, 10, 4\); expected \(2,"),
        ({"self_conditioning_logits": torch.full((CANVAS, VOCAB), float("nan"))}, "`self_conditioning_logits` holds NaN"),
        (
            {"self_conditioning_logits": torch.zeros(CANVAS, VOCAB), "soft_embeds": torch.zeros(2, CANVAS, HIDDEN)},
            "`soft_embeds` and `self_conditioning_logits` are both given",
        ),
    ],
)  # fmt: skip
def test_what_a_callback_may_not_say_is_refused_by_name(model, answer, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        run(model, lambda *told: answer, rows=2)
    assert "callback_on_step_end" in str(caught.value)


@pytest.mark.parametrize("name", sorted({*NAMES, "rows"} - {"canvas", "argmax", "soft_embeds", "finished"}))
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_what_may_only_be_read_is_not_changed_in_place_either(model, name, inference):
    def callback(called, step, noise, state):
        state[name][:] = 0

    with torch.inference_mode(inference), pytest.raises(ValueError, match=rf"`callback_on_step_end` changed \['{name}'\]"):
        run(model, callback, callback_on_step_end_tensor_inputs=[*NAMES])


# A sampler of one's own


@dataclass(frozen=True)
class EveryOther:
    """Accepts every other position, the even ones first."""

    informed = False
    counts_steps = True
    answers: str = "right"

    def propose(self, canvas, prediction, noise, uniform, step, max_denoising_steps):
        accepted = (torch.arange(canvas.shape[1], device=canvas.device) % 2 == step % 2).expand_as(canvas)
        proposal = Proposal(torch.where(accepted, prediction.sample, noise), accepted)
        wrong = {"canvas": proposal.canvas, "floats": Proposal(proposal.canvas.float(), accepted), "flags": (proposal.canvas, noise)}
        wrong["narrow"] = Proposal(proposal.canvas[:, :3], accepted[:, :3])
        return wrong.get(self.answers, proposal)


@pytest.mark.parametrize("settings", [{}, {"top_k": 7}, {"noise": "mask", "mask_token_id": 3}, {"cache_implementation": "static"}])
def test_a_sampler_may_be_an_instance(model, settings, request):
    accepted = []
    tokens, _ = run(model, lambda m, step, n, state: accepted.append((step, state["accepted"])), sampler=EveryOther(), rows=2, **settings)
    assert all(bool((flags == (torch.arange(CANVAS) % 2 == step % 2)).all()) for step, flags in accepted)
    assert torch.equal(run(model, None, sampler=EntropyBoundSampler(0.2), rows=2, **settings)[0],
                       run(model, None, entropy_bound=0.2, rows=2, **settings)[0])  # fmt: skip
    in_config = DiffusionGenerationConfig(sampler=EveryOther())
    assert torch.equal(run(model, None, generation_config=in_config, rows=2, **settings)[0], tokens)
    if settings != {"top_k": 7}:
        request.getfixturevalue("records")
        assert torch.equal(run(model, None, sampler=EveryOther(), rows=2, **settings)[0], tokens)


def test_an_informed_sampler_may_be_an_instance(model):
    by_name = run(model, None, sampler="predictor_corrector", rows=2)
    assert torch.equal(run(model, None, sampler=PredictorCorrectorSampler(VOCAB, 1, 8), rows=2)[0], by_name[0])
    with pytest.raises(ValueError, match="`noise` is 'mask'; expected 'uniform'"):
        run(model, None, sampler=PredictorCorrectorSampler(VOCAB, 1, 8), noise="mask", mask_token_id=3)
    with pytest.raises(ValueError, match="`sampler` has a `vocab_size` of 7; expected the model's, 100"):
        run(model, None, sampler=PredictorCorrectorSampler(7, 1, 8))


def test_drafts_that_are_verified_may_come_of_any_sampler_and_stopping_rule(model):
    ids = prompts(2, 9)[0]
    expected = model.generate(ids, decoding="autoregressive", **GREEDY)
    assert torch.equal(model.generate(ids, decoding="verified", sampler=EveryOther(), stopping=Never(), **GREEDY), expected)


@pytest.mark.parametrize("answers", ["canvas", "floats", "flags", "narrow"])
def test_what_a_sampler_returns_must_be_a_proposal(model, answers):
    with pytest.raises(
        ValueError, match=r"`sampler` is EveryOther\(answers='\w+'\), whose `propose` returned .*; expected a `Proposal` of"
    ):
        run(model, None, sampler=EveryOther(answers))


@pytest.mark.parametrize("sampler", [EveryOther, object(), 3, "random"])
def test_what_is_no_sampler_is_refused(model, sampler):
    with pytest.raises(ValueError, match="`sampler` is .*; expected one of .*or an instance with the method `propose`"):
        run(model, None, sampler=sampler)


def test_a_sampler_does_not_go_with_arguments_of_others(model):
    with pytest.raises(ValueError, match="`confidence` is 0.3, and `sampler` is .*EveryOther.*; expected 'confidence', or"):
        run(model, None, sampler=EveryOther(), confidence=0.3)


def test_a_config_with_a_sampler_of_ones_own_says_that_it_cannot_be_saved(model, tmp_path):
    config = DiffusionGenerationConfig(sampler=EveryOther(), top_k=3)
    assert "EveryOther" in repr(config) and config == DiffusionGenerationConfig(sampler=EveryOther(), top_k=3)
    assert config != DiffusionGenerationConfig(sampler=EveryOther("flags"), top_k=3) and len({config, config}) == 1
    (tmp_path / "model").mkdir()
    holder = small_model()
    holder.generation_config = config
    for save in (
        lambda: config.save_pretrained(tmp_path / "config"), config.to_json_string, lambda: config.to_json_file(tmp_path / "file"),
        lambda: holder.save_pretrained(tmp_path / "model"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="`sampler` is EveryOther"):
            save()
    assert [path.name for path in tmp_path.rglob("*")] == ["model"], "nothing is written"


# A stopping rule of one's own


@dataclass(frozen=True)
class Countdown:
    """Ends row by row: after as many steps as the first token of its argmax is odd or even, 2 or 3; remembers the steps."""

    answers: str = "right"

    def start(self, canvas):
        wrong = {"number": 3, "few": torch.zeros(1, dtype=torch.int64)}
        return wrong.get(self.answers, (canvas.new_zeros(len(canvas)),))

    def update(self, memory, prediction, counted):
        if self.answers in ("none", "memory"):
            return None if self.answers == "none" else (prediction.argmax[:, 0] > 0, ())
        steps = memory[0] + 1
        done = steps >= 2 + prediction.argmax[:, 0] % 2
        return (done.long() if self.answers == "numbers" else done), (steps,)


@pytest.mark.parametrize("way", ["dynamic", "static", "recorded"])
def test_a_stopping_rule_may_be_an_instance(model, way, request):
    if way == "recorded":
        request.getfixturevalue("records")
    kind = {"cache_implementation": "dynamic" if way == "dynamic" else "static", "max_new_tokens": CANVAS}
    tokens = {}

    def callback(called, step, noise, state):
        for row, argmax, finished in zip(state["rows"].tolist(), state["argmax"], state["finished"].tolist(), strict=True):
            tokens.setdefault(row, []).append(int(argmax[0]))
            assert finished == (step + 1 >= 2 + int(argmax[0]) % 2)

    _, steps = run(model, callback, rows=5, stopping=Countdown(), **kind)
    assert [len(tokens[row]) for row in range(5)] == steps and set(steps) <= {2, 3, 4}


@pytest.mark.parametrize("kind", [{}, {"cache_implementation": "static"}])
def test_the_rules_of_the_thresholds_as_an_instance_do_the_same(model, kind):
    for nats in (3.0, 0.5):
        by_name = run(model, None, rows=4, confidence_threshold=nats, ignore_after_eos=False, **kind)
        found = run(model, None, rows=4, stopping=StableAndConfident(1, nats), **kind)
        assert torch.equal(found[0], by_name[0]) and found[1] == by_name[1]


@pytest.mark.parametrize("answers", ["number", "few", "none", "memory", "numbers"])
def test_what_a_stopping_rule_says_is_checked(model, answers):
    method = "start" if answers in ("number", "few") else "update"
    with pytest.raises(ValueError, match=rf"`stopping` is Countdown\(answers='{answers}'\), whose `{method}` returned .*; expected"):
        run(model, None, rows=2, stopping=Countdown(answers))


def test_a_stopping_rule_replaces_the_thresholds_and_does_not_go_with_them(model):
    in_config = DiffusionGenerationConfig(patience=1, stability_threshold=0, confidence_threshold=1e9)
    assert run(model, None, stopping=Never(), generation_config=in_config)[1] == [8]
    for name, value in {"stability_threshold": 0, "confidence_threshold": None, "patience": 3}.items():
        with pytest.raises(ValueError, match=rf"`stopping` is Never\(\), and \['{name}'\] are given, too"):
            run(model, None, stopping=Never(), **{name: value})
    for wrong in (Never, 3, object()):
        with pytest.raises(ValueError, match="`stopping` is .*; expected a `generation.rules.stopping.StoppingRule`"):
            run(model, None, stopping=wrong)
    with pytest.raises(ValueError, match="`decoding` is 'autoregressive', which has no steps; expected another with `stopping`"):
        model.generate(prompts(1, 9)[0], stopping=Never(), decoding="autoregressive")


# Thresholds that are None, and the self-conditioning of the first step, as in transformers' class


@pytest.mark.parametrize("name", ["stability_threshold", "confidence_threshold"])
def test_a_threshold_that_is_none_never_stops_early(model, name):
    at_once = {"stability_threshold": 0, "confidence_threshold": 1e9}
    assert run(model, None, rows=2, **at_once)[1] == [2, 2]
    assert run(model, None, rows=2, **{**at_once, name: None})[1] == [8, 8]
    in_config = DiffusionGenerationConfig(patience=1, **{**at_once, name: None})
    resolved, _ = resolve_config(in_config, DiffusionGenerationConfig(), {})
    assert getattr(resolved, name) == RELEASED_DEFAULTS[name], "None in a config is the default"
    assert run(model, None, rows=2, generation_config=in_config, **{name: None})[1] == [8, 8]
    with pytest.raises(ValueError, match=f"`patience` is 3; expected it unset, since `{name}` is None"):
        run(model, None, patience=3, **{name: None})


@pytest.fixture(scope="module")
def pair():
    return small_pair()


def both(pair, **settings):
    """transformers' class and ours from one seed, over one canvas: before 5.23 its class commits a generated image token as the pad
    token."""
    oracle, ours = pair
    ids, mask = prompts(2, 9, padded=2)
    common = {"attention_mask": mask, "max_new_tokens": CANVAS, "max_denoising_steps": 3, **settings}
    torch.manual_seed(5)
    expected = oracle.generate(ids.clone(), disable_compile=True, **{n: v.clone() if hasattr(v, "clone") else v for n, v in common.items()})
    torch.manual_seed(5)
    got = ours.generate(ids, backend="reference", eos_token_id=None, return_dict_in_generate=True, **common)
    assert torch.equal(got.sequences, expected.sequences)
    return got


def test_thresholds_that_are_none_are_those_of_transformers(pair):
    assert both(pair, stability_threshold=None, confidence_threshold=None).denoising_steps.tolist() == [3, 3]
    assert both(pair, stability_threshold=0, confidence_threshold=None).denoising_steps.tolist() == [3, 3]
    assert both(pair, stability_threshold=0, confidence_threshold=1e9).denoising_steps.tolist() == [1, 1]


@pytest.mark.parametrize("with_canvas", [False, True], ids=["noise", "canvas"])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_first_step_is_conditioned_as_in_transformers(pair, with_canvas, dims):
    draw = torch.Generator().manual_seed(2)
    logits = 4 * torch.randn(*[2, CANVAS, VOCAB][-dims:], generator=draw)
    canvas = {"decoder_input_ids": torch.randint(VOCAB, (2, CANVAS), generator=draw)} if with_canvas else {}
    conditioned = both(pair, self_conditioning_logits=logits, **canvas)
    assert not torch.equal(conditioned.sequences, both(pair, **canvas).sequences)


def test_a_row_is_conditioned_by_its_logits(model):
    """Taken on from a later step, and copied with its prompt."""
    logits = 4 * torch.randn(2, CANVAS, VOCAB, generator=torch.Generator().manual_seed(2))
    ids, canvas = prompts(2, 9)[0], prompts(2, CANVAS, seed=4)[0]
    seen = []

    class Sees(Watcher):
        def step(self, canvas_index, step, places, state, prediction):
            seen.append((canvas_index, step, prediction.entropy))

    settings = {**SETTINGS, "decoder_input_ids": canvas, "first_step": 2, "seed": 1}
    model.generate(ids, self_conditioning_logits=logits, watcher=Sees(), **settings)
    assert [each[:2] for each in seen] == [(0, 2), (0, 3), *((1, step) for step in range(4))]
    first = seen[0][2]
    model.generate(ids, self_conditioning_logits=logits, watcher=Sees(), num_return_sequences=2, **settings)
    torch.testing.assert_close(seen[6][2], first.repeat_interleave(2, dim=0), atol=1e-4, rtol=0)  # sums of another shape
    model.generate(ids, watcher=Sees(), **settings)
    assert not torch.allclose(seen[12][2], first, atol=1e-2)


def test_a_row_whose_canvas_stands_is_not_shown(text):
    """It was, together with a row whose constraint refuses its canvas, and could be changed."""
    (model, tokenizer), seen = text, []
    canvas = torch.nn.functional.pad(
        tokenizer(["yes<turn|>", "map<turn|>"], add_special_tokens=False, return_tensors="pt").input_ids, (0, 5)
    )

    def spoil(model, step, noise_proportion, state):
        seen.append(state["rows"].tolist())
        return {"argmax": torch.where(state["rows"][:, None] == 0, 300, state["argmax"])}

    output = model.generate(
        tokenizer(["a", "a"], return_tensors="pt").input_ids, constraint=Choice(["yes", "no"]), tokenizer=tokenizer,
        decoder_input_ids=canvas, first_step=4, max_denoising_steps=4, canvas_length=canvas.shape[1], callback_on_step_end=spoil,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert seen == [[1]] and output.denoising_steps.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"self_conditioning_logits": torch.zeros(1, CANVAS, VOCAB)}, r"has shape \(1, 10, 100\); expected \(2, 10, 100\) or \(10, 100\)"),
        ({"self_conditioning_logits": torch.zeros(VOCAB)}, "expected a floating tensor of shape"),
        ({"self_conditioning_logits": torch.full((CANVAS, VOCAB), -float("inf"))}, "holds NaN, inf, or -inf for every id"),
        ({"self_conditioning_logits": torch.zeros(CANVAS, VOCAB), "canvas_length": 5}, r"expected \(2, 5, 100\) or \(5, 100\)"),
        ({"self_conditioning_logits": torch.zeros(CANVAS, VOCAB), "decoding": "verified", "do_sample": False}, "`decoding` is 'verified'"),
    ],
)  # fmt: skip
def test_self_conditioning_without_a_meaning_is_refused_by_name(model, settings, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        run(model, None, rows=2, **settings)
    assert "self_conditioning_logits" in str(caught.value)


# Near misses


@pytest.mark.parametrize(
    ("name", "meant"),
    {
        **dict.fromkeys(("num_diffusion_steps", "num_inference_steps", "steps", "max_steps", "denoising_steps"), "max_denoising_steps"),
        **dict.fromkeys(("gen_length", "max_tokens", "max_completion_tokens", "new_tokens"), "max_new_tokens"),
        **dict.fromkeys(("block_length", "block_size"), "canvas_length"), "temprature": "temperature", "top_n": "top_p",
        "entropy_threshold": "entropy_bound", "confidence_treshold": "confidence_threshold", "eos_token_ids": "eos_token_id",
        "stop_words": "stop_strings", "colour": None, "remote": None,
    }.items(),
)  # fmt: skip
def test_an_unknown_argument_names_what_was_perhaps_meant(model, name, meant):
    hint = f"`{name}`" + (f" (did you mean `{meant}`?)" if meant else "") + ";"
    for call in (lambda: model.generate(prompts(1, 9)[0], **{name: 3}), lambda: DiffusionGenerationConfig(**{name: 3})):
        with pytest.raises(ValueError) as caught:
            call()
        assert hint in str(caught.value)


def test_every_unknown_argument_has_its_hint(model):
    with pytest.raises(
        ValueError, match=r"arguments `callback` \(did you mean `callback_on_step_end`\?\), `colour`, `steps` \(did you mean"
    ):
        model.generate(prompts(1, 9)[0], steps=3, colour=1, callback=print)
