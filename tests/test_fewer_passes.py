"""What needs fewer passes and changes no answer: the rule of the joint entropy; and entropies that are numbers, whatever narrows them."""

import functools
import itertools
import runpy
from pathlib import Path

import programs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CANVAS, PAD, VOCAB, prompts, small_model
from test_steps import with_entropy

from generation import AnyOf, DiffusionGenerationConfig, Never, Regex, Settled, StableAndConfident, Watcher
from generation.call.processors import build_shaping
from generation.rules.draws import BatchDraws
from generation.rules.prediction import Prediction, dense_prediction, narrowed
from generation.rules.samplers import SAMPLERS, EntropyBoundSampler
from generation.vocabulary.walk import VocabularyHead, streamed_prediction

# The joint entropy


def settled(entropy, nats, counted=None):
    rule = Settled(nats)
    done, memory = rule.update(rule.start(torch.zeros_like(entropy).long()), with_entropy(entropy), counted)
    assert memory == ()
    return done.tolist()


def test_what_counts_is_the_sum_and_it_must_lie_below():
    """Powers of 2 are exact in float32; the length of the canvas plays no role."""
    for length in (2, 5, 256):
        entropy = torch.zeros(3, length)
        entropy[:, :2] = torch.tensor([[0.125, 0.0], [0.125, 0.125], [0.125, 0.0625]])
        assert settled(entropy, 0.25) == [True, False, True]


def test_what_lies_behind_a_sure_end_does_not_count():
    entropy = torch.tensor([[0.0, 0.125, 9.0], [0.0, 9.0, 0.125]])
    assert settled(entropy, 0.25, torch.tensor([[True, True, False]] * 2)) == [True, False]


def test_a_canvas_that_is_settled_at_the_entropy_bound_is_accepted_whole():
    entropy = torch.rand(500, 21, generator=torch.Generator().manual_seed(0)) ** 9
    done = torch.tensor(settled(entropy, 1.0))
    assert 0 < int(done.sum()) < 500
    assert bool(EntropyBoundSampler(1.0).accept(with_entropy(entropy))[done].all())


@pytest.fixture(scope="module")
def model():
    return small_model()


def run(model, **settings):
    ids, mask = prompts(4, 9, padded=2)
    fields = {"max_new_tokens": CANVAS, "max_denoising_steps": 8, "seed": [1, 2, 3, 4], "return_dict_in_generate": True}
    found = model.generate(ids, attention_mask=mask, **{**fields, **settings})
    return found.sequences, found.denoising_steps.tolist()


@pytest.mark.parametrize("kind", [{}, {"cache_implementation": "static"}, {"backend": "reference", "seed": None}])
def test_a_row_stops_below_the_joint_threshold_or_as_released(model, kind):
    assert run(model, joint_threshold=1e9, **kind)[1] == [1, 1, 1, 1]
    torch.manual_seed(0)
    by_name = run(model, joint_threshold=9.0, confidence_threshold=0.5, ignore_after_eos=False, **kind)
    torch.manual_seed(0)
    as_rule = run(model, stopping=AnyOf((StableAndConfident(1, 0.5), Settled(9.0))), ignore_after_eos=False, **kind)
    assert torch.equal(by_name[0], as_rule[0]) and by_name[1] == as_rule[1]


def test_unset_it_changes_nothing(model):
    """No entropy of a canvas of tens of nats comes to less than a millionth of one."""
    plain, never = run(model), run(model, joint_threshold=1e-6)
    assert torch.equal(plain[0], never[0]) and plain[1] == never[1]
    assert DiffusionGenerationConfig().joint_threshold is None


def test_it_does_not_go_with_what_replaces_it(model):
    with pytest.raises(ValueError, match=r"`stopping` is Never\(\), and \['joint_threshold'\] are given, too"):
        run(model, stopping=Never(), joint_threshold=0.1)
    with pytest.raises(ValueError, match="`joint_threshold` is 0.1; expected it unset, since `stability_threshold` is None: never stop"):
        run(model, stability_threshold=None, joint_threshold=0.1)
    in_config = DiffusionGenerationConfig(joint_threshold=1e9)
    assert run(model, generation_config=in_config, confidence_threshold=None)[1] == [8] * 4


# Entropies are numbers

