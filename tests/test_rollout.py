"""Canvases that a model wrote itself: the same ones `generate` writes, rows that come and go, and the loss on them."""

import pytest
import torch
from small_models import CANVAS, prompts, small_model

from generation import EntropyBoundSampler
from generation.rules.samplers import ConfidenceSampler
from generation.rules.stopping import AnyOf, Patience, Settled
from modeling_diffusiongemma import Rollout, block_diffusion_loss

PROMPT = 7


@pytest.fixture(scope="module")
def model():
    built = small_model()
    built.generation_config.update(eos_token_id=[], pad_token_id=0)
    return built


def drawn(count, responses=CANVAS):
    """Inputs as a collator gives them: prompts of 7, responses of a canvas, two tokens of padding behind."""
    ids = prompts(count, PROMPT + responses + 2)[0]
    labels, mask = torch.full_like(ids, -100), torch.ones_like(ids)
    labels[:, PROMPT:-2] = ids[:, PROMPT:-2]
    mask[:, -2:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


class States:
    """Keeps the canvas and the argmax of every step."""

    def __init__(self):
        self.canvases, self.argmax = [], []

    def put(self, value): ...
    def end(self): ...
    def put_state(self, state):
        self.canvases.append(state.canvas)
        self.argmax.append(state.argmax)


def test_canvases_are_those_that_generate_writes(model):
    """Six steps of three rows, from the same random numbers: the reference backend draws in the same order. Rows are not finished before,
    for `max_steps` ends them."""
    inputs, seen = drawn(3), States()
    torch.manual_seed(4)
    model.generate(inputs["input_ids"][:, :PROMPT], max_new_tokens=CANVAS, backend="reference", streamer=seen, stability_threshold=9)
    torch.manual_seed(4)
    rollout = Rollout(model, rows=3, max_steps=6)
    for step in range(6):
        given, noised, soft_embeds = rollout.batch(lambda count: inputs)
        if step:
            assert torch.equal(noised, seen.canvases[step - 1])
        random = torch.get_rng_state()
        with torch.no_grad(), model.reference_arithmetic():  # in which the reference backend computes
            losses = block_diffusion_loss(model, **given, noised=noised, soft_embeds=soft_embeds, causal=False)
        torch.set_rng_state(random)  # the loss may draw, too
        rollout.advance(losses.logits)
        assert torch.equal(rollout.state.argmax, seen.argmax[step])


def test_new_rows_begin_with_noise_and_nothing_believed(model):
    inputs, noised, soft_embeds = Rollout(model, rows=4).batch(drawn)
    assert inputs["input_ids"].shape == (4, PROMPT + CANVAS + 2)
    assert noised.shape == (4, CANVAS) and noised.dtype == torch.int64 and len(noised.unique()) > CANVAS
    assert soft_embeds.shape == (4, CANVAS, model.config.text_config.hidden_size) and not soft_embeds.any()


def test_rows_that_end_make_room_and_the_others_stay(model):
    """One row is given logits that leave no doubt, twice: stable and confident. `max_steps` ends the rest."""
    rollout, asked = Rollout(model, rows=3, max_steps=3), []

    def draw(count):
        asked.append(count)
        return {name: value + (len(asked) if name == "input_ids" else 0) for name, value in drawn(count).items()}

    first = rollout.batch(draw)[0]["input_ids"].clone()
    logits = torch.randn(3, CANVAS, model.config.text_config.vocab_size)
    logits[1] = -1e4
    logits[1, :, 5] = 0.0
    for _ in range(2):
        rollout.advance(logits)
    before = rollout.state.canvas.clone()
    inputs, noised, soft_embeds = rollout.batch(draw)
    assert asked == [3, 1] and rollout.state.passes.tolist() == [2, 0, 2]
    assert torch.equal(inputs["input_ids"][[0, 2]], first[[0, 2]]) and not torch.equal(inputs["input_ids"][1], first[1])
    assert torch.equal(noised[[0, 2]], before[[0, 2]]) and soft_embeds[0].any() and not soft_embeds[1].any()
    rollout.advance(logits)
    rollout.batch(draw)
    assert asked == [3, 1, 2] and rollout.state.passes.tolist() == [0, 1, 0]


def test_loss_is_the_cross_entropy_of_the_clean_response_on_the_given_canvas(model):
    inputs, noised = drawn(2), torch.randint(100, (2, CANVAS))
    soft_embeds = torch.randn(2, CANVAS, model.config.text_config.hidden_size)
    losses = block_diffusion_loss(model, **inputs, noised=noised, soft_embeds=soft_embeds, causal=False)
    cache = model.prefill(inputs["input_ids"][:, :PROMPT]).past_key_values
    logits = model.compute_logits(model.denoise(noised, cache, soft_embeds=soft_embeds).last_hidden_state)
    torch.testing.assert_close(losses.logits, logits, atol=1e-5, rtol=1e-5)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"][:, PROMPT:-2].flatten())
    torch.testing.assert_close(losses.diffusion, expected)
    without = block_diffusion_loss(model, **inputs, noised=noised, self_conditioning_mask=torch.zeros(2, dtype=torch.bool), causal=False)
    assert not torch.allclose(without.logits, losses.logits)


def test_learning_from_rollouts_lowers_their_loss():
    """Two fixed examples, sixty steps: from guessing among 100 ids, 4.6 nats, the model comes to end its own canvases at the responses."""
    model, inputs = small_model(seed=1, initializer_range=0.05).train(), drawn(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rollout, losses = Rollout(model, rows=2, max_steps=4), []
    for _ in range(60):
        given, noised, soft_embeds = rollout.batch(lambda count: {name: value[:count] for name, value in inputs.items()})
        trained = block_diffusion_loss(model, **given, noised=noised, soft_embeds=soft_embeds, causal=False)
        trained.diffusion.backward()
        optimizer.step()
        optimizer.zero_grad()
        rollout.advance(trained.logits)
        losses.append(trained.diffusion.item())
    assert losses[0] > 4 and sum(losses[-10:]) / 10 < 2.2


def test_all_that_the_config_says_of_temperature_and_end_counts():
    """`temperature`, `joint_threshold` and `patience` of the model's generation config were ignored, silently."""
    model = small_model()
    plain = Rollout(model, rows=2)
    model.generation_config.update(temperature=0.5, joint_threshold=0.1, patience=3)
    rollout = Rollout(model, rows=2)
    assert torch.allclose(rollout.temperatures, plain.temperatures / 2)
    assert rollout.stopping == AnyOf((plain.stopping, Settled(0.1), Patience(3)))
    rollout.batch(drawn)
    rollout.advance(1e3 * torch.randn(2, CANVAS, model.config.text_config.vocab_size))
    assert bool(rollout.state.finished.all()), "all positions are sure at the first step, before the argmax canvas has stood"


def test_a_row_forgets_after_as_many_of_its_own_steps_as_the_config_says():
    model = small_model()
    model.generation_config.update(self_conditioning_steps=2, confidence_threshold=1e-9)
    rollout = Rollout(model, rows=2, max_steps=5)
    conditioned = []
    for _ in range(5):
        soft_embeds = rollout.batch(drawn)[2]
        conditioned.append(bool(soft_embeds.any()))
        rollout.advance(torch.randn(2, CANVAS, model.config.text_config.vocab_size))
    assert conditioned == [False, True, False, True, False]


def test_all_else_that_the_config_says_counts_or_is_refused():
    """Sampler, noise, filters, `do_sample` and `canvas_length` of the model's generation config were ignored, silently."""
    model = small_model()
    model.generation_config.update(
        sampler="confidence", confidence=1.0, noise="mask", mask_token_id=4, top_k=1, canvas_length=6, ignore_after_eos=True, eos_token_id=9
    )
    rollout = Rollout(model, rows=2)
    noised = rollout.batch(lambda count: drawn(count, 6))[1]
    assert noised.shape == (2, 6) and bool((noised == 4).all())
    logits = torch.randn(2, 6, model.config.text_config.vocab_size)
    rollout.advance(logits)
    assert bool(rollout.state.accepted.all()), "one id alone is left, of which the sampler is sure"
    assert not rollout.state.entropy.any() and torch.equal(rollout.state.canvas, logits.argmax(dim=-1))
    rollout.batch(lambda count: drawn(count, 6))
    certain = torch.full_like(logits, -1e4)
    certain[..., 9] = 0.0
    certain[:, 1:] = 1e-3 * torch.randn(2, 5, certain.shape[-1])  # nobody waits for what lies behind the end
    for _ in range(2):
        rollout.advance(certain)
    assert bool(rollout.state.finished.all())
    model.generation_config.update(sampler="entropy_bound", top_k=0, do_sample=False)
    greedy = Rollout(model, rows=2)
    greedy.batch(lambda count: drawn(count, 6))
    greedy.advance(logits)
    assert torch.equal(greedy.state.canvas[greedy.state.accepted], logits.argmax(dim=-1)[greedy.state.accepted])
    for name, value in {
        "repetition_penalty": 1.3,
        "bad_words_ids": [[5]],
        "min_new_tokens": 3,
        "sampler": "fixed_steps",
        "pad_token_id": 100,
    }.items():
        refusing = small_model()
        refusing.generation_config.update(**{name: value})
        with pytest.raises(ValueError, match=f"`{name}` "):
            Rollout(refusing, rows=2)


def test_other_samplers_choose_the_positions(model):
    with torch.no_grad():
        for sampler, few in ((ConfidenceSampler(1.0), 1), (EntropyBoundSampler(1e-6), 1), (EntropyBoundSampler(1e6), CANVAS)):
            rollout = Rollout(model, rows=2, sampler=sampler)
            rollout.batch(drawn)
            rollout.advance(torch.randn(2, CANVAS, model.config.text_config.vocab_size))
            assert rollout.state.accepted.sum(dim=1).tolist() == [few, few]


@pytest.mark.parametrize(
    "arguments, told",
    [({"rows": 0}, "`rows` is 0"), ({"rows": 1, "max_steps": 0}, "`max_steps` is 0"), ({"rows": 1, "max_steps": 49}, "expected 1 to 48")],
)
def test_wrong_sizes_are_refused(model, arguments, told):
    with pytest.raises(ValueError, match=told):
        Rollout(model, **arguments)


NOISED = torch.zeros(2, CANVAS, dtype=torch.int64)
SOFT = torch.zeros(2, CANVAS, 32)


@pytest.mark.parametrize(
    "given, told",
    [
        ({"noised": NOISED[:, 1:]}, r"`noised` has shape \(2, 9\); expected \(2, 10\)"),
        ({"soft_embeds": SOFT}, "`soft_embeds` is given without `noised`"),
        ({"noised": NOISED, "soft_embeds": SOFT[..., 1:]}, "`soft_embeds` has shape"),
        ({"noised": NOISED, "soft_embeds": SOFT, "self_conditioning_mask": torch.ones(2, dtype=torch.bool)}, "both given"),
    ],
)
def test_wrong_canvases_are_refused_by_the_loss(model, given, told):
    with pytest.raises(ValueError, match=told):
        block_diffusion_loss(model, **drawn(2), **given)


def test_canvases_of_a_long_response_are_under_way_one_by_one(model):
    """Which of its canvases a row learns is drawn with the row and stays; the loss is that of this canvas."""
    inputs = drawn(8, responses=23)
    torch.manual_seed(1)
    rollout = Rollout(model, rows=8, max_steps=3)
    for _ in range(2):
        given, noised, soft_embeds = rollout.batch(lambda count: inputs)
        assert set(given["canvases"].tolist()) == {0, 1, 2}
        losses = block_diffusion_loss(model, **given, noised=noised, soft_embeds=soft_embeds)
        assert losses.logits.shape == (8, CANVAS, model.config.text_config.vocab_size)
        for row, canvas in enumerate(given["canvases"].tolist()):
            start = PROMPT + CANVAS * canvas
            with torch.no_grad():
                hidden = model.model(inputs["input_ids"][row : row + 1, :start], decoder_input_ids=noised[row : row + 1],
                                     soft_embeds=soft_embeds[row : row + 1]).last_hidden_state  # fmt: skip
            torch.testing.assert_close(losses.logits[row], model.compute_logits(hidden)[0], atol=1e-3, rtol=0)
        rollout.advance(losses.logits)


def test_a_canvas_for_each_of_a_rows_canvases_is_expected(model):
    with pytest.raises(ValueError, match=r"`noised` has shape \(2, 10\); expected \(2, 20\)"):
        block_diffusion_loss(model, **drawn(2, responses=13), noised=torch.zeros(2, CANVAS, dtype=torch.int64))
