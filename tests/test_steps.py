"""The pure pieces of a denoising step, each against a slow reference written in Python loops."""

import itertools
import math

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from generation import EntropyBoundSampler, MaskNoise, StableAndConfident, TemperatureSchedule, UniformNoise
from generation.rules.draws import BatchDraws, DrawnStep, row_draws
from generation.rules.prediction import Prediction, check_finite, dense_prediction
from generation.rules.samplers import ConfidenceSampler, FixedStepsSampler
from generation.rules.state import advance, start_canvas
from generation.rules.stopping import AllOf, AnyOf, Confident, Patience, Stable, before_sure_end


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def with_entropy(entropy):
    """A prediction of which only the entropy matters."""
    return Prediction(*[torch.zeros_like(entropy).long()] * 2, entropy, torch.zeros_like(entropy))


def with_probabilities(top):
    """A prediction of which only the probability of the argmax matters."""
    return Prediction(*[torch.zeros_like(top).long()] * 2, torch.zeros_like(top), top.log())


# Acceptance


def accept_slowly(entropy, bound):
    """Walks the positions in ascending order; float32 sums, as the tensors have them."""
    rows = []
    for row in entropy.tolist():
        accepted, total = [False] * len(row), torch.zeros(())
        for place in sorted(range(len(row)), key=row.__getitem__):
            own = torch.tensor(row[place])
            total = total + own
            accepted[place] = bool(total - own <= bound)
        rows.append(accepted)
    return torch.tensor(rows)


@pytest.mark.parametrize("bound", [0.1, 1.0, 7.5])
def test_acceptance_equals_a_loop_over_positions(bound):
    entropy = torch.rand(50, 63, generator=seeded(0)) ** 3
    got = EntropyBoundSampler(bound).accept(with_entropy(entropy))
    assert torch.equal(got, accept_slowly(entropy, bound))
    assert 1 < got.sum(dim=1).min() and got.sum(dim=1).float().mean() < 63


def test_ties_are_broken_somehow_but_counted_exactly():
    """Among equal entropies it does not matter which are accepted, but how many must be exact."""
    entropy = torch.full((2, 10), 0.25)
    entropy[1, 4:] = 0.5
    got = EntropyBoundSampler(1.0).accept(with_entropy(entropy))
    # row 0: own is 0.25, sums before it 0, 0.25, .. 1.0: five. Row 1: 4 x 0.25, then the sum before the first 0.5 is 1.0.
    assert got.sum(dim=1).tolist() == [5, 5] and bool(got[1, :4].all())


def test_exact_bound_is_accepted():
    """`<` for `<=` would change the released sampler; quarters are exact in float32."""
    entropy = torch.tensor([[0.25, 0.5, 0.75, 1.0]])
    assert EntropyBoundSampler(0.75).accept(with_entropy(entropy)).tolist() == [[True, True, True, False]]
    assert EntropyBoundSampler(0.74).accept(with_entropy(entropy)).tolist() == [[True, True, False, False]]


def test_at_least_one_position_is_always_accepted():
    entropy = 5 + torch.rand(100, 7, generator=seeded(1))
    got = EntropyBoundSampler(1e-6).accept(with_entropy(entropy))
    assert got.sum(dim=1).eq(1).all() and torch.equal(got.int().argmax(dim=1), entropy.argmin(dim=1))


def test_certain_positions_are_all_accepted():
    entropy = torch.zeros(1, 256)
    entropy[0, 100:] = 4.0
    assert EntropyBoundSampler(0.1).accept(with_entropy(entropy)).sum() == 101, "all that are certain, and the first that is not"


def test_rows_are_accepted_independently():
    entropy = torch.rand(5, 21, generator=seeded(2))
    together = EntropyBoundSampler(1.0).accept(with_entropy(entropy))
    assert torch.equal(together, torch.cat([EntropyBoundSampler(1.0).accept(with_entropy(row[None])) for row in entropy]))


@pytest.mark.parametrize("bound", [0, -1.0, float("nan")])
def test_sampler_refuses_a_bound_that_is_not_positive(bound):
    with pytest.raises(ValueError, match="entropy_bound"):
        EntropyBoundSampler(bound)


@pytest.mark.parametrize("bound", [0, 1.0001, -1.0, float("nan")])
def test_confidence_sampler_refuses_what_is_no_probability(bound):
    with pytest.raises(ValueError, match="confidence"):
        ConfidenceSampler(bound)


