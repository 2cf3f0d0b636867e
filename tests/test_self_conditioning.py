"""Self-conditioning that ends: after so many steps of a canvas the next one is conditioned on nothing."""

import pytest
import torch
from small_models import CANVAS, small_model
from test_step_callback import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from generation import Choice
from modeling_diffusiongemma import default_checkpoint


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def text():
    path = default_checkpoint()
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": False}, {"backend": "reference", "seed": None}, {"constraint": Choice(["abc", "b"])}]
)
def test_self_conditioning_ends_after_so_many_steps(text, steps, settings):
    """As a callback that takes it away then, over two canvases, in the dense way and in the walk in pieces."""
    model, tokenizer = text
    if "constraint" in settings:
        settings = settings | {"tokenizer": tokenizer, "eos_token_id": 1}

    def forget(model, step, noise_proportion, state):
        return {} if (step + 1) % steps else {"soft_embeds": torch.zeros_like(state["soft_embeds"])}

    given = {"rows": 2, "canvas_length": 6, "max_new_tokens": 11, "max_denoising_steps": 7, **settings}
    torch.manual_seed(0)
    by_setting = run(model, None, self_conditioning_steps=steps, **given)
    torch.manual_seed(0)
    by_callback = run(model, forget, **given)
    assert torch.equal(by_setting[0], by_callback[0]) and by_setting[1] == by_callback[1]


@pytest.mark.parametrize("steps", [7, 100])
def test_self_conditioning_of_all_steps_is_the_default(model, steps):
    settings = {"rows": 2, "max_denoising_steps": 7}
    assert torch.equal(run(model, None, self_conditioning_steps=steps, **settings)[0], run(model, None, **settings)[0])


def test_what_the_next_step_is_conditioned_on_is_gone_after_so_many(model):
    seen = []

    def look(model, step, noise_proportion, state):
        seen.append(bool(state["soft_embeds"].any()))
        return {}

    run(model, look, self_conditioning_steps=3, max_new_tokens=CANVAS, max_denoising_steps=7)
    assert seen == [True, True, False, True, True, False, True]
