"""Fast paths proven before use: what raises or lies is not used, once, with one warning; on a CPU, by paths made to do so."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from tiny import CPU_HAS_SCALED_PRODUCT, needs_scaled_product
from torch._subclasses.fake_tensor import FakeTensorMode

from generation.call.plan import reads_late
from generation.constraints.lattice_kernel import LATTICE_KERNEL
from generation.fast import flags, proofs
from generation.fast.flags import LATE_FLAGS
from generation.fast.proofs import WITHOUT, FastPath, UnusableDevice, difference, verdict, works
from generation.fast.recording import RECORDED_STEP
from generation.vocabulary.kernel import KERNEL
from modeling_diffusiongemma.console.device_report import PATHS
from modeling_diffusiongemma.layers import attention, caches, experts
from modeling_diffusiongemma.layers.attention import SHARED_KEYS
from modeling_diffusiongemma.layers.experts import GROUPED_EXPERTS, choose_experts, has_grouped_products
from modeling_diffusiongemma.weights import fp8_math
from modeling_diffusiongemma.weights.fp8_math import (
    SCALED,
    SCALED_GROUPED,
    dequantized_grouped_product,
    fp8_grouped_product,
    quantize_weight,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


pytestmark = pytest.mark.usefixtures("nothing_proven")


def needs_interpreter() -> str | None:
    return KERNEL.missing(CPU, torch.float32)


def path(prove, missing=lambda device, *case: None, **kwargs) -> FastPath:
    return FastPath("quick sum", "sums are slow", missing, prove, **kwargs)


class Strange(Exception):
    """As a compiler of kernels raises: of no kind that anybody knows."""


def raising(error):
    def prove(device, *case):
        raise error

    return prove


def test_a_path_that_works_is_proven_once_for_each_case(told):
    calls = []

    def prove(device, *case):
        calls.append(case)
        return torch.ones(2, device=device), torch.ones(2)

    quick = path(prove)
    assert all(works(quick, CPU, case) for case in (torch.float32, torch.bfloat16) * 3)
    assert calls == [(torch.float32,), (torch.bfloat16,)] and told == []


@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), Strange("no\n  such instruction"), AssertionError(), KeyError("ptx")])
def test_a_path_that_raises_is_not_used_and_the_error_is_told(told, error):
    quick = path(raising(error))
    assert not works(quick, CPU) and not works(quick, CPU)
    assert set(told) == {f"The quick sum failed its proof on cpu: {proofs.one_line(error)}. Instead, sums are slow."}
    assert type(error).__name__ in told[0] and "\n" not in told[0]


def test_a_path_that_lies_is_not_used_and_the_difference_is_told(told):
    lying = path(lambda device: (torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])), tolerance=0.1)
    assert not works(lying, CPU)
    assert told == [
        "The quick sum failed its proof on cpu: 1 of 2 numbers in value 0 are others, the first 2.5, expected 2.0. Instead, sums are slow."
    ]
    assert works(dataclasses.replace(lying, tolerance=0.25), CPU)


def test_a_path_that_is_not_for_the_device_or_not_wanted_is_not_run(told, monkeypatch):
    here = path(raising(Strange()), missing=lambda device, *case: f"it is not for {device}")
    assert not works(here, CPU) and told == ["The quick sum is not used on cpu: it is not for cpu. Instead, sums are slow."]
    monkeypatch.setenv(WITHOUT, "late flags, quick sum")
    assert not works(path(raising(Strange())), CPU) and f"{WITHOUT} names it" in told[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device that answers nothing")
def test_a_device_that_is_broken_is_said_to_be(told):
    with pytest.raises(UnusableDevice, match=rf"quick sum broke cuda:0 \(Strange: illegal memory access\).*{WITHOUT}='quick sum'"):
        works(path(raising(Strange("illegal memory access"))), CUDA)
    assert told == []


def test_no_room_left_is_nobodys_fault():
    """It says nothing of the path, so it is not kept."""
    errors = [torch.OutOfMemoryError("no room")]

    def prove(device):
        if errors:
            raise errors.pop()
        return 1, 1

    quick = path(prove)
    with pytest.raises(torch.OutOfMemoryError):
        works(quick, CPU)
    assert works(quick, CPU)


def test_nothing_is_proven_while_a_graph_is_captured(told, monkeypatch):
    quick = path(lambda device: (1, 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not works(quick, CUDA) and "before a graph was captured" in told[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert works(quick, CUDA)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert works(quick, CUDA) and len(told) == 1


def test_a_proof_sees_numbers_whoever_traces_around_it():
    has_values = path(lambda device: (torch.ones(3, device=device).sum().item(), 3.0))
    with FakeTensorMode():
        assert works(has_values, CPU)
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        assert has_grouped_products(CPU, torch.float32, 24, 16)
    verdict.cache_clear()

    @functools.partial(torch.compile, backend="eager", fullgraph=True)
    def layer(inputs):
        return inputs * 2 if has_grouped_products(inputs.device, inputs.dtype, 24, 16) else inputs

    assert torch.equal(layer(torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize(
    ("got", "expected", "tolerance", "differs"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 2]), 0, False),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), 1, True),
        (torch.tensor([True]), torch.tensor([False]), 1, True),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), 0, False),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0]), 9, True),
        (torch.tensor([float("inf")]), torch.tensor([float("inf")]), 0, False),
        (torch.tensor([1e-4, 100.0]), torch.tensor([0.0, 100.0]), 1e-5, False),
        (torch.tensor([1.0]).bfloat16(), torch.tensor([1.001]), 1e-2, False),
        (torch.ones(2), torch.ones(3), 1, True),
        ((torch.ones(1), None), (torch.ones(1), None), 0, False),
        ((torch.ones(1), None), (torch.ones(1), torch.ones(1)), 0, True),
        (torch.empty(0), torch.empty(0), 0, False),
    ],
)
def test_difference(got, expected, tolerance, differs):
    assert (difference(got, expected, tolerance) is not None) == differs


@pytest.mark.parametrize("one", PATHS, ids=lambda one: one.name)
def test_a_proof_draws_from_nobodys_generator(one):
    """Whatever the device allows; on a CPU the rest raises early."""
    before = torch.get_rng_state()
    for case in one.cases:
        try:
            one.prove(CPU, *case)
        except (NotImplementedError, RuntimeError, AssertionError):
            pass
    assert torch.equal(before, torch.get_rng_state())


def test_proofs_hold_whatever_the_default_dtype_is(monkeypatch):
    """As `from_pretrained` may have set it."""
    interpreted = [KERNEL, LATTICE_KERNEL] if needs_interpreter() is None else []
    scaled = [SCALED] if CPU_HAS_SCALED_PRODUCT else []
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            verdict.cache_clear()
            for one in (*interpreted, RECORDED_STEP, LATE_FLAGS, SHARED_KEYS, GROUPED_EXPERTS, *scaled):
                assert all(difference(*one.prove(CPU, *case), one.tolerance) is None for case in one.cases), one.name
    finally:
        torch.set_default_dtype(before)


def test_names_of_paths_differ_and_can_be_listed():
    names = [one.name for one in PATHS]
    assert len(set(names)) == len(names) and not any("," in name for name in names)
    assert all(KERNEL.missing(CPU, *case) != "" for case in KERNEL.cases)


def test_flags_that_are_not_there_in_time_are_found(monkeypatch):
    assert difference(*LATE_FLAGS.prove(CPU)) is None
    monkeypatch.setattr(flags, "send", lambda sent: (torch.zeros_like(sent), None))
    assert difference(*LATE_FLAGS.prove(CPU)) is not None
    assert not reads_late(CPU)


def fp8_case():
    values = torch.Generator().manual_seed(0)
    weight = quantize_weight(torch.randn(3, 48, 64, generator=values))
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    return torch.randn(5, 64, generator=values), torch.arange(5), weight, ends


@needs_scaled_product
def test_of_two_scaled_products_the_one_that_fails_alone_is_replaced(told, monkeypatch):
    """A CPU has the plain one and not the grouped one: as a GPU of which torch supports one of them."""
    inputs, rows, weight, ends = fp8_case()
    expected = fp8_grouped_product(inputs, rows, *weight, ends)
    monkeypatch.setattr(fp8_math, "_missing_units", lambda device: None)
    cpu_has = [dataclasses.replace(one, missing=lambda device: None) for one in (SCALED, SCALED_GROUPED)]
    monkeypatch.setattr(fp8_math, "SCALED", cpu_has[0])
    monkeypatch.setattr(fp8_math, "SCALED_GROUPED", cpu_has[1])
    assert fp8_math.has_scaled_products(CPU, 48, 64) and told == []
    assert torch.equal(fp8_grouped_product(inputs, rows, *weight, ends), expected)
    assert len(told) == 1 and "scaled grouped FP8 product failed its proof on cpu: NotImplementedError" in told[0]


@pytest.mark.parametrize("fault", ["scale forgotten", "transposed"])
def test_a_scaled_product_that_lies_is_not_used(told, monkeypatch, fault):
    def product(quantized, input_scale, weight, scale):
        scale = torch.ones_like(scale) if fault == "scale forgotten" else scale.flip(0)
        return fp8_math.dequantized_product(quantized, input_scale, weight, scale, torch.float32)

    monkeypatch.setattr(fp8_math, "scaled_product", product)
    assert not works(dataclasses.replace(SCALED, missing=lambda device: None), CPU) and "numbers in value" in told[0]


def test_a_grouped_product_that_mixes_up_groups_is_not_used(told, monkeypatch):
    def product(quantized, input_scale, weight, scale, ends):
        return dequantized_grouped_product(quantized, input_scale, weight.roll(1, 0), scale.roll(1, 0), ends, torch.float32)

    monkeypatch.setattr(fp8_math, "scaled_grouped_product", product)
    assert not works(dataclasses.replace(SCALED_GROUPED, missing=lambda device: None), CPU) and "numbers in value" in told[0]


def test_experts_go_one_by_one_where_grouped_products_fail(told, monkeypatch):
    """As on a GPU too old for them; `xpu` stands for any device but a CPU, and nothing is put there."""
    assert has_grouped_products(CPU, torch.bfloat16, 64, 48)

    class Elsewhere:
        device, dtype = torch.device("xpu"), torch.bfloat16

    module = SimpleNamespace(num_experts=8, hidden_dim=64, intermediate_dim=48, parameters=lambda: iter([Elsewhere]))
    monkeypatch.setattr(experts, "has_grouped_products", lambda device, *case: works(GROUPED_EXPERTS, CPU, *case))
    assert choose_experts(module) == "grouped_mm" and told == []
    verdict.cache_clear()
    monkeypatch.setitem(experts.ALL_EXPERTS_FUNCTIONS, "grouped_mm", raising(RuntimeError("needs compute capability 8.0")))
    assert choose_experts(module) == "eager" and "needs compute capability 8.0" in told[0]


def test_attention_that_mixes_up_the_shared_keys_is_not_used(told, monkeypatch):
    assert attention.shares_keys(CPU, torch.float32, 16)
    verdict.cache_clear()
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda query, *a, **k: real(query.flip(1), *a, **k))
    assert not attention.shares_keys(CPU, torch.float32, 16) and "laid one behind another" in told[0]


def test_the_proof_of_an_offloaded_cache_reads_what_was_written(monkeypatch):
    """Without the offloading, which needs a GPU; and it finds a layer that is not there yet."""
    for name in ("StaticCache", "DynamicCache"):
        kind = getattr(caches, name)
        monkeypatch.setattr(caches, name, lambda offloading, kind=kind, **kwargs: kind(**kwargs))
    monkeypatch.setattr(caches, "_await_streams", lambda cache, layer: None)
    assert difference(*caches.OFFLOADED_CACHE.prove(CPU)) is None
    monkeypatch.setattr(caches, "_await_streams", lambda cache, layer: layer.keys[:, :, 256:].zero_())
    assert difference(*caches.OFFLOADED_CACHE.prove(CPU)) is not None