def test_confidence_sampler_accepts_the_confident_and_always_the_best():
    top = torch.tensor([[0.95, 0.5, 0.9, 0.25], [0.25, 0.5, 0.125, 0.0625]])
    got = ConfidenceSampler(0.75).accept(with_probabilities(top))
    assert got.tolist() == [[True, False, True, False], [False, True, False, False]]
    got = ConfidenceSampler(0.5).accept(with_probabilities(top))
    assert got.tolist() == [[True, True, True, False], [False, True, False, False]], "exactly the confidence is enough"


@pytest.mark.parametrize(("length", "steps"), [(10, 4), (10, 10), (7, 20), (256, 48), (10, 1)])
def test_fixed_steps_accept_evenly_more_until_all(length, steps):
    top = torch.rand(3, length, generator=seeded(13))
    for step in range(steps):
        got = FixedStepsSampler().accept(with_probabilities(top), step, steps)
        count = math.ceil(length * (step + 1) / steps)
        for row in range(3):
            best = sorted(range(length), key=top[row].tolist().__getitem__, reverse=True)[:count]
            assert sorted(got[row].nonzero().flatten().tolist()) == sorted(best)


# Schedule


def test_temperature_starts_at_t_max_and_ends_one_step_above_t_min():
    schedule = TemperatureSchedule(t_min=0.4, t_max=0.8, max_denoising_steps=48)
    temperatures = schedule.temperatures().tolist()
    assert temperatures[0] == pytest.approx(0.8) and temperatures[-1] == pytest.approx(0.4 + 0.4 / 48)
    falls = [a - b for a, b in zip(temperatures, temperatures[1:], strict=False)]
    assert falls == pytest.approx([0.4 / 48] * 47, rel=1e-4)


@pytest.mark.parametrize("steps", [1, 7, 48])
def test_temperature_is_transformers_to_the_last_bit(steps):
    """transformers counts the remaining steps in an int32 tensor, so its temperature is rounded to float32 on the way.

    A temperature that differs in the last bit changes tokens after some ten steps of self-conditioning.
    """
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import LinearTemperatureScheduleLogitsProcessor

    logits = torch.randn(3, 100, generator=seeded(3)) * 10
    for t_min, t_max in ((0.4, 0.8), (0.1, 1.7)):
        schedule = TemperatureSchedule(t_min, t_max, steps)
        oracle = LinearTemperatureScheduleLogitsProcessor(t_min, t_max, steps)
        for step in range(steps):
            expected = oracle(None, logits, torch.tensor(steps - step, dtype=torch.int32))
            assert torch.equal(logits / schedule.temperatures()[step], expected), f"step {step} of {steps}"


def test_equal_ends_give_a_constant_temperature():
    schedule = TemperatureSchedule(0.5, 0.5, 3)
    assert schedule.temperatures().tolist() == [0.5] * 3


# Stopping


def finished_slowly(argmaxes, entropies, stability_threshold, confidence_threshold):
    """For every step and row: whether the last `stability_threshold` argmax canvases all equal this one, confidently."""
    answer = []
    for step, argmax in enumerate(argmaxes):
        row_answers = []
        for row, canvas in enumerate(argmax.tolist()):
            backs = range(1, stability_threshold + 1)
            earlier = [argmaxes[step - back][row].tolist() if step >= back else None for back in backs]
            mean = sum(entropies[step][row].tolist()) / len(canvas)
            row_answers.append(all(one == canvas for one in earlier) and mean < confidence_threshold)
        answer.append(row_answers)
    return answer


@pytest.mark.parametrize("stability_threshold", [0, 1, 2, 3])
def test_stopping_equals_a_loop_over_the_history(stability_threshold):
    generator = seeded(4)
    argmaxes = [torch.randint(2, (20, 3), generator=generator) for _ in range(4)]
    for _ in range(26):  # canvases that change now and then
        keep = torch.rand(20, 1, generator=generator) < 0.7
        argmaxes.append(torch.where(keep, argmaxes[-1], torch.randint(2, (20, 3), generator=generator)))
    entropies = [torch.rand(20, 3, generator=generator) for _ in argmaxes]
    stopping = StableAndConfident(stability_threshold=stability_threshold, confidence_threshold=0.6)
    memory, got = stopping.start(argmaxes[0]), []
    for argmax, entropy in zip(argmaxes, entropies, strict=True):
        done, memory = stopping.update(memory, with_entropy(entropy)._replace(argmax=argmax), None)
        assert memory[0][0].shape == (20, stability_threshold, 3)
        got.append(done.tolist())
    expected = finished_slowly(argmaxes, entropies, stability_threshold, 0.6)
    assert got == expected
    count = sum(map(sum, expected))
    assert 0 < count < 30 * 20, "some stop and some do not"
    assert not any(any(rows) for rows in expected[:stability_threshold]), "nothing is stable before there is a history"


