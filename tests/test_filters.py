"""Filters of a pass over pieces of the vocabulary, against transformers' processors on whole logits."""

import math
from dataclasses import replace

import pytest
import torch
from small_models import prompts, small_model
from test_vocabulary import CAP, case
from torch.utils._python_dispatch import TorchDispatchMode

from generation import DiffusionGenerationConfig
from generation.call.processors import build_shaping
from generation.loop import predict
from generation.loop.rows import Rows
from generation.rules.draws import BatchDraws, RowDraws
from generation.rules.prediction import check_finite, dense_prediction
from generation.vocabulary.filters import Filters
from generation.vocabulary.walk import VocabularyHead, streamed_prediction

SETTINGS = {
    "top_k 1": {"top_k": 1},
    "top_k 7": {"top_k": 7},
    "top_k 300": {"top_k": 300},
    "top_k above the vocabulary": {"top_k": 1005},
    "top_p 0": {"top_p": 0.0},
    "top_p 0.2": {"top_p": 0.2},
    "top_p 0.9": {"top_p": 0.9},
    "top_p 0.9999": {"top_p": 0.9999},
    "min_p 0.03": {"min_p": 0.03},
    "min_p 1": {"min_p": 1.0},
    "suppress_tokens": {"suppress_tokens": [*range(0, 150), 777, 999]},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": [3, 400, 998]},
    "all but one suppressed": {"suppress_tokens": [i for i in range(1000) if i != 640]},
    "fewer ids left than top_k": {"suppress_tokens": list(range(3, 1000)), "top_k": 7, "top_p": 0.99},
    "top_k and top_p": {"top_k": 20, "top_p": 0.8},
    "top_p and min_p": {"top_p": 0.95, "min_p": 0.1},
    "all of them": {"top_k": 50, "top_p": 0.9, "min_p": 0.05, "suppress_tokens": [640, 2], "min_new_tokens": 4, "eos_token_id": [7, 500]},
}


def shaping_of(settings, vocab_size=1000):
    config = DiffusionGenerationConfig(**settings)
    eos = torch.tensor(settings.get("eos_token_id", []), dtype=torch.int64)
    return build_shaping(config, None, eos, prompt_length=4, vocab_size=vocab_size)


def shaped_logits(hidden, head, shaping, temperature):
    logits = torch.tanh(torch.nn.functional.linear(hidden, head.weight).float() / CAP) * CAP
    committed = torch.zeros((hidden.shape[0], 4), dtype=torch.int64)
    return shaping(logits, shaping.filters, committed, None, temperature, 1)


