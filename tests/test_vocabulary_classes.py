"""A canvas under a constraint, from two walks over the vocabulary: against an enumeration of all strings, and against whole logits."""

import math

import pytest
import torch
from test_constraint_lattice import enumerated, random_automaton, strings

from generation.constraints.automaton import make_automaton
from generation.constraints.lattice import make_lattice
from generation.rules.draws import BatchDraws, RowDraws
from generation.rules.prediction import NOTHING_MORE, Wanted
from generation.vocabulary import classes as module
from generation.vocabulary.classes import CHANCES, CHANCES_WITH_CURRENT, Chosen, ClassWalk, possible_shares
from generation.vocabulary.dense_classes import dense_draw, dense_sums
from generation.vocabulary.filters import Filters
from generation.vocabulary.group_walk import GroupWalk
from generation.vocabulary.segments import make_orders
from generation.vocabulary.walk import VocabularyHead

CAP, CPU = 30.0, torch.device("cpu")
FIELDS, TOKENS = ("entropy", "log_probs", "current_log_probs", "soft_embeds"), ("argmax", "sample", "other", "bad")


def case(vocab_size=1000, size=24, rows=(2, 9), seed=0, spread=4.0, dtype=torch.float32, untied=False):
    generator = torch.Generator().manual_seed(seed)
    weight, embedding = (torch.randn((vocab_size, size), generator=generator) * spread / size**0.5 for _ in range(2))
    hidden = torch.randn((*rows, size), generator=generator)
    scale = torch.tensor(size**0.5, dtype=dtype)
    return hidden.to(dtype), VocabularyHead(weight.to(dtype), CAP, scale, embedding.to(dtype) if untied else None)


def whole_logits(hidden, head, temperature):
    return torch.tanh(torch.nn.functional.linear(hidden, head.weight).float() / CAP) * CAP / temperature


def chosen_of(solution, sums=None, possible=None):
    """With the posterior, or with the model's own shares of what is possible."""
    shares = solution.posterior if possible is None else possible_shares(sums.log_mass, possible)
    return Chosen(shares, solution.sample, solution.best, ~(solution.log_partition > -math.inf), possible is not None)


def join(walk, lattice, state, left, chance, pad, wanted=NOTHING_MORE, possible=None):
    """As a loop joins them."""
    sums = walk.sums()
    first = None if chance is None else chance[:, : walk.count, :2]
    solution = lattice.solve(sums.log_mass, sums.best, state, left, first, posterior=True)
    if walk.needs_thresholds:
        lost, loose = ~(solution.log_partition > -math.inf), walk.loose_sums()
        solution = solution.where(lost, lattice.solve(loose.log_mass, loose.best, state, left, first, posterior=True))
        sums = walk.lift(sums, loose, lost)
    return walk.draw(sums, chosen_of(solution, sums, possible), chance, pad, wanted), solution


def predict(
    hidden, head, temperature, automata, state=None, left=0, count=None, chance="drawn", filters=None, current=None, pad=0,
    wanted=NOTHING_MORE, at_once=None, **kwargs,
):  # fmt: skip
    """`at_once`: None for the posterior, else whether the first walk mixes what is possible."""
    lattice, orders = make_lattice(automata, CPU), make_orders([automaton.classes for automaton in automata], CPU)
    state = torch.zeros(len(hidden), dtype=torch.int64) if state is None else state
    if isinstance(chance, str):
        chances = CHANCES if current is None else CHANCES_WITH_CURRENT
        chance = BatchDraws(torch.Generator().manual_seed(1)).uniforms((*hidden.shape[:2], chances), CPU)
    count = count or hidden.shape[1]
    possible = None if at_once is None else lattice.possible(count, state, left)
    walk = ClassWalk(hidden, head, temperature, orders, count, filters, current, possible if at_once else None, **kwargs)
    return join(walk, lattice, state, left, chance, pad, wanted, possible)