def test_mean_entropy_at_the_threshold_is_not_confident():
    stopping = StableAndConfident(stability_threshold=0, confidence_threshold=0.5)
    canvas = torch.zeros(2, 4, dtype=torch.int64)
    entropy = torch.tensor([[0.5] * 4, [0.25, 0.5, 0.5, 0.5]])
    assert stopping.update(stopping.start(canvas), with_entropy(entropy), None)[0].tolist() == [False, True]


def test_what_follows_a_sure_end_does_not_count():
    """Positions behind an end of sequence are cut off in any case; the end itself, and a doubtful end, still count."""
    eos = torch.tensor([1, 6])
    argmax = torch.tensor([[9, 6, 9, 1, 9], [9, 6, 9, 1, 9], [9, 9, 9, 9, 9]])
    entropy = torch.tensor([[0.9, 0.1, 0.9, 0.1, 0.9], [0.9, 0.5, 0.9, 0.1, 0.9], [0.0] * 5])
    prediction = with_entropy(entropy)._replace(argmax=argmax)
    counted = before_sure_end(prediction, eos, 0.5)
    assert counted.tolist() == [[True, True, False, False, False], [True, True, True, True, False], [True] * 5]
    stopping = StableAndConfident(stability_threshold=1, confidence_threshold=0.55)
    other = torch.tensor([[9, 6, 3, 3, 3], [9, 6, 9, 1, 3], [9] * 5])
    done, _ = stopping.update(((other[:, None],), ()), prediction, counted)
    assert done.tolist() == [True, False, True], "means 0.5, 0.6 and 0.0 over what counts, all stable there"


def test_rules_are_joined_as_all_of_and_any_of():
    """Each keeps a memory of its own, and every one is asked at every step."""
    canvas = torch.zeros(2, 4, dtype=torch.int64)
    entropy = torch.tensor([[0.1] * 4, [0.9] * 4])
    prediction = with_entropy(entropy)._replace(argmax=canvas + 5)
    rules = (Stable(1), Confident(0.5), Patience(2))
    for joined, expected in ((AllOf(rules), [[0, 0], [0, 0], [1, 0], [1, 0]]), (AnyOf(rules), [[1, 0], [1, 1], [1, 1], [1, 1]])):
        memory = joined.start(canvas)
        for wanted in expected:
            done, memory = joined.update(memory, prediction, None)
            assert done.int().tolist() == wanted


# Predictions


def test_entropy_equals_float64():
    logits = torch.randn(4, 10, 1000, generator=seeded(5)) * torch.tensor([0.01, 1.0, 5.0, 30.0])[:, None, None]
    got = dense_prediction(logits, BatchDraws(seeded(0)))
    log_p = logits.double().log_softmax(dim=-1)
    expected = -(log_p.exp() * log_p).sum(dim=-1)
    # 1000 float32 terms of a sum of at most ln(1000) = 6.9 nats
    torch.testing.assert_close(got.entropy.double(), expected, atol=2e-5, rtol=0)
    assert torch.equal(got.argmax, logits.argmax(dim=-1))
    torch.testing.assert_close(got.log_probs.double(), log_p.amax(dim=-1), atol=2e-5, rtol=0)
    assert got.sample.shape == got.argmax.shape == got.entropy.shape == (4, 10)


def test_entropy_of_forbidden_ids_is_finite():
    """A logits processor's -inf times a probability of 0 must not become NaN."""
    logits = torch.randn(1, 3, 7, generator=seeded(6))
    logits[..., 2:5] = -float("inf")
    got = dense_prediction(logits, BatchDraws(seeded(0)))
    kept = logits[..., [0, 1, 5, 6]].double().log_softmax(dim=-1)
    torch.testing.assert_close(got.entropy.double(), -(kept.exp() * kept).sum(dim=-1), atol=1e-6, rtol=0)
    assert not bool(((got.sample >= 2) & (got.sample < 5)).any())