def compare(got, expected, tolerance=1e-4):
    """1e-4 nats: the sums run in another order."""
    for name in ("entropy", "log_probs", "current_log_probs"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(got.bad, expected.bad)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("piece", [63, 1000])
def test_filtered_statistics_equal_the_dense_ones(settings, piece):
    hidden, head = case(rows=(2, 7))
    shaping, current = shaping_of(settings), torch.arange(14).view(2, 7) * 71
    for temperature in (0.4, 1.7):
        logits = shaped_logits(hidden, head, shaping, temperature)
        current[0, :3] = logits[0, :3].argmax(dim=-1)  # tokens that are kept, beside those that mostly are not
        expected = dense_prediction(logits, BatchDraws(torch.Generator().manual_seed(0)), current=current)
        draws = BatchDraws(torch.Generator().manual_seed(0))
        got = streamed_prediction(hidden, head, temperature, draws, False, current, shaping.filters, piece)
        soft = got.soft_embeds
        compare(got, expected)
        assert torch.equal(got.argmax, expected.argmax)
        kept = logits > -float("inf")
        assert bool(kept.gather(-1, got.sample[..., None]).all())
        assert bool((kept.gather(-1, got.other[..., None]).squeeze(-1) | (got.other == current)).all())
        torch.testing.assert_close(soft, (logits.softmax(-1) @ head.weight) * head.embed_scale, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_filtered_statistics_in_bf16_are_close_to_the_dense_ones(settings):
    """bf16 logits are full of ties: as many of equal logits are kept, though not always the same, so their sums are compared."""
    hidden, head = case(rows=(2, 7), dtype=torch.bfloat16)
    shaping, current = shaping_of(settings), torch.zeros((2, 7), dtype=torch.int64)
    logits = shaped_logits(hidden, head, shaping, 0.7)
    expected = dense_prediction(logits, BatchDraws(), current=current)
    got = streamed_prediction(hidden, head, 0.7, BatchDraws(), False, current, shaping.filters, 128)
    soft = got.soft_embeds
    got, expected = (item._replace(current_log_probs=torch.zeros(1)) for item in (got, expected))
    compare(got, expected, tolerance=2e-3)
    assert soft.dtype == torch.bfloat16 and bool(soft.isfinite().all())


@pytest.mark.parametrize("piece", [1, 3, 8, 64])
@pytest.mark.parametrize("top_p", [0.0, 0.125, 0.5, 0.51, 0.99])
def test_ties_at_the_edge_of_top_p_are_kept_in_the_order_of_ids(piece, top_p):
    """Eight equal logits, each an eighth of the mass, between ids that are masked: `ceil(8 * top_p)` are kept, the first ones."""
    weight = torch.zeros(16, 4)
    weight[1::2, 0] = 2.0
    head = VocabularyHead(weight, CAP, torch.tensor(2.0))
    hidden = torch.ones(1, 1, 4)
    filters = Filters(allowed=weight[:, 0] > 0, top_p=top_p)
    tokens = torch.arange(16)[None]
    got = streamed_prediction(hidden.expand(1, 16, 4), head, 1.0, BatchDraws(), False, tokens, filters, piece)
    kept = max(math.ceil(8 * top_p), 1)
    assert (got.current_log_probs[0] > -float("inf")).nonzero().flatten().tolist() == list(range(1, 16, 2))[:kept]
    torch.testing.assert_close(got.entropy, torch.full((1, 16), math.log(kept)), atol=1e-6, rtol=0)
    shaping = shaping_of({"top_p": top_p, "suppress_tokens": list(range(0, 16, 2))}, vocab_size=16)
    dense = dense_prediction(shaped_logits(hidden, head, shaping, 1.0), BatchDraws())
    torch.testing.assert_close(dense.entropy, got.entropy[:, :1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("piece", [1, 5, 64])
def test_ties_at_the_edge_of_top_k_are_all_kept(piece):
    """As transformers keeps them: 1 logit above, 5 equal ones at place 2 to 6."""
    weight = torch.zeros(20, 2)
    weight[4, 0], weight[[0, 3, 9, 18, 19], 0] = 3.0, 2.0
    head, hidden = VocabularyHead(weight, CAP, torch.tensor(2.0)), torch.ones(1, 20, 2)
    got = streamed_prediction(hidden, head, 1.0, BatchDraws(), False, torch.arange(20)[None], Filters(top_k=3), piece)
    assert (got.current_log_probs[0] > -float("inf")).nonzero().flatten().tolist() == [0, 3, 4, 9, 18, 19]


def test_top_p_keeps_the_smallest_set_of_a_large_vocabulary():
    """70,000 ids in near-equal parts: the edge lies among the 63,000th, beyond any list of candidates."""
    hidden, head = case(vocab_size=70_000, rows=(1, 2), spread=0.5)
    logits = torch.tanh(torch.nn.functional.linear(hidden, head.weight) / CAP) * CAP
    ascending = logits.double().softmax(-1).sort(dim=-1).values
    kept = ascending.masked_fill(ascending.cumsum(-1) <= 1 - 0.9, 0)
    expected = -(kept / kept.sum(-1, keepdim=True)).xlogy(kept / kept.sum(-1, keepdim=True)).sum(-1)
    got = streamed_prediction(hidden, head, 1.0, BatchDraws(), filters=Filters(top_p=0.9))
    assert int((kept > 0).sum(-1).min()) > 40_000
    torch.testing.assert_close(got.entropy.double(), expected, atol=2e-5, rtol=0)


def test_filtered_sample_follows_the_distribution():
    """Chi-square over the 4 ids left of 9 and 8,000 draws; 16.3 is the 0.999 quantile of 3 degrees of freedom."""
    hidden, head = case(vocab_size=9, rows=(1, 1), spread=1.5)
    shaping = shaping_of({"top_k": 5, "top_p": 0.9, "suppress_tokens": [2]}, vocab_size=9)
    expected = shaped_logits(hidden, head, shaping, 1.0).softmax(-1).flatten() * 8_000
    many, draws = hidden.expand(1, 1000, -1), BatchDraws(torch.Generator().manual_seed(1))
    samples = [streamed_prediction(many, head, 1.0, draws, filters=shaping.filters, piece=4).sample for _ in range(8)]
    observed, left = torch.bincount(torch.cat(samples).flatten(), minlength=9), expected > 0
    assert int(left.sum()) == 4 and int(observed[~left].sum()) == 0
    assert float(((observed - expected)[left] ** 2 / expected[left]).sum()) < 16.3


@pytest.mark.parametrize("piece", [10, 1000])
def test_allowed_ids_of_a_row_and_of_a_position(piece):
    hidden, head = case(rows=(2, 3))
    by_row = torch.zeros(2, 1000, dtype=torch.bool)
    by_row[0, 100:200], by_row[1, 640] = True, True
    by_place = torch.tensor([[[5, -1, -1], [999, 0, 500], [-1, -1, -1]]]).repeat(2, 1, 1)
    logits = torch.tanh(torch.nn.functional.linear(hidden, head.weight) / CAP) * CAP
    expected = dense_prediction(logits.masked_fill(~by_row[:, None], -float("inf")), BatchDraws(), greedy=True)
    got = streamed_prediction(hidden, head, 1.0, BatchDraws(), True, filters=Filters(allowed=by_row), piece=piece)
    assert torch.equal(got.argmax, expected.argmax) and bool((got.argmax[1] == 640).all()) and float(got.entropy[1].abs().max()) == 0
    torch.testing.assert_close(got.entropy, expected.entropy, atol=1e-5, rtol=0)
    listed = torch.ones_like(logits, dtype=torch.bool)
    listed[:, 0], listed[:, 1] = False, False
    listed[:, 0, 5] = listed[:, 1, 999] = listed[:, 1, 0] = listed[:, 1, 500] = True
    expected = dense_prediction(logits.masked_fill(~listed, -float("inf")), BatchDraws(), greedy=True)
    got = streamed_prediction(hidden, head, 1.0, BatchDraws(), True, filters=Filters(allowed_ids=by_place), piece=piece)
    assert torch.equal(got.argmax, expected.argmax)
    torch.testing.assert_close(got.entropy, expected.entropy, atol=1e-5, rtol=0)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9, "min_p": 0.1}])
@pytest.mark.parametrize("piece", [100, 4096])
def test_no_id_left_and_nan_are_reported_with_their_rows(filters, piece):
    hidden, head = case(rows=(3, 2))
    hidden[0, 1, 3] = float("nan")
    allowed = torch.ones(3, 1000, dtype=torch.bool)
    allowed[2] = False
    got = streamed_prediction(hidden, head, 1.0, BatchDraws(), filters=Filters(allowed=allowed, **filters), piece=piece)
    assert got.bad.tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"rows \[0, 2\]"):
        check_finite(got.bad)