NARROW = {
    "top_k 1": {"top_k": 1},
    "top_k 2": {"top_k": 2},
    "top_k beyond the walk": {"top_k": 2000},
    "top_p 0": {"top_p": 0.0},
    "top_p tiny": {"top_p": 1e-9},
    "top_p": {"top_p": 0.9},
    "min_p 1": {"min_p": 1.0},
    "typical_p tiny": {"typical_p": 1e-6},
    "typical_p": {"typical_p": 0.5},
    "epsilon_cutoff": {"epsilon_cutoff": 0.999},
    "eta_cutoff": {"eta_cutoff": 0.999},
    "all of them": {"top_k": 3, "top_p": 0.5, "min_p": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5},
    "nearly all suppressed": {"suppress_tokens": list(range(2, VOCAB - 2)), "top_k": 5, "typical_p": 0.5},
    "all but one suppressed": {"suppress_tokens": [token for token in range(VOCAB) if token != 7], "top_k": 1, "eta_cutoff": 0.9},
    "no end at first": {"min_new_tokens": 4, "top_k": 1},
    "cold": {"temperature": 1e-9, "top_p": 0.5},
    "hot": {"temperature": 1e9, "eta_cutoff": 0.5},
}
WAYS = {
    "in pieces": {}, "whole logits": {"output_logits": True}, "reference": {"backend": "reference"},
    "verified": {"decoding": "verified", "do_sample": False}, "autoregressive": {"decoding": "autoregressive"},
}  # fmt: skip


class Look(Watcher):
    def __init__(self):
        self.seen = []

    def step(self, canvas_index, step, places, state, prediction):
        self.seen.append(prediction)


def check(prediction):
    """Float32 sums of a distribution's terms: an entropy of nothing left but one token may round to just below 0."""
    for name in ("entropy", "log_probs", "soft_embeds"):
        value = getattr(prediction, name)
        assert value is None or bool(value.isfinite().all()), name
    assert float(prediction.entropy.min()) > -1e-5
    for name in ("current_log_probs", "candidate_log_probs", "named_logits"):  # -inf where a token is filtered out
        value = getattr(prediction, name)
        assert value is None or not bool(value.isnan().any()), name


def check_all(found):
    for each in found:
        if isinstance(each, Prediction):
            check(each)
        else:
            assert all(bool(score.isfinite().all()) for score in each)