def test_samples_follow_the_distribution():
    """Chi-square over 7 ids and 40,000 samples of each of two positions.

    With 6 degrees of freedom the statistic exceeds 22.5 once in 1,000 seeds; the seed is fixed, so this does not flicker.
    """
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5], [3.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]])
    count = 40_000
    samples = dense_prediction(logits.repeat(count, 1, 1), BatchDraws(seeded(7))).sample  # (count, 2)
    for place in range(2):
        expected = logits[place].double().softmax(dim=-1) * count
        observed = torch.bincount(samples[:, place], minlength=7).double()
        statistic = ((observed - expected) ** 2 / expected).sum().item()
        assert statistic < 22.5, f"position {place}: {observed.tolist()} samples where {expected.round().tolist()} are expected"


def test_greedy_statistics_draw_nothing():
    logits, draws = torch.randn(2, 5, 7, generator=seeded(14)), BatchDraws(seeded(15))
    before = draws.generator.get_state()
    got = dense_prediction(logits, draws, greedy=True)
    assert torch.equal(got.sample, got.argmax) and torch.equal(draws.generator.get_state(), before)


def test_logits_that_are_not_numbers_are_refused():
    logits = torch.randn(3, 2, 7, generator=seeded(16))
    logits[1, 0, 3] = float("nan")
    with pytest.raises(ValueError, match=r"NaN.*rows \[1\]"):
        check_finite(dense_prediction(logits, BatchDraws(seeded(0))).bad)


def test_no_two_purposes_of_a_step_get_the_same_numbers():
    """Streams used to be told apart by the method that draws, so acceptance and the walk got the same numbers; 4 / sqrt(n) is four standard
    deviations of the correlation of independent ones."""
    device, count = torch.device("cpu"), 4096
    here = row_draws([3], None, 1, 1).at(2, 5)
    alike = torch.full((1, count, 2), 0.5)
    drawn = {
        "walk": here.uniforms((1, count), device), "acceptance": here.uniforms((1, count), device, "acceptance"),
        "tokens": here.tokens(alike), "other tokens": here.tokens(alike, "other tokens"),
        "noise": here.noise(UniformNoise(1000), (1, count), device),
    }  # fmt: skip
    for (one, first), (other, second) in itertools.combinations(drawn.items(), 2):
        both = torch.stack((first.flatten().double(), second.flatten().double()))
        assert abs(float(torch.corrcoef(both)[0, 1])) < 4 / count**0.5, f"{one} and {other}"
    for purpose in ("uniforms", "acceptance"):
        assert torch.equal(here.uniforms((1, 9), device, purpose), here.uniforms((1, 9), device, purpose))


def test_numbers_drawn_before_a_step_are_those_of_the_step():
    """A recorded step takes them as inputs; one of another shape than was drawn is refused."""
    drawn = DrawnStep(torch.rand(2, 3, 1, 2), torch.zeros(2, 3, dtype=torch.int64), None)
    device = torch.device("cpu")
    assert drawn.uniforms((2, 3, 1, 2), device) is drawn.walk and drawn.noise(UniformNoise(9), (2, 3), device) is drawn.renoised
    for shape, purpose in (((2, 3, 1, 4), "uniforms"), ((2, 3), "acceptance")):
        with pytest.raises(ValueError, match=f"the step's {purpose} were drawn with shape .*; expected"):
            drawn.uniforms(shape, device, purpose)


def test_row_draws_depend_on_the_rows_seed_alone():
    """A row must draw the same numbers in any batch, in any place, and when others have left."""
    probabilities = torch.rand(3, 10, 50, generator=seeded(17))
    together = row_draws([5, 6, 5], None, 3, 1)
    first = together.tokens(probabilities[[0, 1, 0]])
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    alone = row_draws([6], None, 1, 1)
    assert torch.equal(alone.tokens(probabilities[[1]])[0], first[1])
    noise = UniformNoise(50)
    left = together.select(torch.tensor([1])).noise(noise, (1, 10), torch.device("cpu"))
    assert torch.equal(left, alone.noise(noise, (1, 10), torch.device("cpu")))


