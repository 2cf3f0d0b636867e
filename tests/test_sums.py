"""The Triton kernel of a piece against its PyTorch reference, on the CPU through Triton's interpreter."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_vocabulary import CAP, case

from generation.fast.proofs import verdict
from generation.rules.draws import BatchDraws
from generation.vocabulary import kernel
from generation.vocabulary import walk as vocabulary
from generation.vocabulary.filters import Filters
from generation.vocabulary.kernel import absorb_triton, choose_absorb
from generation.vocabulary.sums import MASKED, Running, Shape, Workspace, absorb, make_workspace, start_running
from generation.vocabulary.walk import streamed_prediction

ROOT = Path(__file__).parent.parent
interpreted = kernel.triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not interpreted, reason="triton is not installed, or runs on a GPU (tests/test_gpu.py)")


@pytest.fixture
def small_tile(monkeypatch):
    """The interpreter takes milliseconds an operation, whatever its width; 64 ids a tile make one piece several."""
    monkeypatch.setattr(kernel, "TILE", 64)
    monkeypatch.setattr(vocabulary, "TILE", 64)


def seeded():
    return BatchDraws(torch.Generator().manual_seed(3))


def by_kernel(monkeypatch):
    monkeypatch.setattr(vocabulary, "choose_absorb", lambda *case: absorb_triton)


def workspace_of(products, for_kernel=True) -> Workspace:
    workspace = make_workspace(*products.shape, products.dtype, products.device, for_kernel)
    workspace.products.copy_(products)
    return workspace


def compare(got, expected, tolerance):
    for name, value in expected._asdict().items():
        if name == "soft_embeds":
            continue
        if value is None:
            assert getattr(got, name) is None
        elif value.is_floating_point():
            torch.testing.assert_close(getattr(got, name), value, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(getattr(got, name), value), name


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("with_current", [False, True])
@pytest.mark.parametrize("filters", [None, Filters(hidden=torch.tensor([3, 77]), hidden_before=1), Filters(top_k=9, top_p=0.8)])
def test_kernel_equals_its_reference(dtype, greedy, with_current, filters, monkeypatch, small_tile):
    """Vocabulary of 141, tiles of 64 and 13 ids at the end. Pieces of one tile draw the same numbers, so samples are the same too.

    1e-4 nats: the kernel's tanh is made of exponentials, and its sums run in another order.
    """
    hidden, head = case(vocab_size=141, size=11, rows=(2, 2), dtype=dtype)
    current = torch.tensor([[0, 140], [64, 70]]) if with_current else None
    expected = streamed_prediction(hidden, head, 0.7, seeded(), greedy, current, filters, piece=64)
    soft = expected.soft_embeds
    by_kernel(monkeypatch)
    got = streamed_prediction(hidden, head, 0.7, seeded(), greedy, current, filters, piece=64)
    got_soft = got.soft_embeds
    compare(got, expected, 1e-4)
    assert got_soft.dtype == dtype
    torch.testing.assert_close(got_soft, soft, atol=1e-4 if dtype == torch.float32 else 0.05, rtol=1e-4 if dtype == torch.float32 else 0.02)


@needs_triton
def test_pieces_of_several_tiles_give_the_same_sums(monkeypatch, small_tile):
    hidden, head = case(vocab_size=500, rows=(1, 3))
    current = torch.tensor([[499, 0, 250]])
    expected = streamed_prediction(hidden, head, torch.tensor(0.9), seeded(), True, current, piece=192)
    soft = expected.soft_embeds
    by_kernel(monkeypatch)
    got = streamed_prediction(hidden, head, torch.tensor(0.9), seeded(), True, current, piece=192)
    got_soft = got.soft_embeds
    compare(got, expected, 1e-4)
    torch.testing.assert_close(got_soft, soft, atol=1e-4, rtol=1e-4)
    sampled = streamed_prediction(hidden, head, 0.9, seeded(), False, current, piece=192)
    torch.testing.assert_close(sampled.entropy, streamed_prediction(hidden, head, 0.9, seeded()).entropy, atol=1e-4, rtol=0)


@needs_triton
def test_the_kernels_default_piece_is_made_of_tiles(monkeypatch, small_tile):
    """150 ids a piece at 4 positions: two tiles of 64. A piece that is no multiple is refused."""
    monkeypatch.setattr(vocabulary, "NUMBERS", 600)
    hidden, head = case(vocab_size=141, rows=(2, 2))
    expected = streamed_prediction(hidden, head, 0.7, seeded(), piece=64)
    by_kernel(monkeypatch)
    got = streamed_prediction(hidden, head, 0.7, seeded())
    compare(got, expected, 1e-4)
    with pytest.raises(ValueError, match="`piece` is 100; expected a multiple of 64"):
        streamed_prediction(hidden, head, 0.7, seeded(), piece=100)


@needs_triton
def test_kernel_reports_nan_and_no_id_left(monkeypatch, small_tile):
    hidden, head = case(vocab_size=100, rows=(3, 1))
    hidden[0, 0, 3] = float("nan")
    allowed = torch.ones(3, 100, dtype=torch.bool)
    allowed[2] = False
    by_kernel(monkeypatch)
    got = streamed_prediction(hidden, head, 1.0, seeded(), filters=Filters(allowed=allowed), piece=64)
    assert got.bad.tolist() == [True, False, True]


@needs_triton
def test_kernel_samples_follow_the_distribution(monkeypatch):
    """Chi-square over 4 ids in 2 tiles, and over the 3 that are not the current one; 120 draws, the interpreter is slow. 16.3 and 13.8
    are the 0.999 quantiles of 3 and 2 degrees of freedom."""
    monkeypatch.setattr(kernel, "TILE", 2)
    products = torch.tensor([0.3, -0.7, 1.1, 0.0])
    chance = torch.rand((120, 2, 4), generator=torch.Generator().manual_seed(5))
    first = start_running(120, products.device, torch.full((120,), 2))
    state, _, _ = absorb_triton(first, workspace_of(products.repeat(120, 1)), 0, Shape(CAP, 0.8), None, chance)
    logits = torch.tanh(products / CAP) * CAP / 0.8
    for drawn, left, quantile in ((state.sample, [0, 1, 2, 3], 16.3), (state.other, [0, 1, 3], 13.8)):
        expected, counts = logits[left].softmax(-1) * 120, torch.bincount(drawn, minlength=4)
        assert int(counts[left].sum()) == 120
        assert float(((counts[left] - expected) ** 2 / expected).sum()) < quantile


COMPILE = """
import triton
from generation.vocabulary.kernel import MASKED, TILE, WARPS, _absorb_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for chosen in ((), ("filtered", "with_current"), ("filtered", "greedy", "with_current")):
    options = {name: name in chosen for name in ("filtered", "greedy", "with_current")}
    constants = {"masked": MASKED, "tile": TILE, **options}
    types = {"products": "*bf16", "exponentials": "*bf16", "kept": "*u8", "squeeze": "fp32", "argmax_at": "*i64", "sample_at": "*i64"}
    types |= {name: "i32" for name in ("kept_stride", "start", "width", "tiles")} | {name: "constexpr" for name in constants}
    types |= {name: "*i64" for name in ("current_at", "other_at")} if options["with_current"] else {}
    signature = {name: types.get(name, "*fp32") for name in _absorb_kernel.arg_names}
    source = ASTSource(fn=_absorb_kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    print(len(compiled.asm["cubin"]), compiled.metadata.shared)
"""


@pytest.mark.skipif(kernel.triton is None, reason="triton is not installed")
def test_kernel_compiles_for_a_hopper_gpu(tmp_path):
    """The interpreter lets types pass that the compiler refuses. Triton compiles without a GPU, but not while it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    sizes = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    assert len(sizes) == 3 and all(binary > 10_000 and shared < 48 * 1024 for binary, shared in sizes)


@pytest.mark.parametrize("chosen", [absorb, pytest.param(absorb_triton, marks=needs_triton)])
def test_a_piece_without_any_id_left_changes_nothing_but_scale(chosen, monkeypatch):
    monkeypatch.setattr(kernel, "TILE", 4)
    products, none = torch.tensor([[1.0, 2.0, 0.5]]), torch.zeros(1, 3, dtype=torch.bool)
    for order in ((None, none), (none, None)):
        state = start_running(1, products.device, torch.tensor([1]))
        for number, kept in enumerate(order):
            chance = torch.full((1, 1, 4), 0.999999)
            state, _, _ = chosen(state, workspace_of(products, chosen is absorb_triton), 3 * number, Shape(CAP, 1.0), kept, chance)
        logits = torch.tanh(products / CAP) * CAP
        torch.testing.assert_close(state.top, (logits.amax(dim=-1) + CAP) / math.log(2))  # in bits
        torch.testing.assert_close(state.mass, (logits - logits.amax()).exp().sum(dim=-1))
        real = range(3) if order[0] is None else range(3, 6)
        assert int(state.argmax) in real and int(state.sample) in real and int(state.other) in real
        assert (float(state.current_bits) > MASKED / 2) == (order[0] is None)


def test_the_pass_waits_for_no_device():
    """Tensors of the meta device have no values: whatever needs one on the host (`item`, `nonzero`, a branch) raises."""
    hidden, head = case(vocab_size=300)
    hidden, head = hidden.to("meta"), head._replace(weight=head.weight.to("meta"), embed_scale=head.embed_scale.to("meta"))
    current = torch.zeros((2, 9), dtype=torch.int64, device="meta")
    allowed, hidden_ids = torch.ones(2, 300, dtype=torch.bool, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    filters = Filters(allowed, allowed_ids=current[..., None], hidden=hidden_ids, hidden_before=4, top_k=9, top_p=0.9, min_p=0.1)
    for given in (None, filters):
        got = streamed_prediction(hidden, head, 0.5, BatchDraws(), False, current, given, piece=128)
        soft = got.soft_embeds
        assert got.sample.shape == got.bad.shape + (9,) and soft.shape == hidden.shape


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The kernel is wanted, as on CUDA; what was proven before is forgotten."""
    monkeypatch.setattr(kernel, "has_kernels", lambda device: True)
    verdict.cache_clear()
    yield
    verdict.cache_clear()


def test_the_kernel_is_chosen_on_cuda_alone(told):
    assert choose_absorb(torch.device("cpu"), torch.float32, *[False] * 4) is absorb and not told


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=4)))
def test_the_kernel_proves_itself_for_all_options(on_a_gpu, told, small_tile, dtype, given):
    assert choose_absorb(torch.device("cpu"), dtype, *given) is absorb_triton and not told


def test_what_prevents_the_kernel_is_told(on_a_gpu, told, monkeypatch):
    assert choose_absorb(torch.device("cpu"), torch.float64, *[False] * 4) is absorb
    monkeypatch.setattr(kernel, "triton", None)
    assert choose_absorb(torch.device("cpu"), torch.float32, *[False] * 4) is absorb
    assert "`triton` is not installed" in told[-1] and "runs in plain PyTorch" in told[-1]


FAULTS = ["raises", *Running._fields[:5], *Running._fields[6:], "exponentials", "shrink"]


@needs_triton
@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_raises_or_lies_is_not_used(on_a_gpu, told, small_tile, monkeypatch, fault):
    """Whichever of its results is another at one position: `streamed_prediction` then gives what the reference gives."""

    def faulty(running_sums, workspace, start, *args):
        if fault == "raises":
            raise TritonError("no such instruction")
        state, exponentials, shrink = absorb_triton(running_sums, workspace, start, *args)
        wrong = {"exponentials": exponentials, "shrink": shrink}.get(fault, getattr(state, fault, None))
        if wrong is not None and start > 0:
            wrong[1] += 1
        return state, exponentials, shrink

    class TritonError(Exception):
        pass

    monkeypatch.setattr(kernel, "absorb_triton", faulty)
    greedy = fault == "other_top"  # which only the most probable tokens need
    hidden, head = case(vocab_size=144, rows=(2, 2))
    current = torch.tensor([[0, 140], [64, 70]])
    got = streamed_prediction(hidden, head, 0.7, seeded(), greedy, current, piece=64)
    soft = got.soft_embeds
    monkeypatch.setattr(kernel, "has_kernels", lambda device: False)
    expected = streamed_prediction(hidden, head, 0.7, seeded(), greedy, current, piece=64)
    expected_soft = expected.soft_embeds
    compare(got, expected, 0)
    assert torch.equal(soft, expected_soft) and len(told) == 1 and "vocabulary kernel failed its proof on cpu" in told[0]
    assert ("TritonError: no such instruction" if fault == "raises" else "numbers in value") in told[0]


@pytest.mark.parametrize("greedy", [False, True])
def test_looking_up_no_row_changes_nothing(monkeypatch, greedy):
    """What a GPU computes for all rows, so that nothing is counted, gives what a CPU computes for some."""
    hidden, head = case(vocab_size=300)
    current = torch.arange(18).view(2, 9) * 16
    filters = Filters(hidden=torch.tensor([3, 77]), hidden_before=1, top_k=40, top_p=0.8, min_p=0.01)
    expected = streamed_prediction(hidden, head, 0.7, seeded(), greedy, current, filters, piece=64)
    soft = expected.soft_embeds
    monkeypatch.setattr("generation.vocabulary.sums.counts_rows", lambda device: False)
    monkeypatch.setattr("generation.vocabulary.filters.counts_rows", lambda device: False)
    got = streamed_prediction(hidden, head, 0.7, seeded(), greedy, current, filters, piece=64)
    got_soft = got.soft_embeds
    compare(got, expected, 0)
    assert torch.equal(got_soft, soft)
