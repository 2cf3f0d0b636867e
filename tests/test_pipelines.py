"""`pipeline("text-generation")` on the shipped checkpoint and `pipeline("image-text-to-text")` on a tiny one, as their users call them."""

import importlib.util
import io
import threading

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, DiffusionGemmaForBlockDiffusion, TextIteratorStreamer, TextStreamer, pipeline
from transformers.utils import logging

from generation import CanvasStreamer, DiffusionGenerationConfig
from modeling_diffusiongemma import default_checkpoint

NARROW = {"canvas_length": 16, "max_new_tokens": 16, "seed": 0}
REQUEST = "Write October 2, 2052 as an ISO date."
OTHER = "Write 4 May 1911 as an ISO date."
RENDERED = f"<bos><|turn>user\n{REQUEST}<turn|>\n<|turn>model\n"
RENDERED_OTHER = RENDERED.replace(REQUEST, OTHER)
UNSUPPORTED = "not supported for"


@pytest.fixture(scope="module")
def generator():
    return pipeline("text-generation", model=default_checkpoint())


@pytest.fixture
def log(caplog, monkeypatch):
    """What transformers logs; outside of its own CI its loggers do not hand it on to pytest's."""
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    return caplog


def chat(request=REQUEST, role="user"):
    return [{"role": role, "content": request}]


def texts(rows):
    return [row[0]["generated_text"] for row in rows]


# text-generation