def test_row_draws_depend_on_the_place_alone():
    """A step that was computed for nothing, or numbers of another kind drawn before, must not shift what comes after."""
    draws, noise, device = row_draws([5], None, 1, 1), UniformNoise(50), torch.device("cpu")
    later = draws.at(1, 3).noise(noise, (1, 10), device)
    for place in ((0, 3), (1, 2), (1, -1)):
        assert not torch.equal(draws.at(*place).noise(noise, (1, 10), device), later)
    draws.at(1, 2).uniforms((1, 4), device)
    assert torch.equal(draws.at(1, 3).noise(noise, (1, 10), device), later)


def test_generators_give_the_rows_their_seeds():
    """One generator for all rows, or one a row; equal states give equal rows, and the next call other ones."""
    source = seeded(3)
    first, second = row_draws(None, source, 2, 1), row_draws(None, source, 2, 1)
    assert first == row_draws(None, seeded(3), 2, 1) and len({*first.seeds, *second.seeds}) == 4
    apart = row_draws(None, [seeded(3), seeded(4)], 2, 1)
    assert apart.seeds[0] == row_draws(None, seeded(3), 1, 1).seeds[0]


def test_copies_of_a_prompt_draw_different_numbers():
    draws = row_draws(5, None, 2, 2)
    rows = draws.noise(UniformNoise(1000), (4, 20), torch.device("cpu"))
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[1], rows[3]) and not torch.equal(rows[0], rows[1])


# Noise


def test_uniform_noise_covers_the_whole_vocabulary():
    """The first and the last id included, every id equally often: chi-square of 9 degrees exceeds 27.9 in 0.1 % of seeds."""
    drawn = UniformNoise(10).draw((100, 200), torch.device("cpu"), seeded(8))
    assert drawn.shape == (100, 200) and drawn.dtype == torch.int64
    counts = torch.bincount(drawn.flatten(), minlength=10).double()
    assert counts.shape == (10,) and ((counts - 2000) ** 2 / 2000).sum() < 27.9


def test_mask_noise_is_the_mask_token_and_draws_nothing():
    state = torch.get_rng_state()
    generator = seeded(9)
    before = generator.get_state()
    drawn = MaskNoise(4).draw((3, 5), torch.device("cpu"), generator)
    assert torch.equal(drawn, torch.full((3, 5), 4)) and drawn.dtype == torch.int64
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(generator.get_state(), before)


# One step


def random_prediction(generator, shape=(3, 10), vocab_size=50):
    tokens = [torch.randint(vocab_size, shape, generator=generator) for _ in range(2)]
    found = Prediction(*tokens, *(torch.rand(shape, generator=generator) for _ in range(2)))
    return found._replace(soft_embeds=torch.randn(*shape, 6, generator=generator), raw=torch.randn(*shape, 7, generator=generator))


def start(canvas, stopping):
    return start_canvas(canvas, torch.zeros(*canvas.shape, 6), stopping, (torch.zeros(*canvas.shape, 7),))


NOISE = torch.full((3, 10), 49)


def step_once(state, step, generator, stopping):
    """One step on a random prediction, far from stable; returns it and the new state."""
    prediction = random_prediction(generator)
    return prediction, advance(state, prediction, step, 9, NOISE, EntropyBoundSampler(1.0), stopping)


def test_step_accepts_samples_and_renoises_the_rest():
    generator = seeded(10)
    stopping = StableAndConfident(1, 1e-9)
    before = start(torch.randint(50, (3, 10), generator=generator), stopping)
    assert not bool(before.soft_embeds.any()) and not bool(before.finished.any()) and before.passes.tolist() == [0, 0, 0]
    prediction, state = step_once(before, 0, generator, stopping)
    accepted = EntropyBoundSampler(1.0).accept(prediction)
    assert torch.equal(state.accepted, accepted) and 0 < accepted.sum() < 30
    assert torch.equal(state.canvas, torch.where(accepted, prediction.sample, 49))
    assert torch.equal(state.argmax, prediction.argmax) and torch.equal(state.soft_embeds, prediction.soft_embeds)
    assert torch.equal(state.memory[0][0][:, -1], prediction.argmax) and state.passes.tolist() == [1, 1, 1]
    assert torch.equal(before.canvas, before.argmax) and before.passes.tolist() == [0, 0, 0], "the old state is not written to"


def leaves(state):
    """Every tensor of a state, by name, those that the stopping rules remember included."""
    return {f"{name} {index}": leaf for name, value in state._asdict().items() for index, leaf in enumerate(tree_leaves(value))}