def predict_dense(
    hidden, head, temperature, automata, left=0, count=None, chance=None, filters=None, current=None, pad=0, wanted=NOTHING_MORE,
    at_once=None,
):  # fmt: skip
    lattice, orders = make_lattice(automata, CPU), make_orders([automaton.classes for automaton in automata], CPU)
    state, count = torch.zeros(len(hidden), dtype=torch.int64), count or hidden.shape[1]
    logits = whole_logits(hidden, head, temperature)
    logits = logits if filters is None else filters.apply(logits)
    sums = dense_sums(logits, orders, count)
    solution = lattice.solve(sums.log_mass, sums.best, state, left, None if chance is None else chance[:, :count, :2], True)
    possible = None if at_once is None else lattice.possible(count, state, left)
    got = dense_draw(logits, sums, chosen_of(solution, sums, possible), orders, chance, pad, current, wanted)
    table = head.weight if head.embedding is None else head.embedding
    return got._replace(soft_embeds=(got.shaped.exp().to(table.dtype) @ table) * head.embed_scale), solution


def random_classes(vocab_size, kinds, seed=0, most=0.6):
    """Most ids in one class, some in none, the rest in classes of some ids and of one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(vocab_size, generator=generator) < most, 1, torch.randint(kinds, (vocab_size,), generator=generator))


def free_automaton(classes, seed=0, states=7):
    """Edges of every class from some states, so that strings of many lengths are accepted."""
    generator, kinds = torch.Generator().manual_seed(seed), int(classes.max()) + 1
    source, kind = (torch.rand((states, kinds), generator=generator) < 0.7).nonzero().unbind(1)
    target = torch.randint(states, (len(source),), generator=generator)
    return make_automaton(classes, source, kind, target, torch.arange(states) % 2 == 0)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_both_ways_equal_an_enumeration_of_all_strings(seed, greedy):
    """Tiny vocabularies, canvases of 1 to 3; 2e-5: logits and soft embeddings are float32."""
    automata = [random_automaton(seed), random_automaton(seed + 50, states=3)]
    hidden, head = case(vocab_size=6, size=8, rows=(2, 1 + seed % 3), seed=seed)
    current = torch.randint(6, hidden.shape[:2], generator=torch.Generator().manual_seed(seed))
    chance = None if greedy else torch.rand((*hidden.shape[:2], CHANCES_WITH_CURRENT), generator=torch.Generator().manual_seed(seed))
    left = 3
    log_probs = whole_logits(hidden.double(), head._replace(weight=head.weight.double()), 0.7).double().log_softmax(dim=-1)
    for got, solution in (
        predict(hidden, head, 0.7, automata, left=left, chance=chance, current=current),
        predict_dense(hidden, head, 0.7, automata, left=left, chance=chance, current=current),
    ):
        for row, automaton in enumerate(automata):
            partition, marginals, string, _ = enumerated(automaton, log_probs[row], 0, left)
            assert bool(got.bad[row]) == (string is None)
            if string is None:
                continue
            alive = log_probs[row][:, automaton.classes > 0].logsumexp(dim=-1).sum()
            assert float(solution.log_partition[row] + alive) == pytest.approx(partition, abs=2e-5)
            assert got.argmax[row].tolist() == list(string)
            assert automaton.run(got.sample[row].tolist()) is not None
            entropy = torch.special.entr(marginals).sum(dim=-1)
            soft = (marginals.float() @ head.weight) * head.embed_scale
            places = range(len(marginals))
            torch.testing.assert_close(got.entropy[row].double(), entropy, atol=2e-5, rtol=0)
            torch.testing.assert_close(got.log_probs[row].double(), marginals[places, string].log(), atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(got.current_log_probs[row].double(), marginals[places, current[row]].log(), atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(got.soft_embeds[row], soft, atol=1e-4, rtol=1e-4)
            rest = marginals.scatter(1, current[row][:, None], 0.0)
            alone = rest.sum(dim=-1) == 0
            assert torch.equal(got.other[row] == current[row], alone)
            assert bool((rest.gather(1, got.other[row][:, None]).squeeze(1) > 0)[~alone].all())
            if greedy:
                assert torch.equal(got.other[row][~alone], rest.argmax(dim=-1)[~alone]) and torch.equal(got.sample[row], got.argmax[row])


@pytest.mark.parametrize("dense", [False, True])
def test_samples_follow_the_distribution_of_whole_strings(dense):
    """20,000 canvases, and 5,000 of whole logits, which take longer; the total variation of as many counts over k strings is below
    sqrt(k / draws) in all but one of thousands of cases. The tokens without the current ones follow the marginals without them,
    likewise."""
    draws, automaton = 5_000 if dense else 20_000, random_automaton(3)
    hidden, head = case(vocab_size=6, size=8, rows=(1, 2), spread=1.5)
    current = torch.tensor([[0, 1]]).expand(draws, -1)
    chance = torch.rand((draws, 2, CHANCES_WITH_CURRENT), generator=torch.Generator().manual_seed(0))
    lattice, orders = make_lattice([automaton] * draws, CPU), make_orders([automaton.classes] * draws, CPU)
    state, many = torch.zeros(draws, dtype=torch.int64), hidden.expand(draws, -1, -1)
    if dense:
        got, _ = predict_dense(many, head, 1.0, [automaton] * draws, left=2, chance=chance, current=current)
    else:
        together = module.Orders(orders.rows, orders.kinds, ((slice(None), orders.rows[0]),))  # else one by one, for minutes
        got, _ = join(ClassWalk(many, head, 1.0, together, 2, None, current), lattice, state, 2, chance, 0)
    log_probs = whole_logits(hidden, head, 1.0).double().log_softmax(dim=-1)[0]
    partition, marginals, _, _ = enumerated(automaton, log_probs, 0, 2)
    expected = {ids: float((log_probs[range(2), ids].sum() - partition).exp()) for ids, _ in strings(automaton, 0, 2, 2)}
    found: dict[tuple, float] = {}
    for ids in map(tuple, got.sample.tolist()):
        found[ids] = found.get(ids, 0.0) + 1 / draws
    assert found.keys() <= expected.keys() and len(expected) > 5
    assert sum(abs(found.get(key, 0.0) - value) for key, value in expected.items()) / 2 < (len(expected) / draws) ** 0.5
    rest = marginals.scatter(1, current[:1].T, 0.0)
    rest /= rest.sum(dim=-1, keepdim=True)
    for place in range(2):
        counts = torch.bincount(got.other[:, place], minlength=6) / draws
        assert float((counts - rest[place]).abs().sum()) / 2 < (6 / draws) ** 0.5


@pytest.mark.parametrize("piece", [None, 1, 100, 4999])
@pytest.mark.parametrize("temperature", [0.05, 0.4, 1.7])
@pytest.mark.parametrize("untied", [False, True])
def test_walks_equal_whole_logits(piece, temperature, untied):
    """63 positions, 5,001 ids, two rows of different languages; 1e-4 of sums in another order, more where a temperature of 0.05 makes a
    last bit of a logit that much."""
    if piece == 1 and untied:
        pytest.skip("one id at a time is slow, and once is enough")
    automata = [free_automaton(random_classes(5001, 30, seed), seed) for seed in range(2)]
    hidden, head = case(vocab_size=5001, rows=(2, 63), untied=untied)
    current = torch.randint(5001, (2, 63), generator=torch.Generator().manual_seed(0))
    given = {"left": 1, "current": current, "count": 60, "pad": 17}
    got, solution = predict(hidden, head, temperature, automata, chance=None, piece=piece, **given)
    expected, reference = predict_dense(hidden, head, temperature, automata, **given)
    close = 1e-4 if temperature > 0.1 else 2e-3
    torch.testing.assert_close(solution.posterior.exp(), reference.posterior.exp(), atol=close, rtol=0)
    for name in TOKENS:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for name in FIELDS:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=close, rtol=1e-4, msg=name)


@pytest.mark.parametrize("current", [False, True])
def test_whole_logits_draw_the_ids_that_the_walk_draws(current):
    """They drew others of a class than the walk, so that a hook on the head that only looks changed the text. 0.97: a class or an id may
    change where a number falls on the edge between two."""
    automata = [free_automaton(random_classes(5001, 30, seed), seed) for seed in range(2)]
    hidden, head = case(vocab_size=5001, rows=(2, 63))
    chance = torch.rand((2, 63, CHANCES_WITH_CURRENT), generator=torch.Generator().manual_seed(1))
    canvas = torch.randint(5001, (2, 63), generator=torch.Generator().manual_seed(0))
    given = {"left": 1, "count": 60, "pad": 17, "chance": chance, "current": canvas if current else None}
    (got, _), (expected, _) = (way(hidden, head, 1.7, automata, **given) for way in (predict, predict_dense))
    for name in ("sample", "other") if current else ("sample",):
        assert float((getattr(got, name) == getattr(expected, name)).float().mean()) > 0.97, name


@pytest.mark.parametrize("likely", ["none", "best", "any"])
@pytest.mark.parametrize("temperature", [0.05, 0.4, 1.7])
@pytest.mark.parametrize("most", [0.6, 0.001])
def test_a_first_walk_that_mixes_gives_what_two_walks_and_whole_logits_give(likely, temperature, most):
    """Whichever id it begins with: one that is, or is not, probable, or cannot stand there at all. 1e-4 as above."""
    automata = [free_automaton(random_classes(5001, 30, seed, most), seed, states=5) for seed in range(2)]
    hidden, head = case(vocab_size=5001, rows=(2, 63))
    current = torch.randint(5001, (2, 63), generator=torch.Generator().manual_seed(0))
    chance = torch.rand((2, 63, CHANCES_WITH_CURRENT), generator=torch.Generator().manual_seed(1))
    given = {"left": 1, "current": current, "count": 60, "pad": 17, "chance": chance}
    two, _ = predict(hidden, head, temperature, automata, at_once=False, **given)
    ids = {"none": None, "best": two.argmax, "any": current}[likely]
    got, _ = predict(hidden, head, temperature, automata, at_once=True, likely=ids, **given)
    assert all(torch.equal(getattr(got, name), getattr(two, name)) for name in TOKENS)  # drawn from the same sums
    whole, _ = predict_dense(hidden, head, temperature, automata, at_once=True, **given)
    close = 1e-4 if temperature > 0.1 else 2e-3
    for expected in (two, whole):
        for name in FIELDS:
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=close, rtol=1e-4, msg=name)


def test_a_first_walk_mixes_little_once_a_canvas_is_nearly_certain(monkeypatch):
    """One segment of each position, where the last step's ids are known; the others weigh less than 2^-34 beside them."""
    mixed, usual = [], GroupWalk.mix

    def counting(walk, soft, rows, weights, piece):
        mixed.append(len(weights))
        usual(walk, soft, rows, weights, piece)

    monkeypatch.setattr(GroupWalk, "mix", counting)
    automaton = free_automaton(random_classes(5001, 30), states=5)
    hidden, head = case(vocab_size=5001, rows=(1, 63))
    drawn, _ = predict(hidden, head, 1.0, [automaton], left=1, at_once=False)
    certain = head.weight[drawn.sample] * 2
    assert sum(mixed) > 2 * 63
    last, _ = predict(certain, head, 0.1, [automaton], left=1, at_once=False)
    mixed.clear()
    got, _ = predict(certain, head, 0.1, [automaton], left=1, at_once=True, likely=last.argmax, piece=100)
    assert sum(mixed) <= 2 * 63
    torch.testing.assert_close(got.soft_embeds, last.soft_embeds, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("piece", [None, 1, 100])
@pytest.mark.parametrize("most", [0.6, 0.001])
def test_candidates_are_the_most_probable_ids_that_can_stand_there(piece, most):
    """In few classes and in many; what weighs nothing may be left out of the walk, and is no candidate then."""
    automata = [free_automaton(random_classes(701, 30, seed, most), seed) for seed in range(2)]
    hidden, head = case(vocab_size=701, rows=(2, 9))
    given = {"count": 7, "left": 3, "wanted": Wanted(candidates=5), "pad": 6, "chance": None}
    got, _ = predict(hidden, head, 0.6, automata, piece=piece, **given)
    expected, _ = predict_dense(hidden, head, 0.6, automata, **given)
    assert got.candidates.shape == expected.candidates.shape == (2, 9, 5)
    heavy = expected.candidate_log_probs > -20
    assert torch.equal(got.candidates[heavy], expected.candidates[heavy]) and int(heavy[:, :7].sum()) > 30
    torch.testing.assert_close(got.candidate_log_probs[heavy], expected.candidate_log_probs[heavy], atol=1e-4, rtol=1e-4)
    assert bool((got.candidate_log_probs[~heavy] < -19).all()) and bool((got.candidates[:, 7:, 0] == 6).all())
    assert bool((got.candidate_log_probs[:, 7:, 0] == 0).all())
    for row, automaton in enumerate(automata):
        assert bool((automaton.classes[got.candidates[row, :7]] > 0)[heavy[row, :7]].all())
    more, _ = predict(hidden, head, 0.6, automata, **{**given, "wanted": Wanted(candidates=900)})
    assert more.candidates.shape == (2, 9, 701)


def test_walks_in_bf16_are_close_to_whole_logits():
    """2e-2 is what bf16's 8 bits leave of a soft embedding of this size."""
    automata = [free_automaton(random_classes(5001, 30, seed), seed) for seed in range(2)]
    hidden, head = case(vocab_size=5001, rows=(2, 63), dtype=torch.bfloat16)
    got, _ = predict(hidden, head, 0.8, automata, chance=None)
    expected, _ = predict_dense(hidden, head, 0.8, automata)
    assert got.soft_embeds.dtype == torch.bfloat16 and torch.equal(got.argmax, expected.argmax)
    torch.testing.assert_close(got.entropy, expected.entropy, atol=2e-3, rtol=1e-3)
    soft = expected.soft_embeds.float()
    torch.testing.assert_close(got.soft_embeds.float(), soft, atol=2e-2 * float(soft.abs().max()), rtol=0)


def test_walks_under_autocast_are_those_in_bf16():
    automaton = free_automaton(random_classes(1001, 30))
    hidden, head = case(vocab_size=1001, rows=(1, 31))
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = predict(hidden, head, 0.8, [automaton], left=1)
    expected, _ = predict(hidden.bfloat16(), head._replace(weight=head.weight.bfloat16()), 0.8, [automaton], left=1)
    assert torch.equal(got.sample, expected.sample) and got.soft_embeds.dtype == torch.float32
    torch.testing.assert_close(got.entropy, expected.entropy, atol=1e-5, rtol=0)


def test_walks_take_a_temperature_that_is_a_tensor_and_float64():
    automaton = free_automaton(random_classes(1001, 30))
    hidden, head = case(vocab_size=1001, rows=(1, 31), dtype=torch.float64)
    got, _ = predict(hidden, head, torch.tensor(0.8), [automaton], left=1)
    expected, _ = predict(hidden, head, 0.8, [automaton], left=1)
    assert got.soft_embeds.dtype == torch.float64
    for name in ("sample", "argmax", "entropy", "soft_embeds"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


def test_drawn_ids_lie_in_drawn_classes_and_lead_where_the_lattice_says():
    automata = [free_automaton(random_classes(5001, 30, seed), seed) for seed in range(2)]
    hidden, head = case(vocab_size=5001, rows=(2, 63))
    got, solution = predict(hidden, head, 1.0, automata, left=1)
    for row, automaton in enumerate(automata):
        for ids, kinds, end in ((got.sample, solution.sample, solution.sample_state), (got.argmax, solution.best, solution.best_state)):
            assert torch.equal(automaton.classes[ids[row]], kinds[row])
            assert automaton.run(ids[row].tolist()) == int(end[row])


def test_positions_that_do_not_count_are_padding():
    automaton = free_automaton(random_classes(100, 5))
    hidden, head = case(vocab_size=100, rows=(1, 9))
    current = torch.tensor([[3] * 7 + [11, 12]])
    got, solution = predict(hidden, head, 1.0, [automaton], left=1, count=7, pad=11, current=current)
    assert solution.posterior.shape[1] == 7
    behind = slice(7, None)
    assert got.sample[0, behind].tolist() == got.argmax[0, behind].tolist() == got.other[0, behind].tolist() == [11, 11]
    assert got.entropy[0, behind].tolist() == got.log_probs[0, behind].tolist() == [0, 0]
    assert got.current_log_probs[0, behind].tolist() == [0, -math.inf]
    torch.testing.assert_close(got.soft_embeds[0, behind], (head.weight[11] * head.embed_scale).expand(2, -1))


@pytest.mark.parametrize(
    "filters",
    [
        Filters(allowed=torch.arange(1001) % 3 > 0),
        Filters(allowed=torch.stack((torch.arange(1001) % 3 > 0, torch.arange(1001) % 5 > 0))),
        Filters(hidden=torch.tensor([0, 5, 1000]), hidden_before=4),
        Filters(allowed_ids=torch.tensor([[[-1] * 300] * 5 + [list(range(300))] * 4] * 2)),
        Filters(top_k=400),
        Filters(top_p=0.999),
        Filters(min_p=1e-5),
        Filters(allowed=torch.arange(1001) % 3 > 0, top_k=600, top_p=0.9999),
    ],
    ids=["allowed", "allowed by row", "hidden", "allowed ids", "top k", "top p", "min p", "all"],
)
def test_filters_narrow_the_distribution_first(filters):
    """The lower temperature leaves out most segments in the second walk, and a threshold would leave no canvas; 2e-4 is a last bit of
    its logits."""
    automata = [free_automaton(random_classes(1001, 6, seed), seed) for seed in range(2)]
    hidden, head = case(vocab_size=1001, rows=(2, 9))
    current = torch.randint(1001, (2, 9), generator=torch.Generator().manual_seed(0))
    for temperature in (1.0,) if filters.need_threshold() else (1.0, 0.2):
        got, _ = predict(hidden, head, temperature, automata, left=1, chance=None, filters=filters, piece=100, current=current)
        expected, solution = predict_dense(hidden, head, temperature, automata, left=1, filters=filters, current=current)
        assert bool((solution.log_partition > -math.inf).all())
        for name in ("argmax", "other", "bad"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name
        for name in ("entropy", "log_probs", "current_log_probs", "soft_embeds"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=2e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("filters", [Filters(top_k=1), Filters(min_p=1.0), Filters(top_p=0.0)], ids=["top k", "min p", "top p"])
def test_a_constraint_outranks_filters_that_leave_no_canvas(filters):
    """The first row's language is of ids that are never the most probable; of the second all strings are accepted."""
    hidden, head = case(vocab_size=101, rows=(2, 5))
    best = whole_logits(hidden, head, 1.0)[0].argmax(dim=-1)
    classes = torch.ones(101, dtype=torch.int64).index_fill(0, best, 0)
    loop = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.tensor([True])
    automata = [make_automaton(classes, *loop), make_automaton(torch.ones_like(classes), *loop)]
    got, _ = predict(hidden, head, 1.0, automata, filters=filters)
    free, _ = predict(hidden, head, 1.0, automata)
    assert not bool(got.bad.any())
    for name in ("sample", "argmax", "entropy", "soft_embeds"):
        assert torch.equal(getattr(got, name)[0], getattr(free, name)[0]), name
    assert torch.equal(got.sample[1], whole_logits(hidden, head, 1.0)[1].argmax(dim=-1)) and float(got.entropy[1].max()) < 1e-6


def test_bans_are_never_lifted():
    """The only id of the language may not be predicted: the row is bad, its neighbour is not."""
    hidden, head = case(vocab_size=50, rows=(2, 3))
    loop = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.tensor([True])
    automata = [make_automaton((torch.arange(50) == place).long(), *loop) for place in (7, 8)]
    got, _ = predict(hidden, head, 1.0, automata, filters=Filters(allowed=torch.arange(50) != 7, top_k=5))
    assert got.bad.tolist() == [True, False] and got.sample[1].tolist() == [8] * 3


def test_a_row_of_nan_is_bad_and_its_neighbour_is_not():
    automaton = free_automaton(random_classes(100, 5))
    hidden, head = case(vocab_size=100, rows=(2, 4))
    hidden[0, 3] = math.nan
    for count in (4, 3):
        assert predict(hidden, head, 1.0, [automaton] * 2, left=1, count=count)[0].bad.tolist() == [True, False]


def test_a_row_does_not_depend_on_its_neighbours():
    automata = [free_automaton(random_classes(300, 5, seed), seed) for seed in range(3)]
    hidden, head = case(vocab_size=300, rows=(3, 9))
    draws = RowDraws((1, 2, 3), 0, 0)
    whole, _ = predict(hidden, head, 1.0, automata, left=1, chance=draws.uniforms((3, 9, CHANCES), CPU))
    only = torch.tensor([1])
    chance = draws.select(only).uniforms((1, 9, CHANCES), CPU)
    alone, _ = predict(hidden[only], head, 1.0, [automata[1]], left=1, chance=chance)
    for name in ("sample", "argmax", "entropy", "log_probs", "soft_embeds"):
        assert torch.equal(getattr(whole, name)[only], getattr(alone, name)), name


def test_rows_of_one_language_computed_together_equal_those_computed_alone(monkeypatch):
    """As on a GPU, where rows are not counted either; 1e-5: products of another shape."""
    first, second = (free_automaton(random_classes(300, 5, seed), seed) for seed in range(2))
    hidden, head = case(vocab_size=300, rows=(3, 9))
    current = torch.randint(300, (3, 9), generator=torch.Generator().manual_seed(0))
    alone, _ = predict(hidden, head, 1.0, [first, second, first], left=1, current=current)
    for name in ("generation.vocabulary.classes.counts_rows", "generation.vocabulary.segments.counts_rows"):
        monkeypatch.setattr(name, lambda device: False)
    together, _ = predict(hidden, head, 1.0, [first, second, first], left=1, current=current)
    for name in ("sample", "argmax", "other"):
        assert torch.equal(getattr(alone, name), getattr(together, name)), name
    for name in ("entropy", "log_probs", "current_log_probs", "soft_embeds"):
        torch.testing.assert_close(getattr(alone, name), getattr(together, name), atol=1e-5, rtol=1e-5, msg=name)


def test_a_peaked_canvas_reads_little_of_the_vocabulary_twice():
    automaton = free_automaton(torch.ones(20_000, dtype=torch.int64))
    hidden, head = case(vocab_size=20_000, rows=(1, 3), spread=40.0)
    read = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation is torch.ops.aten.index_select.out and args[0].shape == head.weight.shape:
                read.append(len(args[2]))
            return operation(*args, **(kwargs or {}))

    with Counting():
        got, _ = predict(hidden, head, 0.3, [automaton], left=1, chance=None)
    expected, _ = predict_dense(hidden, head, 0.3, [automaton], left=1)
    assert 20_000 <= sum(read) < 30_000
    torch.testing.assert_close(got.soft_embeds, expected.soft_embeds, atol=1e-4, rtol=1e-4)


def test_a_count_beyond_the_canvas_is_refused():
    automaton = free_automaton(random_classes(100, 5))
    hidden, head = case(vocab_size=100, rows=(1, 4))
    with pytest.raises(ValueError, match="`count` is 5; expected 1 to 4"):
        predict(hidden, head, 1.0, [automaton], count=5)


def test_a_row_without_any_class_is_refused():
    with pytest.raises(ValueError, match="`classes` of row 1 has no id of a class above 0"):
        make_orders([torch.ones(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)], CPU)
