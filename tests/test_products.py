"""The two products with the head, by `torch.mm` and by oneDNN."""

import pytest
import torch
from test_vocabulary import case

from generation.fast.proofs import difference
from generation.rules.draws import BatchDraws
from generation.vocabulary import products
from generation.vocabulary.products import ONEDNN, ONEDNN_PRODUCTS, PLAIN, choose_products, prefers_onednn
from generation.vocabulary.walk import streamed_prediction

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(ONEDNN_PRODUCTS.missing(CPU) is not None, reason="this torch carries no oneDNN")


pytestmark = pytest.mark.usefixtures("nothing_proven")


def on_a_cpu(monkeypatch, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)


@needs_onednn
@pytest.mark.parametrize(("positions", "size", "ids"), [(1, 24, 7), (63, 100, 999), (256, 88, 4096)])
def test_both_ways_give_the_same(positions, size, ids):
    """1e-5 of the largest: sums in another order. The head's rows lie apart, as in a slice of a wider matrix."""
    values = torch.Generator().manual_seed(0)
    rows, shares = torch.randn(positions, size, generator=values), torch.rand(positions, ids, generator=values)
    weight = torch.randn(ids, size + 3, generator=values)
    for part in (weight[:, :size], weight[:, :size].contiguous(), weight[:, :size].t().contiguous().t()):
        for squash in (False, True):
            got, expected = (
                (way.scores(rows, part, torch.empty(positions, ids), squash), way.mix(shares, part)) for way in (ONEDNN, PLAIN)
            )
            assert difference(got, expected, 1e-5) is None


@needs_onednn
def test_onednn_is_taken_in_float32_on_cpus_of_amd(monkeypatch):
    on_a_cpu(monkeypatch, "AMD EPYC")
    assert choose_products(CPU, torch.float32) is ONEDNN and choose_products(CPU, torch.bfloat16) is PLAIN
    with torch.backends.mkldnn.flags(enabled=False):
        assert choose_products(CPU, torch.float32) is PLAIN
    on_a_cpu(monkeypatch, "Intel Xeon")
    assert choose_products(CPU, torch.float32) is PLAIN


def test_a_torch_that_does_not_name_the_cpu_takes_mm(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not prefers_onednn(CPU) and not prefers_onednn(torch.device("cuda"))


@pytest.mark.parametrize("fault", ["lies", "raises"])
def test_a_onednn_that_fails_its_proof_is_not_used(monkeypatch, fault):
    told = []
    monkeypatch.setattr("generation.fast.proofs.logger.warning_once", told.append)
    on_a_cpu(monkeypatch, "Intel Xeon")
    hidden, head = case(vocab_size=300)
    expected = streamed_prediction(hidden, head, 0.7, BatchDraws(torch.Generator().manual_seed(0)))
    soft = expected.soft_embeds

    def onednn(left, right, squash=False):
        if fault == "raises":
            raise RuntimeError("could not create a primitive")
        return (left @ right.t()).bfloat16().float()

    monkeypatch.setattr(products, "onednn", onednn)
    on_a_cpu(monkeypatch, "AMD EPYC")
    got = streamed_prediction(hidden, head, 0.7, BatchDraws(torch.Generator().manual_seed(0)))
    got_soft = got.soft_embeds
    assert torch.equal(got.sample, expected.sample) and torch.equal(got_soft, soft)
    assert len(told) == 1 and "oneDNN products failed its proof on cpu" in told[0]
