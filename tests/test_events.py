"""Generation as an iterator: complete, in order, and stopped when nobody listens."""

import threading

import pytest
import torch
from small_models import prompts, small_model
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from generation import CommitEvent, StepEvent, stream_events, stream_text
from generation.watch.events import TextAssembler
from jobs.tokenizer import build_tokenizer
from modeling_diffusiongemma import default_checkpoint

SETTINGS = {
    "max_new_tokens": 25,
    "max_denoising_steps": 3,
    "confidence_threshold": 1e-9,
    "seed": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def model():
    return small_model()


def test_autocast_of_the_caller_counts(model):
    """It is a thread's, and generation has a thread of its own: it ran without, silently."""
    seen = set()
    hook = model.model.decoder.layers[0].mlp.register_forward_hook(lambda module, given, output: seen.add(output.dtype))
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            list(stream_events(model, prompts(1, 6)[0], **SETTINGS))
        assert seen == {dtype}
        seen.clear()
    hook.remove()


def test_events_are_every_step_and_every_canvas_in_order(model):
    ids = prompts(2, 6)[0]
    events = list(stream_events(model, ids, **SETTINGS))
    kinds = [(type(event).__name__, event.canvas) for event in events]
    assert kinds == [(name, canvas) for canvas in range(3) for name in ["StepEvent"] * 3 + ["CommitEvent"]]
    assert [event.step for event in events if isinstance(event, StepEvent)] == [0, 1, 2] * 3
    committed = torch.cat([event.tokens for event in events if isinstance(event, CommitEvent)], dim=1)
    assert torch.equal(committed, model.generate(ids, **SETTINGS)[:, 6:])
    last = events[2]
    assert torch.equal(last.argmax, events[3].tokens) and last.accepted.dtype == torch.bool and bool((last.entropy >= 0).all())


def test_leaving_the_loop_stops_generation(model):
    threads = set(threading.enumerate())
    for event in stream_events(model, prompts(1, 6)[0], **{**SETTINGS, "max_new_tokens": 100_000}):
        if event.canvas == 1:
            break
    assert set(threading.enumerate()) <= threads  # one of another test's may end meanwhile


def test_exception_in_the_consumer_stops_generation(model):
    threads = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="mine"):
        for _ in stream_events(model, prompts(1, 6)[0], **{**SETTINGS, "max_new_tokens": 100_000}):
            raise RuntimeError("mine")
    assert set(threading.enumerate()) <= threads


def test_exception_of_generate_reaches_the_consumer(model):
    with pytest.raises(ValueError, match="num_beams"):
        list(stream_events(model, prompts(1, 6)[0], num_beams=2))
    for name in ("streamer", "watcher"):
        with pytest.raises(ValueError, match=f"`{name}`"):
            stream_events(model, prompts(1, 6)[0], **{name: object()})


def test_streamed_text_is_the_answer():
    path = default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": "Write October 2, 2052 as an ISO date."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    pieces = list(stream_text(model, tokenizer, **inputs, seed=0, canvas_length=16, max_new_tokens=64))
    assert "".join(pieces) == "2052-10-02"
    two = {name: value.repeat(2, 1) for name, value in inputs.items()}
    with pytest.raises(ValueError, match="2 rows"):
        list(stream_text(model, tokenizer, **two, canvas_length=16, max_new_tokens=16))


@pytest.mark.parametrize("text", ["plain words", "é漢字🙂 e\u0301 👩‍👩‍👧", "ends in half: 🙂"])
def test_characters_are_never_split(text):
    """One byte-level token at a time: most of these characters take several."""
    tokenizer = build_tokenizer()
    assembler = TextAssembler(tokenizer)
    pieces = [assembler.add([token]) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) + assembler.rest() == text and not any("\ufffd" in piece for piece in pieces)


def byte_fallback() -> PreTrainedTokenizerFast:
    """256 tokens of a byte each, and a word: what is not in the vocabulary is written in bytes, as by Gemma's tokenizer."""
    tokenizer = Tokenizer(models.BPE({**{f"<0x{byte:02X}>": byte for byte in range(256)}, "\u2581word": 256}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_lone_byte_behind_a_character_hides_nothing_that_comes_later():
    """Bytes that follow each other are read as one text, so the lone one makes nonsense of the character that was given out already:
    tokenizers' `DecodeStream` raises here, and for every later token."""
    tokenizer, assembler = byte_fallback(), TextAssembler(byte_fallback())
    ids = [*"é".encode(), 0xE2, 256, *"🙂".encode(), 256, 0xE2]
    pieces = [assembler.add([token]) for token in ids]
    assert pieces == ["", "é", "", "\ufffd\ufffd word", "", "", "", "🙂", " word", ""]
    assert assembler.rest() == "\ufffd" and len("".join(pieces)) + 1 == len(tokenizer.decode(ids))