def test_chat_gets_an_assistants_turn(generator):
    assert generator(chat(), **NARROW)[0]["generated_text"] == [*chat(), {"role": "assistant", "content": "2052-10-02"}]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_list_of_strings_in_batches(generator, batch_size):
    found = generator([RENDERED, RENDERED_OTHER, RENDERED], return_full_text=False, batch_size=batch_size, **NARROW)
    assert texts(found) == ["2052-10-02", "1911-05-04", "2052-10-02"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_list_of_chats_in_batches(generator, batch_size):
    found = generator([chat(OTHER), chat()], return_full_text=False, batch_size=batch_size, **NARROW)
    assert texts(found) == ["1911-05-04", "2052-10-02"]


def test_chat_that_ends_with_the_assistant_is_continued(generator):
    begun = [*chat(), {"role": "assistant", "content": "2052-"}]
    (asked, answer) = generator(begun, **NARROW)[0]["generated_text"]
    assert asked == begun[0] and answer["role"] == "assistant"
    assert answer["content"].startswith("2052-") and answer["content"] != "2052-"


def test_full_text_holds_the_prompt(generator):
    text = generator(RENDERED, **NARROW)[0]["generated_text"]
    assert text == f"{RENDERED}2052-10-02"
    assert generator(RENDERED, return_full_text=False, **NARROW)[0]["generated_text"] == "2052-10-02"
    ids = generator(RENDERED, return_tensors=True, **NARROW)[0]["generated_token_ids"]
    assert generator.tokenizer.decode(ids, skip_special_tokens=True).endswith("2052-10-02")


def test_arguments_reach_generate(generator):
    assert len(generator(RENDERED, return_full_text=False, num_return_sequences=2, **NARROW)) == 2
    assert generator(RENDERED, return_full_text=False, **NARROW | {"max_new_tokens": 4})[0]["generated_text"] == "2052"
    assert generator(RENDERED, return_full_text=False, stop_sequence="-", **NARROW)[0]["generated_text"] == "2052-"
    config = DiffusionGenerationConfig.preset("fast", canvas_length=16, max_new_tokens=7)
    assert generator(RENDERED, return_full_text=False, generation_config=config, seed=0)[0]["generated_text"] == "2052-10"
    with pytest.raises(ValueError, match="num_beams"):
        generator(RENDERED, num_beams=2, **NARROW)
    with pytest.raises(ValueError, match="colour"):
        generator(RENDERED, colour="red", **NARROW)


def test_streamer_gets_the_text_and_the_steps(generator, capsys):
    generator(RENDERED, streamer=TextStreamer(generator.tokenizer, skip_prompt=True, skip_special_tokens=True), **NARROW)
    assert capsys.readouterr().out.strip() == "2052-10-02"
    drawn = io.StringIO()
    generator(RENDERED, streamer=CanvasStreamer(generator.tokenizer, stop_ids=[0, 106], file=drawn), **NARROW)
    assert "step  1" in drawn.getvalue() and "2052-10-02" in drawn.getvalue()


def test_streamer_in_another_thread_gets_canvas_after_canvas(generator):
    asked = chat("To JSON: Order from Quinn: 54 paper mirrors, due 4 December 2026.")
    arguments = {"canvas_length": 16, "max_new_tokens": 64, "seed": 0, "return_full_text": False}
    streamer = TextIteratorStreamer(generator.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=generator, args=(asked,), kwargs={**arguments, "streamer": streamer})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert len(pieces) > 1 and "".join(pieces) == generator(asked, **arguments)[0]["generated_text"]


def test_long_lists_go_through_bit_by_bit_with_progress(generator):
    """Answers come while later prompts have not been read; a data set tells its length, and so the bar its total."""
    read = []

    def prompts():
        for number in range(30):
            read.append(number)
            yield RENDERED if number % 2 else RENDERED_OTHER

    found = iter(generator(prompts(), return_full_text=False, batch_size=2, **NARROW))
    assert [next(found)[0]["generated_text"] for _ in range(3)] == ["1911-05-04", "2052-10-02", "1911-05-04"]
    assert len(read) < 30

    class Prompts(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, place):
            return [RENDERED, RENDERED_OTHER][place % 2]

    shown = io.StringIO()
    rows = list(tqdm(generator(Prompts(), return_full_text=False, **NARROW), file=shown, mininterval=0))
    assert texts(rows) == ["2052-10-02", "1911-05-04"] * 2
    assert "0/4" in shown.getvalue() and "4/4" in shown.getvalue()


def test_pipelines_own_temperature_does_not_scale_the_schedule(generator):
    """transformers' text-generation pipeline sets 0.7 wherever a model's config leaves it open."""
    assert generator.model.generation_config.temperature == 1.0
    assert "temperature" not in generator.model.generation_config.filled().to_diff_dict(), "it is not saved"


def test_truncation_shortens_the_prompt_and_not_the_answer(generator):
    """The pipeline hands `max_length` to the tokenizer and to `generate`, beside the `max_new_tokens`."""
    shortened = {"truncation": True, "max_length": 10, "max_new_tokens": 8, "canvas_length": 16, "seed": 0}
    ids = generator(RENDERED, return_tensors=True, **shortened)[0]["generated_token_ids"]
    prompt = generator.tokenizer(RENDERED, truncation=True, max_length=10, add_special_tokens=False)["input_ids"]
    assert ids[:10] == prompt and 10 < len(ids) <= 18


def test_model_is_not_called_unsupported(generator, log):
    pipeline("text-generation", model=generator.model, tokenizer=generator.tokenizer)(RENDERED, **NARROW)
    assert UNSUPPORTED not in log.text
    pipeline("text-generation", model=DiffusionGemmaForBlockDiffusion(generator.model.config), tokenizer=generator.tokenizer)
    assert UNSUPPORTED in log.text, "the warning that is not to come reads differently now"


def test_bad_chats_are_refused_by_what_is_wrong(generator):
    with pytest.raises(TemplateError, match="role wizard, expected user, assistant or system"):
        generator(chat(role="wizard"), **NARROW)
    with pytest.raises(TemplateError, match="content part of type smell, expected text or image"):
        generator(chat([{"type": "smell"}]), **NARROW)
    with pytest.raises(ValueError, match="image tokens .* but `pixel_values` is None; expected the images"):
        generator(chat([{"type": "image"}, {"type": "text", "text": "What is it?"}]), **NARROW)
    with pytest.raises((IndexError, ValueError)):  # transformers' own, before any code of ours or a template runs
        generator([], **NARROW)
    with pytest.raises(ValueError, match="input_ids"):
        generator("", **NARROW)


# image-text-to-text

needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs Pillow: pip install pillow")
needs_torchvision = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision: pip install torchvision")
# A random model multiplies rounding about tenfold a step, and padding changes rounding: few steps where rows are compared.
FEW = {"max_new_tokens": 10, "seed": 0, "max_denoising_steps": 3}


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=needs_torchvision)], ids=["images", "images_audio_video"])
def describer(request, tmp_path_factory):
    """The pipeline from a folder; with all parts of the processor by its name alone, as its users load it."""
    folder = tmp_path_factory.mktemp("vision")
    try:
        from tiny_vision import ImageProcessor, processor, vision_model
    except ImportError as error:  # transformers 5.17 has no `Gemma4Processor` at all without torchvision
        pytest.skip(f"{error}: pip install torchvision")
    vision_model().save_pretrained(folder)
    processor(request.param).save_pretrained(folder)
    if request.param:
        return pipeline("image-text-to-text", model=str(folder))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return pipeline("image-text-to-text", model=model, processor=ImageProcessor.from_pretrained(folder))


