"""Edges put together hold what the edges by class hold."""

import pytest
import torch
from test_constraint_lattice import by_class, random_automaton, random_log_probs

from generation.constraints.bundles import bundle_edges
from generation.constraints.lattice import make_lattice


def apart(bundled):
    """The edges by class again, in rising order."""
    classes = bundled.kind.split(bundled.sizes.tolist())
    edges = zip(bundled.source.tolist(), bundled.bundle.tolist(), bundled.target.tolist(), strict=True)
    return sorted((source, kind, target) for source, bundle, target in edges for kind in classes[bundle].tolist())


@pytest.mark.parametrize("seed", range(5))
def test_edges_put_together_come_apart_again(seed):
    automaton = random_automaton(seed, states=7, kinds=9, vocab_size=20, density=0.7)
    bundled = automaton.bundled
    assert apart(bundled) == sorted(zip(automaton.source.tolist(), automaton.kind.tolist(), automaton.target.tolist(), strict=True))
    ends = list(zip(bundled.source.tolist(), bundled.target.tolist(), strict=True))
    assert ends == sorted(set(ends)) and len(ends) < len(automaton.source)
    held = [tuple(one.tolist()) for one in bundled.kind.split(bundled.sizes.tolist())]
    assert len(set(held)) == len(held)


def test_states_that_go_on_alike_share_a_bundle():
    source, kind, target = torch.tensor([[0, 0, 1, 1, 1], [3, 5, 3, 5, 2], [1, 1, 0, 0, 1]])
    bundled = bundle_edges(source, kind, target)
    assert bundled.bundle.tolist() == [0, 0, 1] and bundled.kind.tolist() == [3, 5, 2] and bundled.sizes.tolist() == [2, 1]


def test_a_posterior_is_made_on_request_and_changes_nothing_else():
    automaton = random_automaton(2)
    mass, best = by_class(random_log_probs(0, 2, 5), [automaton] * 2)
    lattice, chance = make_lattice([automaton] * 2, torch.device("cpu")), torch.rand(2, 5, 2)
    without, with_it = (lattice.solve(mass, best, torch.tensor([0, 0]), 3, chance, posterior) for posterior in (False, True))
    assert without.posterior is None and with_it.posterior.shape == mass.shape
    for one, other in zip(without[:-1], with_it[:-1], strict=True):
        assert torch.equal(one, other)
