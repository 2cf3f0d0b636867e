"""What needs a CUDA device; skipped without one. `make test-gpu` runs this file alone."""

import contextlib
import re

import pytest
import torch
from small_models import prompts, small_model, small_pair
from test_constraint_lattice import random_automaton
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

from generation import Choice, JsonSchema, Regex
from generation.constraints import lattice
from generation.constraints.lattice import make_lattice
from generation.constraints.lattice_kernel import follow_triton, messages_triton
from generation.constraints.scans import follow, messages
from generation.fast import recording
from generation.fast.proofs import verdict
from generation.rules.draws import BatchDraws
from generation.vocabulary import walk as vocabulary
from generation.vocabulary.filters import Filters
from generation.vocabulary.sums import absorb
from generation.vocabulary.walk import VocabularyHead, streamed_prediction
from modeling_diffusiongemma import default_checkpoint
from modeling_diffusiongemma.console.device_report import PATHS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize(("path", "case"), [pytest.param(path, case, id=f"{path.name} {case}") for path in PATHS for case in path.cases])
def test_every_fast_path_proves_itself_on_cuda(path, case):
    """What `diffusiongemma info --device` shows; run again, when everything is compiled, in well under a second."""
    device = torch.device("cuda", torch.cuda.current_device())
    found = verdict(path, device, *case)
    if not found.applies:
        pytest.skip(f"{path.name}: {found.detail}")
    assert found.works, found.detail
    assert verdict.__wrapped__(path, device, *case).seconds < 0.5


def test_logits_equal_those_of_transformers_on_cuda():
    oracle, ours = (model.cuda() for model in small_pair())
    ids, canvas = prompts(2, 21)[0].cuda(), prompts(2, 10, seed=1)[0].cuda()
    with torch.no_grad():
        expected, got = (model(input_ids=ids, decoder_input_ids=canvas).logits for model in (oracle, ours))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)  # tf32 may be on