def test_step_leaves_finished_rows_untouched():
    """Nothing of a finished row may change, or its result depends on its neighbours."""
    generator, stopping = seeded(11), AnyOf((StableAndConfident(2, 1e-9), Patience(5)))
    state = start(torch.randint(50, (3, 10), generator=generator), stopping)
    _, before = step_once(state, 0, generator, stopping)
    before = before._replace(finished=torch.tensor([False, True, False]))
    _, after = step_once(before, 1, generator, stopping)
    assert leaves(before).keys() == leaves(after).keys() and len(leaves(after)) == 14
    for (name, old), new in zip(leaves(before).items(), leaves(after).values(), strict=True):
        assert torch.equal(new[1], old[1]), name
        if name.removesuffix(" 0") in ("canvas", "argmax", "soft_embeds", "accepted", "passes", "entropy", "log_probs", "logits", "memory"):
            assert not torch.equal(new[0], old[0]) and not torch.equal(new[2], old[2]), f"{name} of the other rows changes"
    assert after.finished.tolist() == [False, True, False] and after.passes.tolist() == [2, 1, 2]


def test_rows_are_chosen_and_put_back_whole():
    """Whatever a rule remembers: no field is known by name where rows leave."""
    generator, stopping = seeded(12), AllOf((AnyOf((StableAndConfident(2, 1e-9), Patience(5))), Patience(7)))
    whole = step_once(start(torch.randint(50, (3, 10), generator=generator), stopping), 0, generator, stopping)[1]
    rows = torch.tensor([0, 2])
    some = whole.select(rows)
    for name, value in leaves(whole.place(rows, some)).items():
        assert torch.equal(value, leaves(whole)[name]), name
    changed = some._replace(argmax=some.argmax + 1, memory=tree_map(lambda tensor: tensor + 1, some.memory))
    back = whole.place(rows, changed)
    for name, value in leaves(back).items():
        assert torch.equal(value[1], leaves(whole)[name][1]) and torch.equal(value[rows], leaves(changed)[name]), name


def test_finished_rows_stay_finished():
    """The new prediction of a finished row, unstable and unsure, must not start it again."""
    generator = seeded(12)
    state = start(torch.randint(50, (3, 10), generator=generator), StableAndConfident(0, math.inf))
    _, state = step_once(state, 0, generator, StableAndConfident(0, math.inf))
    assert state.finished.tolist() == [True] * 3 and state.passes.tolist() == [1] * 3
    _, state = step_once(state, 1, generator, StableAndConfident(0, 1e-9))
    assert state.finished.tolist() == [True] * 3 and state.passes.tolist() == [1] * 3


def test_history_of_changes_is_kept_per_position():
    """`changed_at` and `revisions` against a list of all argmax canvases; the first step is no revision."""
    generator = seeded(18)
    stopping = StableAndConfident(1, 1e-9)
    state, seen = start(torch.randint(50, (3, 10), generator=generator), stopping), []
    for step in range(9):
        prediction = random_prediction(generator, vocab_size=2)
        state = advance(state, prediction, step, 9, NOISE, EntropyBoundSampler(1.0), stopping)
        seen.append(prediction.argmax.tolist())
    for row in range(3):
        for place in range(10):
            tokens = [canvas[row][place] for canvas in seen]
            changes = [step for step in range(1, 9) if tokens[step] != tokens[step - 1]]
            assert state.revisions[row, place] == len(changes)
            assert state.changed_at[row, place] == (changes[-1] if changes else 0)


def test_row_gives_up_after_as_many_steps_as_it_is_patient():
    """Counted from the step of the lowest mean entropy; a new minimum starts the count again."""
    means = [0.9, 0.8, 0.85, 0.7, 0.75, 0.71, 0.72, 0.6]
    stopping = AnyOf((StableAndConfident(1, 1e-9), Patience(3)))
    state, finished = start(torch.zeros(3, 10, dtype=torch.int64), stopping), []
    for step, mean in enumerate(means):
        prediction = random_prediction(seeded(step))._replace(entropy=torch.full((3, 10), mean))
        state = advance(state, prediction, step, 9, NOISE, EntropyBoundSampler(1.0), stopping)
        finished.append(bool(state.finished.all()))
    assert finished == [False] * 6 + [True] * 2, "0.7 at step 3 is the minimum; steps 4, 5 and 6 do not reach it"