def test_a_row_is_the_same_alone_and_among_others():
    """More positions than are computed at a time, with filters that differ by row, and random numbers of each row's own."""
    hidden, head = case(rows=(5, 100))
    current = torch.arange(500).view(5, 100)
    allowed = torch.rand((5, 1000), generator=torch.Generator().manual_seed(0)) < 0.5
    filters = Filters(allowed=allowed, allowed_ids=torch.where(current % 2 == 0, current, -1)[..., None], top_p=0.9)
    for given in (None, filters):
        together = streamed_prediction(hidden, head, 0.8, own_draws(range(5)), False, current, given)
        soft = together.soft_embeds
        for row in range(5):
            rows = slice(row, row + 1)
            narrowed = None if given is None else given.select(rows)
            alone = streamed_prediction(hidden[rows], head, 0.8, own_draws([row]), False, current[rows], narrowed)
            alone_soft = alone.soft_embeds
            for name in ("sample", "argmax", "other", "bad"):
                assert torch.equal(getattr(alone, name), getattr(together, name)[rows]), name
            torch.testing.assert_close(alone.entropy, together.entropy[rows], atol=1e-5, rtol=0)
            torch.testing.assert_close(alone_soft, soft[rows], atol=1e-4, rtol=1e-4)


def own_draws(seeds):
    return RowDraws(tuple(seeds))


