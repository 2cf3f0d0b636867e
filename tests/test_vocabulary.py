"""One pass over the vocabulary in pieces, against the dense reference: odd sizes, one piece and many, both dtypes."""

import pytest
import torch
from small_models import prompts, small_model

from generation.loop import predict
from generation.rules.draws import BatchDraws, RowDraws
from generation.rules.prediction import Wanted, check_finite, dense_prediction
from generation.vocabulary.filters import Filters
from generation.vocabulary.walk import VocabularyHead, streamed_prediction

CAP = 30.0


def case(vocab_size=1000, size=24, rows=(2, 9), seed=0, spread=4.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((vocab_size, size), generator=generator) * spread / size**0.5
    hidden = torch.randn((*rows, size), generator=generator)
    return hidden.to(dtype), VocabularyHead(weight.to(dtype), CAP, torch.tensor(size**0.5, dtype=dtype))


def dense(hidden, head, temperature, draws, greedy=False, current=None):
    logits = torch.tanh(torch.nn.functional.linear(hidden, head.weight).float() / CAP) * CAP / temperature
    soft = (logits.softmax(-1).to(head.weight.dtype) @ head.weight) * head.embed_scale
    return dense_prediction(logits, draws, greedy, current)._replace(soft_embeds=soft)


@pytest.mark.parametrize("piece", [1, 63, 100, 999, 1000, 4096])
@pytest.mark.parametrize("temperature", [0.4, 1.7])
def test_statistics_equal_the_dense_ones(piece, temperature):
    """1e-4 nats: the sums run in another order."""
    hidden, head = case()
    expected = dense(hidden, head, temperature, BatchDraws())
    soft = expected.soft_embeds
    got = streamed_prediction(hidden, head, temperature, BatchDraws(), piece=piece)
    got_soft = got.soft_embeds
    assert torch.equal(got.argmax, expected.argmax)
    torch.testing.assert_close(got.entropy, expected.entropy, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.log_probs, expected.log_probs, atol=1e-4, rtol=0)
    torch.testing.assert_close(got_soft, soft, atol=1e-4, rtol=1e-4)


def test_statistics_in_bf16_are_close_to_the_dense_ones():
    """The logits are rounded alike in both; 2e-2 is what bf16's 8 bits leave of a soft embedding of this size."""
    hidden, head = case(dtype=torch.bfloat16)
    expected = dense(hidden, head, 0.8, BatchDraws())
    soft = expected.soft_embeds
    got = streamed_prediction(hidden, head, 0.8, BatchDraws(), piece=128)
    got_soft = got.soft_embeds
    assert got_soft.dtype == torch.bfloat16 and torch.equal(got.argmax, expected.argmax)
    torch.testing.assert_close(got.entropy, expected.entropy, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(got_soft.float(), soft.float(), atol=2e-2 * float(soft.float().abs().max()), rtol=0)


@pytest.mark.parametrize("piece", [2, 3, 7])
def test_sample_follows_the_distribution(piece):
    """Chi-square over 7 ids and 40,000 draws; 22.5 is the 0.999 quantile of 6 degrees of freedom."""
    hidden, head = case(vocab_size=7, rows=(1, 1), spread=1.5)
    many = hidden.expand(1, 40_000, -1)
    got = streamed_prediction(many, head, 1.0, BatchDraws(torch.Generator().manual_seed(1)), piece=piece)
    logits = torch.tanh(torch.nn.functional.linear(hidden, head.weight) / CAP) * CAP
    expected = logits.softmax(-1).flatten() * 40_000
    observed = torch.bincount(got.sample.flatten(), minlength=7)
    assert float(((observed - expected) ** 2 / expected).sum()) < 22.5


def test_tokens_of_no_mass_are_never_drawn():
    """Ids whose probability underflows to 0 at the ends of a piece must not be hit by a uniform number of 0 or nearly 1."""
    hidden, head = case(vocab_size=64, rows=(1, 2000), spread=60.0)
    got = streamed_prediction(hidden, head, 0.05, BatchDraws(torch.Generator().manual_seed(0)), piece=16)
    logits = torch.tanh(torch.nn.functional.linear(hidden, head.weight) / CAP) * CAP / 0.05
    assert bool((logits.softmax(-1).gather(-1, got.sample[..., None]) > 0).all())


def test_greedy_draws_nothing_and_takes_the_argmax():
    hidden, head = case()
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    got = streamed_prediction(hidden, head, 1.0, RowDraws((generator, generator)), greedy=True, piece=100)
    assert torch.equal(got.sample, got.argmax) and torch.equal(before, generator.get_state())


def test_nan_is_reported_with_its_row():
    hidden, head = case()
    hidden[1, 3, 0] = float("nan")
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        check_finite(streamed_prediction(hidden, head, 1.0, BatchDraws(), piece=100).bad)


@pytest.mark.parametrize("piece", [1, 63, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("greedy", [False, True])
def test_log_probs_of_the_current_tokens_equal_the_dense_ones(piece, dtype, greedy):
    """Current tokens in every piece; log-probabilities to 1e-4 nats, whose logits are rounded alike in both ways."""
    hidden, head = case(dtype=dtype)
    current = torch.arange(18).view(2, 9) * 58  # 0 to 986
    expected = dense(hidden, head, 0.7, BatchDraws(), greedy, current)
    got = streamed_prediction(hidden, head, 0.7, BatchDraws(), greedy, current, piece=piece)
    torch.testing.assert_close(got.current_log_probs, expected.current_log_probs, atol=1e-4, rtol=0)
    assert not bool((got.other == current).any())
    if greedy:
        assert torch.equal(got.other, expected.other)


def test_greedy_other_is_the_runner_up_of_the_argmax():
    hidden, head = case()
    argmax = streamed_prediction(hidden, head, 1.0, BatchDraws(), greedy=True).argmax
    logits = torch.nn.functional.linear(hidden, head.weight)
    got = streamed_prediction(hidden, head, 1.0, BatchDraws(), greedy=True, current=argmax, piece=100)
    assert torch.equal(got.other, logits.topk(2, dim=-1).indices[..., 1])


@pytest.mark.parametrize("way", ["dense", 2, 3, 7])
@pytest.mark.parametrize("token", [0, 4, 6])
def test_other_follows_the_distribution_without_the_current_token(way, token):
    """Chi-square over the 6 ids left and 40,000 draws; 20.5 is the 0.999 quantile of 5 degrees of freedom."""
    hidden, head = case(vocab_size=7, rows=(1, 1), spread=1.5)
    many, current = hidden.expand(1, 40_000, -1), torch.full((1, 40_000), token)
    draws = BatchDraws(torch.Generator().manual_seed(1))
    if way == "dense":
        got = dense(many, head, 1.0, draws, current=current)
    else:
        got = streamed_prediction(many, head, 1.0, draws, current=current, piece=way)
    logits = torch.tanh(torch.nn.functional.linear(hidden, head.weight) / CAP) * CAP
    left = torch.arange(7) != token
    expected = (logits.flatten()[left]).softmax(-1) * 40_000
    observed = torch.bincount(got.other.flatten(), minlength=7)
    assert int(observed[token]) == 0
    assert float(((observed[left] - expected) ** 2 / expected).sum()) < 20.5


@pytest.mark.parametrize("greedy", [False, True])
def test_other_is_the_current_token_where_nothing_else_has_mass(greedy):
    """A vocabulary of one id leaves no other."""
    hidden, head = case(vocab_size=1)
    current = torch.zeros(2, 9, dtype=torch.int64)
    for way in (dense, streamed_prediction):
        got = way(hidden, head, 1.0, BatchDraws(torch.Generator().manual_seed(0)), greedy, current)
        assert torch.equal(got.other, current) and float(got.current_log_probs.abs().max()) == 0


@pytest.mark.parametrize("piece", [2, 63, 100, 999, 4096])
@pytest.mark.parametrize("informed", [False, True])
def test_whole_logits_give_the_tokens_that_the_walk_draws(piece, informed):
    """They drew others of the same distribution, so that a hook on the head that only looks changed the text. 0.99: sums run in another
    order, and a number may fall on the edge between two ids."""
    hidden, head = case(rows=(2, 500))
    current = torch.arange(1000).view(2, 500) if informed else None
    draws, size = RowDraws((3, 4)), (2, 500, -(-1000 // piece), 4 if informed else 2)
    expected = streamed_prediction(hidden, head, 1.3, draws, current=current, piece=piece)
    got = dense(hidden, head, 1.3, draws.of_walk(size, piece, hidden.device), current=current)
    for name in ("sample", "other") if informed else ("sample",):
        assert float((getattr(got, name) == getattr(expected, name)).float().mean()) > 0.99, name


@pytest.mark.parametrize("piece", [5, 63, 1000])
@pytest.mark.parametrize("filters", [None, Filters(top_k=3), Filters(allowed=torch.arange(1000) % 2 == 0)])
def test_candidates_and_named_logits_equal_the_dense_ones(piece, filters):
    """1e-4 nats: the sums run in another order."""
    hidden, head = case()
    wanted = Wanted(candidates=7, named=torch.tensor([3, 64, 999]))
    logits = torch.tanh(torch.nn.functional.linear(hidden, head.weight).float() / CAP) * CAP / 0.8
    expected = dense_prediction(logits if filters is None else filters.apply(logits), BatchDraws(), wanted=wanted)
    got = streamed_prediction(hidden, head, 0.8, BatchDraws(), filters=filters, piece=piece, wanted=wanted)
    torch.testing.assert_close(got.candidate_log_probs, expected.candidate_log_probs, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.named_logits, expected.named_logits, atol=1e-4, rtol=0)
    real = expected.candidate_log_probs.isfinite()
    assert torch.equal(got.candidates[real], expected.candidates[real]) and int(real.sum()) == 18 * (3 if filters and filters.top_k else 7)


@pytest.fixture(scope="module")
def wide():
    model = small_model(vocab_size=5001)
    model.generation_config.update(eos_token_id=[], pad_token_id=0)
    return model


def test_greedy_generation_is_the_same_by_either_way(wide, monkeypatch):
    """On a vocabulary of two pieces; few steps, since random weights make small differences grow."""
    ids = prompts(2, 9)[0]
    settings = {"do_sample": False, "max_new_tokens": 10, "max_denoising_steps": 2, "return_dict_in_generate": True, "output_scores": True}
    calls = []
    monkeypatch.setattr(predict, "streamed_prediction", lambda *a, **k: calls.append(1) or streamed_prediction(*a, **k))
    streamed = wide.generate(ids, **settings)
    assert len(calls) == 2
    monkeypatch.setattr(type(wide), "why_dense", lambda self, device: "it is told so")
    dense_way = wide.generate(ids, **settings)
    assert len(calls) == 2 and torch.equal(streamed.sequences, dense_way.sequences)
    torch.testing.assert_close(streamed.scores.entropy, dense_way.scores.entropy, atol=1e-3, rtol=1e-3)


def look_on(model):
    return model.lm_head.register_forward_hook(lambda module, inputs, output: None)


LOOKS = {"hook": {}, "output_logits": {"output_logits": True, "return_dict_in_generate": True}, "callback": {}}


@pytest.mark.parametrize("sampler", ["entropy_bound", "predictor_corrector"])
@pytest.mark.parametrize("look", LOOKS)
def test_who_only_looks_at_logits_gets_the_same_tokens(wide, look, sampler):
    """Whole logits drew other numbers than the walk. On a vocabulary of two pieces; all samples are taken over into the second step."""
    ids, settings = prompts(2, 9)[0], {"max_new_tokens": 10, "max_denoising_steps": 2, "seed": 3, "sampler": sampler}
    settings |= {"entropy_bound": 1e6} if sampler == "entropy_bound" else {}
    streamed, hook = wide.generate(ids, **settings), look_on(wide) if look == "hook" else None
    if look == "callback":
        settings |= {"callback_on_step_end": lambda *call: None, "callback_on_step_end_tensor_inputs": ["logits"]}
    looked = wide.generate(ids, **settings, **LOOKS[look])
    if hook is not None:
        hook.remove()
    assert torch.equal(getattr(looked, "sequences", looked), streamed)


def test_logits_that_only_a_whole_distribution_shapes_take_the_dense_way(wide, monkeypatch):
    monkeypatch.setattr(predict, "streamed_prediction", lambda *a, **k: pytest.fail("typical_p needs the whole distribution"))
    wide.generate(prompts(1, 5)[0], max_new_tokens=10, max_denoising_steps=1, typical_p=0.9)
    wide.generate(prompts(1, 5)[0], max_new_tokens=10, max_denoising_steps=1, backend="reference")
