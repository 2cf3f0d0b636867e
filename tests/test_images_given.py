"""Images that do not fit the model, the prompt or each other are refused by name, by every door, before anything has changed."""

import pytest
import torch
from tiny import IMAGE, image_inputs, ours, tokens
from transformers import DynamicCache

from modeling_diffusiongemma import BlockDiffusionCollator

IDS, MASK, IMAGES = image_inputs("small")
PIXELS, PLACES = IMAGES["pixel_values"], IMAGES["image_position_ids"]
FAR, OFF_GRID = PLACES.clone(), PLACES.clone()
FAR[0, 0], OFF_GRID[0, 0] = 16, torch.tensor([0, 15])
BAD = {
    "text": ("pixel_values", {"pixel_values": "x"}), "a list": ("pixel_values", {"pixel_values": [PIXELS]}),
    "ids": ("pixel_values", {"pixel_values": PIXELS.long()}), "picture": ("pixel_values", {"pixel_values": torch.rand(1, 3, 8, 8)}),
    "narrow": ("pixel_values", {"pixel_values": PIXELS[..., 1:]}), "none": ("pixel_values", {"pixel_values": PIXELS[:0]}),
    "one patch less": ("pixel_values", {"pixel_values": PIXELS[:, 1:], "image_position_ids": PLACES[:, 1:]}),
    "no places": ("image_position_ids", {"image_position_ids": None}), "no pixels": ("pixel_values", {"pixel_values": None}),
    "other batch": ("image_position_ids", {"pixel_values": PIXELS.repeat(2, 1, 1)}),
    "two images": ("image tokens", {"pixel_values": PIXELS.repeat(2, 1, 1), "image_position_ids": PLACES.repeat(2, 1, 1)}),
    "text places": ("image_position_ids", {"image_position_ids": "x"}),
    "floats": ("image_position_ids", {"image_position_ids": PLACES.float()}),
    "flat": ("image_position_ids", {"image_position_ids": PLACES[0]}),
    "one axis": ("image_position_ids", {"image_position_ids": PLACES[..., :1]}),
    "beyond the table": ("image_position_ids", {"image_position_ids": FAR}),
    "off the grid": ("image_position_ids", {"image_position_ids": OFF_GRID}),
    "types of text": ("mm_token_type_ids", {"mm_token_type_ids": "x"}),
    "short types": ("mm_token_type_ids", {"mm_token_type_ids": MASK[:, 1:]}),
    "types of floats": ("mm_token_type_ids", {"mm_token_type_ids": MASK.float()}),
}  # fmt: skip
DOORS = {
    "generate": lambda model, **given: model.generate(IDS, max_new_tokens=3, **given),
    "prefill": lambda model, **given: model.prefill(IDS, **given),
    "model": lambda model, **given: model(IDS, **given),
    "base model": lambda model, **given: model.model(IDS, **given),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", BAD)
def test_images_that_do_not_fit_are_refused_by_name(door, name):
    match, changed = BAD[name]
    model, cache = ours(), DynamicCache()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=match):
        DOORS[door](model, cache=cache, **{**IMAGES, **changed})
    assert cache.get_seq_length() == 0 and (door != "generate" or torch.equal(torch.get_rng_state(), state))


@pytest.mark.parametrize("kind", ["small", "wider_than_the_window", "two_in_a_row", "two_that_touch", "one_row_of_two_padded"])
def test_images_that_fit_are_taken(kind):
    ids, mask, images = image_inputs(kind)
    assert ours().generate(ids, attention_mask=mask, max_new_tokens=3, max_denoising_steps=1, **images).shape[1] == ids.shape[1] + 3


@pytest.mark.parametrize("name, value", {
    "input_ids": "x", "decoder_input_ids": [1], "inputs_embeds": 3, "labels": "x", "self_conditioning_logits": [0.5], "position_ids": "x",
    "decoder_position_ids": 3, "attention_mask": 3,
}.items())  # fmt: skip
def test_forward_names_what_is_no_tensor(name, value):
    given = {"input_ids": tokens(1, 5), "decoder_input_ids": tokens(1, 10), name: value}
    if name == "inputs_embeds":
        del given["input_ids"]
    with pytest.raises(ValueError, match=name):
        ours()(**given)


def test_score_reads_images():
    """`score` took no images, so that what they say counted for nothing."""
    model = ours()
    batch = BlockDiffusionCollator(pad_token_id=0)([(IDS[0].tolist(), [5, 6, 7])])
    one = model.score(**batch, mode="autoregressive", **IMAGES)
    other = model.score(**batch, mode="autoregressive", **{**IMAGES, "pixel_values": 1 - PIXELS})
    assert one.log_prob.shape == (1,) and not torch.equal(one.log_prob, other.log_prob)
    assert int((IDS == IMAGE).sum()) == 4
    for match, given in {"pixel_values": {}, "image_position_ids": {"pixel_values": PIXELS}}.items():
        with pytest.raises(ValueError, match=match):
            model.score(**batch, **given)
    with pytest.raises(ValueError, match="colour"):
        model.score(**batch, **IMAGES, colour=3)
    for name, value in {"samples": 2.5, "canvas_length": "x", "input_ids": "x", "labels": [1]}.items():
        with pytest.raises(ValueError, match=name):
            model.score(**{**batch, name: value})