def test_reference_tokens_equal_those_of_transformers_on_cuda():
    oracle, ours = (model.cuda() for model in small_pair())
    ids = prompts(2, 9)[0].cuda()
    settings = {"max_new_tokens": 10, "max_denoising_steps": 4}
    torch.manual_seed(0)
    expected = oracle.generate(ids, **settings).sequences
    torch.manual_seed(0)
    got = ours.generate(ids, backend="reference", **settings)
    assert torch.equal(got, expected[:, : got.shape[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_cache_equals_dynamic_cache_on_cuda(dtype):
    model = small_model().cuda().to(dtype)
    ids, canvas = prompts(2, 21)[0].cuda(), prompts(2, 10, seed=1)[0].cuda()
    with torch.no_grad():
        dynamic = model(input_ids=ids, decoder_input_ids=canvas).logits
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=30)
        static = model(input_ids=ids, decoder_input_ids=canvas, past_key_values=cache).logits
    torch.testing.assert_close(static, dynamic, atol=1e-3 if dtype == torch.float32 else 0.3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filters", [None, Filters(top_k=50, top_p=0.9)])
def test_vocabulary_kernel_equals_its_reference_on_cuda(dtype, filters, monkeypatch):
    """The same products on the same device, so that only the kernel differs: 141 positions, 20,000 ids, several tiles a piece."""
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn((20_000, 88), device="cuda", generator=generator).to(dtype)
    hidden = torch.randn((3, 47, 88), device="cuda", generator=generator).to(dtype)
    head, current = VocabularyHead(weight, 30.0, torch.tensor(88**0.5, dtype=dtype, device="cuda")), hidden[..., 0].long().abs()
    got = streamed_prediction(hidden, head, 0.7, BatchDraws(generator), False, current, filters)
    soft = got.soft_embeds
    monkeypatch.setattr(vocabulary, "choose_absorb", lambda *case: absorb)
    expected = streamed_prediction(hidden, head, 0.7, BatchDraws(generator), False, current, filters)
    expected_soft = expected.soft_embeds
    assert torch.equal(got.argmax, expected.argmax) and not bool((got.other == current).any())
    for name in ("entropy", "log_probs", "current_log_probs"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-3, rtol=0)
    scale = float(expected_soft.float().abs().max())
    torch.testing.assert_close(soft.float(), expected_soft.float(), atol=scale * (1e-4 if dtype == torch.float32 else 2e-2), rtol=0)


@pytest.mark.parametrize("chance", [False, True], ids=["best", "drawn"])
def test_lattice_kernel_equals_its_reference_on_cuda(chance, monkeypatch):
    """Rows of different languages over 141 positions, 200 states with more edges than a tile; 1e-11 of logs of some hundred nats: a last
    bit of CUDA's exp and log at each position."""
    automata = [random_automaton(1, states=200, kinds=40, vocab_size=90, density=0.6), random_automaton(2), random_automaton(3, states=7)]
    kinds, numbers = max(automaton.kinds for automaton in automata), torch.Generator("cuda").manual_seed(0)
    mass = 9 * torch.randn((3, 141, kinds), dtype=torch.float64, device="cuda", generator=numbers)
    drawn = torch.rand((3, 141, 2), device="cuda", generator=numbers) if chance else None
    states, found = torch.zeros(3, dtype=torch.int64, device="cuda"), []
    for ways in ((messages, follow), (messages_triton, follow_triton)):
        monkeypatch.setattr(lattice, "choose_scans", lambda device, ways=ways: ways)
        found.append(make_lattice(automata, mass.device).solve(mass, mass - 0.5, states, 9, drawn, True))
    expected, got = found
    assert bool((expected.log_partition > -float("inf")).any())
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(got, name), value, atol=1e-8, rtol=1e-11, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"do_sample": False}, {"output_logits": True}, {"decoding": "autoregressive"}], ids=str)
def test_what_is_written_under_a_constraint_fits_on_cuda(dtype, settings):
    """Rows of several languages, and one without any, over canvases of 10; the same again with the same seeds."""
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())
    model, ids = small_model(vocab_size=len(tokenizer) + 3).cuda().to(dtype), prompts(4, 9)[0].cuda()
    schema = JsonSchema({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    settings = {
        "max_new_tokens": 37,
        "generation_config": {"max_denoising_steps": 4},
        "eos_token_id": [1],
        "pad_token_id": 0,
        "seed": [1, 2, 3, 4],
        **settings,
    }
    if settings.get("do_sample") is False or settings.get("decoding") == "autoregressive":
        settings = {**settings, "do_sample": False}
        del settings["seed"]
    given = {"constraint": [Regex(r"\d{4}-\d\d"), None, Choice(["left", "right"]), schema], "tokenizer": tokenizer}
    first, second = (model.generate(ids, return_dict_in_generate=True, **given, **settings).sequences for _ in range(2))
    assert torch.equal(first, second)
    texts = tokenizer.batch_decode(first[:, 9:], skip_special_tokens=True)
    assert re.fullmatch(r"\d{4}-\d\d", texts[0]) and texts[2] in ("left", "right") and re.fullmatch(r'\{"n": ?-?\d+\}', texts[3])


@pytest.mark.parametrize(
    "settings", [{}, {"cache_implementation": "static"}, {"top_k": 9}, {"sampler": "predictor_corrector", "max_denoising_steps": 3}]
)
def test_graph_of_a_step_gives_the_tokens_of_plain_steps_on_cuda(settings, monkeypatch):
    """Over several canvases; `record_plainly` runs the same function on the same buffers, so only the graph differs."""
    model = small_model(vocab_size=5001).cuda()
    ids = prompts(1, 9)[0].cuda()
    settings = {"max_new_tokens": 35, "max_denoising_steps": 4, "seed": 0, "eos_token_id": [], "pad_token_id": 0, **settings}
    graph = model.generate(ids, **settings)
    monkeypatch.setattr(recording, "record_graph", recording.record_plainly)
    assert torch.equal(graph, model.generate(ids, **settings))


def test_steps_are_recorded_without_a_warning_on_cuda(monkeypatch):
    said = []
    monkeypatch.setattr(recording.logger, "warning_once", said.append)
    model = small_model(vocab_size=5001).cuda()
    model.generate(prompts(1, 9)[0].cuda(), max_new_tokens=25, max_denoising_steps=4)
    assert said == []


def test_a_step_that_waits_is_not_recorded_and_leaves_torch_as_it_was_on_cuda(monkeypatch):
    """Eager experts count tokens on the host. Also where it shows only while the graph is recorded."""
    said = []
    monkeypatch.setattr(recording.logger, "warning_once", said.append)
    model = small_model(vocab_size=5001).cuda()
    settings = {"max_new_tokens": 25, "max_denoising_steps": 4, "seed": 0}
    model.set_experts_implementation("eager")
    expected = model.generate(prompts(1, 9)[0].cuda(), disable_compile=True, **settings)
    for look in (recording.NeverWaits, lambda device: contextlib.nullcontext()):
        monkeypatch.setattr(recording, "NeverWaits", look)
        assert torch.equal(model.generate(prompts(1, 9)[0].cuda(), **settings), expected)
        assert bool(torch.rand(3, device="cuda").isfinite().all())
    assert len(said) == 2 and "waits for the device" in said[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_another_than_the_current_device_gives_the_same_tokens_on_cuda():
    """Streams and events belong to the current device unless they are told."""
    model, ids = small_model(vocab_size=5001), prompts(1, 9)[0]
    settings = {"max_new_tokens": 25, "max_denoising_steps": 4, "seed": 0}
    first, second = (model.to(f"cuda:{index}").generate(ids.to(f"cuda:{index}"), **settings).cpu() for index in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static", "quantized"])
def test_other_caches_answer_on_cuda(kind):
    path = default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).cuda(), AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": "Write October 2, 2052 as an ISO date."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt").to("cuda")
    sequences = model.generate(**inputs, seed=0, canvas_length=8, max_new_tokens=64, cache_implementation=kind)
    assert tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == "2052-10-02"


def test_shipped_checkpoint_answers_on_cuda():
    path = default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).cuda(), AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": "Write October 2, 2052 as an ISO date."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt").to("cuda")
    sequences = model.generate(**inputs, seed=0, canvas_length=64, max_new_tokens=64)
    assert tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == "2052-10-02"