def image(width, height, seed):
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def question(text, *images):
    return chat([*({"type": "image", "image": one} for one in images), {"type": "text", "text": text}])


@needs_pillow
def test_image_chat_gets_what_generate_gives(describer):
    asked = question("What is it?", image(20, 31, 0))
    inputs = describer.processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = describer.model.generate(**inputs, **FEW).sequences[0, inputs["input_ids"].shape[1] :]
    expected = describer.processor.decode(ids, skip_special_tokens=True)
    assert describer(text=asked, generate_kwargs=dict(FEW), return_full_text=False)[0]["generated_text"] == expected
    whole = describer(text=asked, generate_kwargs=dict(FEW))[0]["generated_text"]
    assert whole == [*asked, {"role": "assistant", "content": expected}]
    other = describer(text=question("What is it?", image(20, 31, 1)), generate_kwargs=dict(FEW), return_full_text=False)
    assert other[0]["generated_text"] != expected, "the image changes nothing"


@needs_pillow
def test_image_chats_in_batches_are_answered_as_alone(describer):
    asked = [question("What is it?", image(20, 31, 0)), question("And what may this one be?", image(33, 12, 1))]
    alone = [describer(text=one, generate_kwargs=dict(FEW), return_full_text=False)[0]["generated_text"] for one in asked]
    assert texts(describer(text=asked, generate_kwargs=dict(FEW), return_full_text=False, batch_size=2)) == alone
    assert texts(describer(text=asked, generate_kwargs=dict(FEW), return_full_text=False)) == alone


@needs_pillow
def test_image_pipeline_takes_strings_and_chats_without_images(describer):
    row = describer(images=image(20, 31, 0), text="<|image|> What is it?", max_new_tokens=5, generate_kwargs={"seed": 0})[0]
    assert row["generated_text"].startswith("<|image|> What is it?")
    assert describer(text=chat("Nothing to see."), generate_kwargs=dict(FEW))[0]["generated_text"][-1]["role"] == "assistant"


@needs_pillow
def test_image_pipeline_does_not_call_the_model_unsupported(describer, log):
    pipeline("image-text-to-text", model=describer.model, processor=describer.processor)
    assert UNSUPPORTED not in log.text


@needs_pillow
def test_bad_image_input_is_refused_by_what_is_wrong(describer):
    with pytest.raises(ValueError, match="number of <.image.> tokens"):
        describer(images=image(20, 31, 0), text="no place for it", generate_kwargs=dict(FEW))
    with pytest.raises(TemplateError, match="role wizard"):
        describer(text=chat(role="wizard"), generate_kwargs=dict(FEW))
    with pytest.raises(ValueError, match="num_beams"):
        describer(text=question("What is it?", image(20, 31, 0)), generate_kwargs={"num_beams": 2})
    with pytest.raises(ValueError, match="num_return_sequences"):
        describer(text=question("What is it?", image(20, 31, 0)), generate_kwargs={**FEW, "num_return_sequences": 2})
    with pytest.raises((IndexError, ValueError)):
        describer(text=[], generate_kwargs=dict(FEW))


@needs_pillow
def test_checkpoint_without_a_processor_is_named(generator):
    with pytest.raises((OSError, TypeError, ValueError), match="checkpoints.*text|Processor"):  # TypeError: torchvision is missing
        pipeline("image-text-to-text", model=default_checkpoint())
