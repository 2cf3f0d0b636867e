"""Exact inference over positions and states, against an enumeration of all strings of tiny vocabularies and lengths."""

import itertools
import math
import os

import pytest
import torch

from generation.constraints import lattice as module
from generation.constraints import lattice_kernel
from generation.constraints.automaton import make_automaton
from generation.constraints.lattice import make_lattice
from generation.constraints.lattice_kernel import LATTICE_KERNEL, choose_scans, follow_triton, messages_triton
from generation.constraints.scans import follow, messages
from generation.fast.proofs import difference

CPU = torch.device("cpu")
interpreted = lattice_kernel.triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not interpreted, reason="triton is not installed, or runs on a GPU")


def random_automaton(seed, states=5, kinds=4, vocab_size=6, density=0.5):
    """Any automaton whose start reaches acceptance."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        source, kind = (torch.rand((states, kinds), generator=generator) < density).nonzero().unbind(1)
        target = torch.randint(states, (len(source),), generator=generator)
        accepting = torch.rand(states, generator=generator) < 0.4
        classes = torch.randint(kinds + 1, (vocab_size,), generator=generator)
        kept = torch.isin(kind + 1, classes)
        try:
            automaton = make_automaton(classes, source[kept], kind[kept] + 1, target[kept], accepting)
        except ValueError:
            continue
        if len(automaton.source):
            return automaton


def random_log_probs(seed, rows, length, vocab_size=6, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn((rows, length, vocab_size), generator=generator, dtype=torch.float64) * spread).log_softmax(dim=-1)


def by_class(log_probs, automata):
    """Mass and best of each class, plainly."""
    kinds = max(automaton.kinds for automaton in automata)
    mass, best = (torch.full((*log_probs.shape[:2], kinds), -math.inf, dtype=torch.float64) for _ in range(2))
    for row, automaton in enumerate(automata):
        for kind in range(1, automaton.kinds):
            mass[row, :, kind] = log_probs[row][:, automaton.classes == kind].logsumexp(dim=-1)
            best[row, :, kind] = log_probs[row][:, automaton.classes == kind].amax(dim=-1)
    return mass, best


def strings(automaton, state, length, left):
    """All strings that may be written from a state, with the state behind."""
    for ids in itertools.product(range(len(automaton.classes)), repeat=length):
        end = automaton.run(ids, state)
        if end is not None and int(automaton.fewest[end]) <= left:
            yield ids, end


def enumerated(automaton, log_probs, state, left):
    """Log partition, log marginals (n, V), the best string and its state; of one row."""
    found = list(strings(automaton, state, len(log_probs), left))
    if not found:
        return -math.inf, None, None, None
    weights = torch.stack([log_probs[range(len(ids)), ids].sum() for ids, _ in found])
    partition = weights.logsumexp(dim=0)
    marginals = torch.zeros_like(log_probs)
    for (ids, _), weight in zip(found, weights, strict=True):
        marginals[range(len(ids)), ids] += (weight - partition).exp()
    return float(partition), marginals, *found[int(weights.argmax())]


@pytest.mark.parametrize("seed", range(12))
def test_solution_equals_an_enumeration_of_all_strings(seed):
    """Three rows with languages, states and tokens left of their own; 1e-9: float64 sums of some thousand terms."""
    first, second = random_automaton(seed), random_automaton(seed + 100, states=3)
    automata = [first, second, first]
    log_probs = random_log_probs(seed, 3, 1 + seed % 4)
    states = torch.tensor([0, min(1, second.states - 1), first.states - 1])
    left = torch.tensor([0, 1, 2])
    chance = torch.rand((3, log_probs.shape[1], 2), generator=torch.Generator().manual_seed(seed))
    mass, best = by_class(log_probs, automata)
    lattice = make_lattice(automata, CPU)
    got = lattice.solve(mass, best, states, left, chance, posterior=True)
    for row, automaton in enumerate(automata):
        partition, marginals, string, end = enumerated(automaton, log_probs[row], int(states[row]), int(left[row]))
        assert float(got.log_partition[row]) == pytest.approx(partition, abs=1e-9)
        if string is None:
            assert not bool(lattice.possible(log_probs.shape[1], states, left)[row].any())
            assert int(got.sample_state[row]) == int(states[row])
            continue
        expected = torch.zeros_like(mass[row]).index_add_(1, automaton.classes, marginals)
        torch.testing.assert_close(got.posterior[row].exp(), expected, atol=1e-9, rtol=0)
        found = lattice.possible(log_probs.shape[1], states, left)[row]
        assert torch.equal(found, marginals.new_zeros(mass[row].shape).index_add_(1, automaton.classes, marginals) > 0)
        assert got.best[row].tolist() == automaton.classes[list(string)].tolist()
        assert int(got.best_state[row]) == end
        state = int(states[row])
        for kind in got.sample[row].tolist():
            state = int(automaton.target[(automaton.source == state) & (automaton.kind == kind)])
        assert state == int(got.sample_state[row]) and int(automaton.fewest[state]) <= int(left[row])


def test_samples_follow_the_posterior_of_whole_strings():
    """20,000 draws of strings of classes: the total variation of as many counts over k strings is below sqrt(k / draws) in all but one of
    thousands of cases."""
    automaton, draws = random_automaton(3), 20_000
    log_probs = random_log_probs(5, 1, 3, spread=1.0)
    mass, best = by_class(log_probs, [automaton])
    lattice, many = make_lattice([automaton] * draws, CPU), (draws, -1, -1)
    chance = torch.rand((draws, 3, 2), generator=torch.Generator().manual_seed(0))
    got = lattice.solve(mass.expand(many), best.expand(many), torch.zeros(draws, dtype=torch.int64), 0, chance)
    expected: dict[tuple, float] = {}
    for ids, _ in strings(automaton, 0, 3, 0):
        key = tuple(automaton.classes[list(ids)].tolist())
        expected[key] = expected.get(key, 0.0) + float((log_probs[0, range(3), ids].sum() - got.log_partition[0]).exp())
    found: dict[tuple, float] = {}
    for key in map(tuple, got.sample.tolist()):
        found[key] = found.get(key, 0.0) + 1 / draws
    assert found.keys() <= expected.keys() and len(expected) > 5
    assert sum(abs(found.get(key, 0.0) - value) for key, value in expected.items()) / 2 < (len(expected) / draws) ** 0.5


def chain(length):
    """A language over 3 ids of one string of `length` ids, all 1."""
    steps = torch.arange(length)
    accepting = torch.arange(length + 1) == length
    return make_automaton(torch.tensor([0, 1, 0]), steps, torch.ones_like(steps), steps + 1, accepting)


def test_partitions_far_below_the_least_number_are_exact():
    """-3,000 nats, and beside it a row of the same batch of which all is accepted."""
    free = make_automaton(torch.tensor([1, 1, 1]), torch.tensor([0]), torch.tensor([1]), torch.tensor([0]), torch.tensor([True]))
    log_probs = torch.tensor([[0.0, -3000.0 / 64, 0.0]], dtype=torch.float64).log_softmax(dim=-1).expand(2, 64, -1)
    mass, best = by_class(log_probs, [chain(64), free])
    got = make_lattice([chain(64), free], CPU).solve(mass, best, torch.zeros(2, dtype=torch.int64), 0, torch.zeros(2, 64, 2), True)
    assert float(got.log_partition[0]) == pytest.approx(float(64 * log_probs[0, 0, 1]), rel=1e-12) and float(got.log_partition[0]) < -3000
    assert float(got.log_partition[1]) == pytest.approx(0.0, abs=1e-9)
    assert float(got.posterior[0, :, 1].abs().max()) < 1e-9 and int(got.sample_state[0]) == 64


@pytest.mark.parametrize("left, accepted", [(0, False), (4, False), (5, True), (9, True)])
def test_a_canvas_ends_where_acceptance_still_fits(left, accepted):
    """A string of 8 ids after a canvas of 3 needs 5 more."""
    automaton = chain(8)
    mass, best = by_class(random_log_probs(0, 1, 3, vocab_size=3), [automaton])
    got = make_lattice([automaton], CPU).solve(mass, best, torch.tensor([0]), left, torch.rand(1, 3, 2))
    assert bool(got.log_partition[0] > -math.inf) == accepted
    assert got.best_state.tolist() == got.sample_state.tolist() == ([3] if accepted else [0])


def test_without_chance_the_sample_is_the_best_string():
    automaton = random_automaton(1)
    mass, best = by_class(random_log_probs(2, 1, 5), [automaton])
    got = make_lattice([automaton], CPU).solve(mass, best, torch.tensor([0]), 3)
    assert torch.equal(got.sample, got.best) and torch.equal(got.sample_state, got.best_state)


def test_a_row_does_not_depend_on_its_neighbours():
    automata = [random_automaton(seed, kinds=2 + seed) for seed in range(3)]
    mass, best = by_class(random_log_probs(7, 3, 9), automata)
    lattice, states, chance = make_lattice(automata, CPU), torch.zeros(3, dtype=torch.int64), torch.rand(3, 9, 2)
    whole = lattice.solve(mass, best, states, 2, chance, True)
    for row in range(3):
        only = torch.tensor([row])
        got = lattice.select(only).solve(mass[only], best[only], states[only], 2, chance[only], True)
        for name in got._fields:
            assert torch.equal(getattr(got, name), getattr(whole, name)[only]), name


def test_a_row_of_nan_is_lost_and_its_neighbour_is_not():
    automaton = random_automaton(4)
    mass, best = by_class(random_log_probs(1, 2, 4), [automaton] * 2)
    mass[0, 2], best[0, 2] = math.nan, math.nan
    got = make_lattice([automaton] * 2, CPU).solve(mass, best, torch.tensor([0, 0]), 5, torch.rand(2, 4, 2))
    assert not bool(got.log_partition[0] > -math.inf) and bool(got.log_partition[1] > -math.inf)
    assert got.sample[0].tolist() == [0] * 4 and int(got.best_state[0]) == 0


def test_long_canvases_in_chunks_equal_those_in_one(monkeypatch):
    automaton = random_automaton(6)
    mass, best = by_class(random_log_probs(3, 2, 31), [automaton] * 2)
    lattice, chance = make_lattice([automaton] * 2, CPU), torch.rand(2, 31, 2)
    whole = lattice.solve(mass, best, torch.tensor([0, 0]), 5, chance, True)
    monkeypatch.setattr(module, "MOST", 1)
    for one, other in zip(lattice.solve(mass, best, torch.tensor([0, 0]), 5, chance, True), whole, strict=True):
        assert torch.equal(one, other)


def test_sums_of_another_dtype_are_refused():
    automaton = random_automaton(0)
    mass, best = by_class(random_log_probs(0, 1, 3), [automaton])
    with pytest.raises(ValueError, match="`log_mass` is torch.float32"):
        make_lattice([automaton], CPU).solve(mass.float(), best, torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="`best_log_prob` is torch.float64"):
        make_lattice([automaton], CPU).solve(mass, best[:, :2], torch.tensor([0]), 0)


@needs_triton
def test_kernel_passes_its_proof():
    assert LATTICE_KERNEL.missing(CPU) is None
    assert difference(*LATTICE_KERNEL.prove(CPU), LATTICE_KERNEL.tolerance) is None
    assert choose_scans(CPU) == (messages, follow)  # on a CPU a kernel is not worth it


@needs_triton
@pytest.mark.parametrize("left", [0, 3])
def test_kernel_equals_the_reference(monkeypatch, left):
    """Rows of different languages, one of which is not accepted, in tiles of 2 states and 4 edges; 1e-11 of logs of some ten nats."""
    automata = [random_automaton(1, states=5, kinds=7, vocab_size=12, density=0.9), chain(20), random_automaton(2)]
    kinds = max(automaton.kinds for automaton in automata)
    mass = torch.randn((3, 3, kinds), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 9
    best, chance = mass - 0.5, torch.rand((3, 3, 2), generator=torch.Generator().manual_seed(1))
    lattice, states = make_lattice(automata, CPU), torch.tensor([0, 1, 0])
    for numbers in (chance, None):
        expected = lattice.solve(mass, best, states, left, numbers, True)
        with monkeypatch.context() as patch:
            patch.setattr(lattice_kernel, "STATES", 2)
            patch.setattr(lattice_kernel, "EDGES", 4)
            patch.setattr(module, "choose_scans", lambda device: (messages_triton, follow_triton))
            got = lattice.solve(mass, best, states, left, numbers, True)
        assert not bool(got.log_partition[1] > -math.inf) and bool(got.log_partition[0] > -math.inf)
        for name, value in expected._asdict().items():
            torch.testing.assert_close(getattr(got, name), value, atol=1e-11, rtol=1e-12, msg=name)
