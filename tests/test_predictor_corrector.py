"""The predictor-corrector sampler against the exact reverse process of small distributions, by enumeration."""

import pytest
import torch
from small_models import prompts, small_model

from generation import PredictorCorrectorSampler
from generation.rules.prediction import Prediction

VOCAB, COUNT = 5, 60_000
CLEAN = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
CHI_SQUARE = 18.5  # exceeded once in 1,000 seeds with 4 degrees of freedom; the seeds are fixed


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(probabilities, seed):
    """One token a row from `(n, V)`, as int64 (n, 1)."""
    return torch.multinomial(probabilities, 1, generator=seeded(seed))


def noised(x, t):
    """q(z | x) at noise proportion t, (n, V)."""
    return (1 - t) * torch.nn.functional.one_hot(x.flatten(), VOCAB).float() + t / VOCAB


def denoiser(z, t, clean=CLEAN):
    """p(x | z) by Bayes' rule, (n, V)."""
    likelihood = (1 - t) * torch.eye(VOCAB) + t / VOCAB  # (x, z)
    joint = clean[:, None] * likelihood
    return (joint / joint.sum(dim=0)).T[z.flatten()]


def statistics_of(probabilities, canvas, seed):
    without = probabilities.scatter(-1, canvas, 0.0)
    current = probabilities.gather(-1, canvas)
    return Prediction(
        sample=draw(probabilities, seed), argmax=probabilities.argmax(-1, keepdim=True), entropy=torch.zeros_like(current),
        log_probs=torch.zeros_like(current), current_log_probs=current.log(), other=draw(without, seed + 1),
    )  # fmt: skip


def assert_follows(tokens, expected):
    observed = torch.bincount(tokens.flatten(), minlength=VOCAB).double()
    expected = expected.double() * len(tokens)
    assert observed[expected == 0].sum() == 0
    some = expected > 0
    assert ((observed - expected)[some] ** 2 / expected[some]).sum() < CHI_SQUARE


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_predictor_turns_noise_into_the_clean_distribution(levels):
    """With an exact denoiser the reverse process of one token ends in its distribution, however few its steps."""
    sampler = PredictorCorrectorSampler(VOCAB, corrector_steps=0, positions=1)
    canvas = draw(torch.full((COUNT, VOCAB), 1 / VOCAB), 0)
    for step in range(levels):
        t = 1 - step / levels
        noise, uniform = draw(torch.full((COUNT, VOCAB), 1 / VOCAB), 10 + step), torch.rand((COUNT, 1), generator=seeded(20 + step))
        proposal = sampler.propose(canvas, statistics_of(denoiser(canvas, t), canvas, 30 + 2 * step), noise, uniform, step, levels)
        canvas, following = proposal.canvas, 1 - (step + 1) / levels
        assert_follows(canvas, CLEAN * (1 - following) + following / VOCAB)
    assert bool(proposal.accepted.all()), "no noise is left at the end"


@pytest.mark.parametrize("levels, level", [(2, 0), (4, 2)])
def test_corrector_draws_what_the_other_tokens_leave(levels, level):
    """From any token whatever the corrected one follows (1 - t) p(x) + t / V: its own observation has been taken out again.

    The denoiser saw the token; without the leave-one-out correction it would mostly be drawn again.
    """
    sampler = PredictorCorrectorSampler(VOCAB, corrector_steps=1, positions=1)
    t = 1 - (level + 1) / levels
    for token in range(VOCAB):
        canvas = torch.full((COUNT, 1), token)
        noise, uniform = draw(torch.full((COUNT, VOCAB), 1 / VOCAB), token), torch.rand((COUNT, 1), generator=seeded(50 + token))
        found = statistics_of(denoiser(canvas, t), canvas, 60 + 2 * token)
        proposal = sampler.propose(canvas, found, noise, uniform, 2 * level + 1, 2 * levels)
        assert_follows(proposal.canvas, CLEAN * (1 - t) + t / VOCAB)


def test_corrector_resamples_the_least_likely_positions_alone():
    sampler = PredictorCorrectorSampler(VOCAB, corrector_steps=1, positions=2)
    canvas = torch.zeros((1, 6), dtype=torch.int64)
    current = torch.tensor([[0.9, 0.01, 0.8, 0.02, 0.99, 0.5]])
    found = Prediction(canvas + 4, canvas, current, current, current_log_probs=current.log(), other=canvas + 1)
    proposal = sampler.propose(canvas, found, canvas + 2, torch.full((1, 6), 0.999), step=1, max_denoising_steps=4)
    assert proposal.canvas.tolist() == [[0, 1, 0, 1, 0, 0]] and bool(proposal.accepted.all())
    renoised = sampler.propose(canvas, found, canvas + 2, torch.full((1, 6), 0.4), step=1, max_denoising_steps=4)
    assert renoised.canvas.tolist() == [[0, 2, 0, 2, 0, 0]] and renoised.accepted.tolist() == [[True, False, True, False, True, True]]


def test_nothing_is_corrected_behind_the_last_predictor():
    sampler = PredictorCorrectorSampler(VOCAB, corrector_steps=2, positions=6)
    canvas = torch.arange(6)[None] % VOCAB
    current = torch.full((1, 6), 0.3)
    found = Prediction(canvas + 1, canvas, current, current, current_log_probs=current.log(), other=canvas + 1)
    for step in (4, 5):
        proposal = sampler.propose(canvas, found, canvas + 2, torch.full((1, 6), 0.5), step=step, max_denoising_steps=6)
        assert torch.equal(proposal.canvas, canvas) and bool(proposal.accepted.all())


def test_step_as_a_tensor_proposes_the_same():
    """A captured step has its number on the device."""
    sampler = PredictorCorrectorSampler(VOCAB, corrector_steps=1, positions=2)
    canvas = draw(torch.full((40, VOCAB), 1 / VOCAB), 0)
    for step in range(6):
        found = statistics_of(denoiser(canvas, 0.5), canvas, step)
        arguments = (canvas, found, (canvas + 1) % VOCAB, torch.rand((40, 1), generator=seeded(step)))
        plain, tensor = sampler.propose(*arguments, step, 6), sampler.propose(*arguments, torch.tensor(step), 6)
        assert torch.equal(plain.canvas, tensor.canvas) and torch.equal(plain.accepted, tensor.accepted)


@pytest.mark.parametrize("settings", [{"do_sample": False}, {}, {"corrector_steps": 0}, {"corrector_positions": 1000}])
@pytest.mark.parametrize("vocab_size", [100, 5001])
def test_generate_takes_it_by_name(vocab_size, settings):
    """Densely and in pieces over the vocabulary. (Rows in batches: tests/test_rows.py, on a trained model.)"""
    model = small_model(vocab_size=vocab_size)
    model.generation_config.update(eos_token_id=[], pad_token_id=0)
    settings = {"sampler": "predictor_corrector", "max_denoising_steps": 6, "max_new_tokens": 20, "confidence_threshold": 1e-9, **settings}
    ids = prompts(2, 7)[0]
    first = model.generate(ids, seed=[1, 2], **settings)
    assert first.shape == (2, 27) and torch.equal(first, model.generate(ids, seed=[1, 2], **settings))
    assert not torch.equal(first, model.generate(ids, seed=[3, 4], **settings))


WRONG = [({"corrector_steps": -1}, "corrector_steps"), ({"corrector_positions": 0}, "corrector_positions"), ({"noise": "mask"}, "noise")]


@pytest.mark.parametrize("settings, name", WRONG)
def test_wrong_arguments_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        small_model().generate(prompts(1, 5)[0], sampler="predictor_corrector", mask_token_id=4, **settings)