def watched(model, narrow, sampler="entropy_bound", **further):
    """All that a call predicted, or the scores of what it wrote."""
    look, alone = Look(), further.get("decoding") == "verified"
    fields = {
        "max_new_tokens": CANVAS,
        "generation_config": {"max_denoising_steps": 3, "sampler": sampler},
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    if further.get("decoding") != "autoregressive":
        fields["watcher"] = look
    fields = {**fields, "eos_token_id": [1], "pad_token_id": PAD, **further, **narrow}
    found = model.generate(prompts(1 if alone else 2, 7)[0], **fields)
    return [*look.seen, *([] if found.scores is None else [found.scores])]


@functools.cache
def of_dtype(dtype):
    return small_model(vocab_size=VOCAB).to(getattr(torch, dtype))


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize(("dtype", "way"), [*itertools.product(("float32", "float16"), WAYS), ("bfloat16", "in pieces")])
def test_every_entropy_is_a_number(dtype, way, narrow):
    """bfloat16 holds what float32 holds, and float16 does not: one way is enough there."""
    torch.manual_seed(0)
    check_all(watched(of_dtype(dtype), NARROW[narrow], **WAYS[way]))


def test_a_cold_float16_model_conditions_itself_on_the_most_probable_token():
    """Logits divided by a temperature of 4e-4 pass what float16 holds: the soft embedding was NaN, and the next step's logits with it."""
    logits = torch.tensor([[[70_000.0, 80_000.0, -90_000.0], [-70_000.0, -80_000.0, -90_000.0], [1.0, 2.0, -3.0]]])
    found = narrowed(logits, torch.float16)
    assert found.softmax(-1)[0, :2].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert torch.equal(found[0, 2], logits[0, 2].half()) and torch.equal(narrowed(logits, torch.bfloat16), logits.bfloat16())


def test_given_logits_that_float16_does_not_hold_condition_a_model_of_it():
    logits = torch.zeros(CANVAS, VOCAB).index_fill(1, torch.tensor([7]), 1e6)
    check_all(watched(small_model(vocab_size=VOCAB).half(), {}, self_conditioning_logits=logits))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_with_every_sampler_and_under_a_constraint_too(sampler, dtype, tokenizer):
    written = small_model(vocab_size=len(tokenizer) + 3).to(getattr(torch, dtype))
    language = {"constraint": Regex("[0-9a-z ]{1,9}"), "tokenizer": tokenizer}
    narrow = [fields for fields in NARROW.values() if "suppress_tokens" not in fields]
    for fields, bound, way in itertools.product(narrow[::3], ({}, language), ("in pieces", "whole logits")):
        check_all(watched(written, fields, sampler, seed=0, **bound, **WAYS[way]))


EXTREMES = {
    "seed": st.integers(0, 2**31), "spread": st.sampled_from([1e-3, 1.0, 30.0, 1e3]), "temperature": st.sampled_from([1e-9, 0.4, 1.0, 1e9]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "top_k": st.sampled_from([1, 2, 50, None]),
    "top_p": st.sampled_from([0.0, 1e-9, 0.9, None]), "min_p": st.sampled_from([1e-9, 0.5, 1.0, None]), "left": st.integers(1, 61),
    "greedy": st.booleans(),
}  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True, database=None)  # the same examples in every run, whatever failed before
@given(**EXTREMES)
def test_no_logits_and_no_filters_make_an_entropy_that_is_none(seed, spread, temperature, dtype, top_k, top_p, min_p, left, greedy):
    """Logits from all but equal to all but one at their cap, temperatures of either end, and from one id left to all of 61."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((2, 3, 8), generator=generator).to(dtype)
    weight = (torch.randn((61, 8), generator=generator) * spread).to(dtype)
    suppressed = torch.randperm(61, generator=generator)[left:].tolist()
    fields = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "suppress_tokens": suppressed or None}
    shaping = build_shaping(DiffusionGenerationConfig(**fields), None, torch.tensor([], dtype=torch.int64), 4, 61)
    current = torch.randint(0, 61, (2, 3), generator=generator)
    head = VocabularyHead(weight, 30.0, torch.tensor(3.0, dtype=dtype))
    walked = streamed_prediction(hidden, head, temperature, BatchDraws(generator), greedy, current, shaping.filters, piece=16)
    logits = torch.tanh(torch.nn.functional.linear(hidden, weight).float() / 30.0) * 30.0
    dense = dense_prediction(shaping.filters.apply(logits / temperature), BatchDraws(generator), greedy, current)
    for prediction in (walked, dense):
        assert not bool(prediction.bad.any())
        check(prediction)
        assert float(prediction.entropy.max()) <= torch.tensor(float(left)).log() + 1e-4


# The benchmark


def test_the_benchmark_compares_case_by_case_and_keeps_what_it_found(tmp_path):
    kept = tmp_path / "kept.jsonl"
    arguments = ["sudoku", "units", "--cases", "3", "--batch", "2", "--only", "joint_threshold 0.1", "--only", "self_conditioning_steps 12"]
    printed = [run_benchmark(*arguments, "--keep", str(kept)) for _ in range(2)]
    lines = [[line for line in text.splitlines() if line.startswith("| ") and "%" in line] for text in printed]
    assert lines[0] == lines[1] and len(lines[0]) == 6 and len(kept.read_text().splitlines()) == 6, "the second run computes nothing anew"
    assert [line.split(" | ")[0] for line in lines[0][:3]] == ["| released", "| joint_threshold 0.1", "| self_conditioning_steps 12"]
    for line in (lines[0][0], lines[0][3]):
        assert line.endswith("| 1.00 | +0 -0 | 1 |")


def run_benchmark(*arguments):
    done = programs.run("benchmarks/fewer_passes.py", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "fewer_passes.py"))


def test_intervals_and_chances_are_those_of_the_textbook(benchmark):
    """Wilson's interval of 97 of 100 (0.9155 to 0.9897), and a sign test of 1 against 7: 2 * (1 + 8) / 256."""
    assert benchmark["wilson"](97, 100) == pytest.approx((0.9155, 0.9897), abs=1e-4)
    assert benchmark["wilson"](0, 50)[0] == pytest.approx(0) and benchmark["wilson"](50, 50)[1] == pytest.approx(1)
    assert benchmark["mcnemar"](1, 7) == pytest.approx(18 / 256) and benchmark["mcnemar"](0, 0) == benchmark["mcnemar"](3, 3) == 1


@pytest.mark.parametrize(("arguments", "named"), [(["sudoku", "--cases", "0"], "--cases"), (["days", "--only", "faster"], "--only")])
def test_what_the_benchmark_cannot_do_is_named(benchmark, arguments, named, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark["parse"](arguments)
    assert f"`{named}`" in capsys.readouterr().err
