"""`pipeline("text-generation")` on the shipped checkpoint, as its users call it."""

import pytest
from transformers import pipeline

from modeling_diffusiongemma import default_checkpoint

NARROW = {"canvas_length": 16, "max_new_tokens": 16, "seed": 0}
REQUEST = "Write October 2, 2052 as an ISO date."
RENDERED = f"<bos><|turn>user\n{REQUEST}<turn|>\n<|turn>model\n"


@pytest.fixture(scope="module")
def generator():
    return pipeline("text-generation", model=default_checkpoint())


def test_chat_gets_an_assistants_turn(generator):
    chat = [{"role": "user", "content": REQUEST}]
    assert generator(chat, **NARROW)[0]["generated_text"] == [*chat, {"role": "assistant", "content": "2052-10-02"}]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_list_of_strings_in_batches(generator, batch_size):
    other = RENDERED.replace("October 2, 2052", "4 May 1911")
    found = generator([RENDERED, other, RENDERED], return_full_text=False, batch_size=batch_size, **NARROW)
    assert [row[0]["generated_text"] for row in found] == ["2052-10-02", "1911-05-04", "2052-10-02"]


def test_full_text_holds_the_prompt(generator):
    text = generator(RENDERED, **NARROW)[0]["generated_text"]
    assert text.endswith("2052-10-02") and REQUEST in text


def test_arguments_reach_generate(generator):
    assert len(generator(RENDERED, return_full_text=False, num_return_sequences=2, **NARROW)) == 2
    with pytest.raises(ValueError, match="num_beams"):
        generator(RENDERED, num_beams=2, **NARROW)


def test_pipelines_own_temperature_does_not_scale_the_schedule(generator):
    """transformers' text-generation pipeline sets 0.7 wherever a model's config leaves it open."""
    assert generator.model.generation_config.temperature == 1.0
    assert "temperature" not in generator.model.generation_config.to_diff_dict(), "transformers' class does not know the field"


def test_model_is_not_called_unsupported(generator, caplog):
    pipeline("text-generation", model=generator.model, tokenizer=generator.tokenizer)(RENDERED, **NARROW)
    assert "not supported" not in caplog.text