class Largest(TorchDispatchMode):
    """Records how many elements the largest tensor has that an operation returns as memory of its own."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function(*args, **(kwargs or {}))
        for value in returned if isinstance(returned, (tuple, list)) else (returned,):
            if isinstance(value, torch.Tensor) and not value._is_view():
                self.elements = max(self.elements, value.numel())
        return returned


@pytest.mark.parametrize("filters", [None, Filters(top_k=50, top_p=0.9, min_p=0.01, hidden=torch.tensor([3]), hidden_before=5)])
def test_no_tensor_of_the_vocabularys_size_is_made(filters):
    """18 positions, 40,000 ids: whole logits would have 720,000 numbers; histograms of top_p have 18 * 4,096."""
    hidden, head = case(vocab_size=40_000)
    current = torch.zeros(2, 9, dtype=torch.int64)
    with Largest() as largest:
        streamed_prediction(hidden, head, 1.0, BatchDraws(), False, current, filters, piece=1000)
    assert 18_000 <= largest.elements <= 18 * 4096
    with Largest() as whole:
        torch.nn.functional.linear(hidden, head.weight)
    assert whole.elements >= 720_000, "the recorder sees the dense way"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"top_k": 0}, "`top_k` is 0"), ({"top_p": 1.0}, "`top_p` is 1.0"), ({"min_p": 0.0}, "`min_p` is 0.0"),
        ({"allowed": torch.ones(5)}, "`allowed` has dtype torch.float32"), ({"hidden": torch.ones(5)}, "`hidden` has dtype"),
    ],
)  # fmt: skip
def test_filters_out_of_range_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        Filters(**settings)


def test_only_processors_that_need_whole_logits_take_the_dense_way():
    for settings in SETTINGS.values():
        assert shaping_of(settings).why_dense() is None
    whole = {"typical_p": 0.9, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3, "repetition_penalty": 1.2, "bad_words_ids": [[5]]}
    for name, value in whole.items():
        assert "whole logits" in shaping_of({name: value}).why_dense(), name
    assert shaping_of({"top_k": 1025}).why_dense() is None, "fewer ids than that"
    assert shaping_of({"top_k": 1025}, vocab_size=5000).why_dense() == "`top_k` is more than 1024"


def test_hidden_ends_of_sequence_are_those_of_the_canvas_at_hand():
    shaping = shaping_of({"min_new_tokens": 12, "eos_token_id": [1]})
    rows = Rows(torch.arange(1), None, torch.ones(1, 4).bool(), torch.zeros(1, 4).long(), 0, BatchDraws(), shaping.filters)
    behind = [rows.commit(torch.zeros(1, length).long()) for length in (0, 10, 12, 20)]
    assert [one.filters.hidden_before for one in behind] == [12, 2, 0, 0] and rows.filters.hidden_before == 12
    assert replace(shaping.filters, allowed=torch.ones(3, dtype=torch.bool)).hidden_before == 12


def test_greedy_filtered_generation_is_the_same_by_either_way(monkeypatch):
    """On a vocabulary of two pieces; few steps, since random weights make small differences grow."""
    model = small_model(vocab_size=5001)
    model.generation_config.update(eos_token_id=[4000], pad_token_id=0)
    settings = {
        "do_sample": False, "max_new_tokens": 10, "max_denoising_steps": 2, "top_k": 40, "top_p": 0.9, "min_p": 0.01,
        "suppress_tokens": [5, 4999], "min_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    calls = []
    monkeypatch.setattr(predict, "streamed_prediction", lambda *a, **k: calls.append(1) or streamed_prediction(*a, **k))
    streamed = model.generate(prompts(2, 9)[0], **settings)
    assert len(calls) == 2
    monkeypatch.setattr(type(model), "why_dense", lambda self, device: "it is told so")
    dense = model.generate(prompts(2, 9)[0], **settings)
    assert len(calls) == 2 and torch.equal(streamed.sequences, dense.sequences)
    torch.testing.assert_close(streamed.scores.entropy, dense.scores.entropy, atol=1e-3, rtol=1e-3)


def test_of_logits_all_but_equal_top_p_keeps_one_that_top_k_left():
    """At a high temperature all ids are equally deep. The first of them was kept whether or not it was among the top_k, and with the others
    gone no id was left: an entropy of nothing, and a call that blamed the model."""
    hidden, head = case(rows=(2, 7))
    for temperature in (1.0, 1e3, 1e6, 1e9):
        for filters in (Filters(top_k=1, top_p=0.0), Filters(top_k=3, top_p=1e-9), Filters(top_k=3, top_p=0.5, min_p=1.0)):
            got = streamed_prediction(hidden, head, temperature, BatchDraws(torch.Generator().manual_seed(0)), False, None, filters, 63)
            assert not bool(got.bad.any()) and float(got.entropy.max()) <= math.log(3) + 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_threshold_is_met_by_the_logit_it_is_in_half_precision_too(dtype):
    """The last piece of a vocabulary, narrower than the others, was computed with other last bits when the threshold was looked for: one
    call in ten with top_k=1 kept no id at all, and blamed the model."""
    for seed in range(60):
        hidden, head = case(vocab_size=61, size=8, rows=(2, 9), seed=seed, dtype=dtype)
        for filters in (Filters(top_k=1), Filters(min_p=1.0)):
            got = streamed_prediction(hidden, head, 0.4, BatchDraws(torch.Generator().manual_seed(0)), False, None, filters, 16)
            assert not bool(got.bad.any()) and float(got.entropy.max()) < math.log(3), "of equal logits more than one is kept"
