"""The training loss: its value, what the canvas may see, how canvases and noise are drawn, what it refuses."""

import math

import pytest
import torch
from small_models import CANVAS, PAD, VOCAB, WINDOW, small_model
from transformers import DynamicCache

from generation import MaskNoise, UniformNoise
from modeling_diffusiongemma.training.canvases import check_labels, cut_canvases, random_canvas
from modeling_diffusiongemma.training.loss import block_diffusion_loss, corrupt, noise_proportions
from modeling_diffusiongemma.training.objective import Objective

IGNORED = -100
LENGTHS = [(5, 27), (13, 10), (2, 4), (9, 15)]  # prompt and response: three canvases, one full one, a short one, two


@pytest.fixture(scope="module")
def model():
    return small_model()


def batch(lengths=LENGTHS, side="right", seed=0):
    """Rows of random tokens padded on one side: `input_ids`, `labels`, `attention_mask`."""
    generator, longest = torch.Generator().manual_seed(seed), max(map(sum, lengths))
    input_ids = torch.full((len(lengths), longest), PAD)
    labels, mask = torch.full_like(input_ids, IGNORED), torch.zeros_like(input_ids)
    for row, (prompt, response) in enumerate(lengths):
        first = 0 if side == "right" else longest - prompt - response
        ids = torch.randint(5, 90, (prompt + response,), generator=generator)
        input_ids[row, first : first + len(ids)] = ids
        labels[row, first + prompt : first + len(ids)] = ids[prompt:]
        mask[row, first : first + len(ids)] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}


def cross_entropy(logits, token):
    """In float64, by the formula."""
    values = logits.double().tolist()
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values)) - values[token]


def choose_canvas(inputs, fill=PAD):
    """One canvas a row, drawn as the loss draws it; ids and starts `(B, C)`, `(B,)`."""
    canvases = cut_canvases(inputs["input_ids"], inputs["labels"], CANVAS, fill)
    chosen = canvases.pick(random_canvas(canvases))
    return chosen.ids[:, 0], chosen.start[:, 0]


def slow_loss(model, inputs, seed, noise_is_mask=False, one=False):
    """Both losses, canvas logits and self-conditioned rows, from the definition: every canvas alone and without padding.

    Draws in the order of training/loss.py: the canvases (where it is one a row), the strata of t, t inside them, which tokens, which
    noise, which rows are self-conditioned.
    """
    rows = inputs["input_ids"].shape[0]
    targets = (inputs["labels"] != IGNORED).sum(dim=1)
    counts = [math.ceil(int(count) / CANVAS) for count in targets]
    torch.manual_seed(seed)
    chosen = [range(count) for count in counts]
    if one:
        chosen = [[min(int(share * count), count - 1)] for share, count in zip(torch.rand(rows), counts, strict=True)]
    total, most = sum(map(len, chosen)), max(map(len, chosen))
    strata, inside = torch.randperm(total), torch.rand(total)
    which_tokens = torch.rand(rows, most, CANVAS)
    drawn = torch.full((rows, most, CANVAS), 4) if noise_is_mask else torch.randint(VOCAB, (rows, most, CANVAS))
    conditioned = torch.rand(rows) < 0.5
    diffusion, causal, all_logits = [], [], []
    for row in range(rows):
        real = inputs["attention_mask"][row].bool()
        ids, labels = inputs["input_ids"][row][real].tolist(), inputs["labels"][row][real].tolist()
        prompt = sum(label == IGNORED for label in labels)
        response = ids[prompt:]
        for place_in_row, canvas in enumerate(chosen[row]):
            start = canvas * CANVAS
            clean = (response[start : start + CANVAS] + [PAD] * CANVAS)[:CANVAS]
            t = 1e-4 + (1 - 2e-4) * (strata[len(all_logits)] + inside[len(all_logits)]) / total
            share, noise = which_tokens[row, place_in_row], drawn[row, place_in_row]
            noised = [int(noise[place]) if share[place] < t else token for place, token in enumerate(clean)]
            given = {"input_ids": torch.tensor([ids[: prompt + start]]), "decoder_input_ids": torch.tensor([noised])}
            logits = model(**given).logits
            if conditioned[row]:
                logits = model(**given, self_conditioning_logits=logits).logits
            all_logits.append(logits[0])
            diffusion.append([cross_entropy(logits[0, place], token) for place, token in enumerate(clean)])
        states = model.compute_logits(model.prefill(torch.tensor([ids])).last_hidden_state[0])
        causal += [cross_entropy(states[place - 1], ids[place]) for place in range(prompt, len(ids))]
    there = torch.zeros(rows, most, dtype=torch.bool)
    for row, each in enumerate(chosen):
        there[row, : len(each)] = True
    canvas_losses = torch.tensor(diffusion, dtype=torch.float64).mean(dim=1)
    return canvas_losses, sum(causal) / len(causal), torch.stack(all_logits), conditioned, there


def shown(logits, there):
    """The logits `(canvases, C, V)` of the canvases that are there, of `(B, K * C, V)`."""
    return logits.view(*there.shape, CANVAS, VOCAB)[there]


# Value


@torch.no_grad()
@pytest.mark.parametrize("canvases", ["all", "one"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_equals_its_definition_canvas_by_canvas(model, seed, side, canvases, monkeypatch):
    """Rows of different lengths, several canvases, padding on either side: each must count as if it were alone."""
    monkeypatch.setattr(model, "objective", Objective(canvases=canvases), raising=False)
    inputs = batch(side=side, seed=seed)
    each, causal, logits, conditioned, there = slow_loss(model, inputs, seed, one=canvases == "one")
    torch.manual_seed(seed)
    got = model.train()(**inputs, skip_logits=False)
    model.eval()
    # float32 logits up to 30, summed in another order by the batched pass
    torch.testing.assert_close(shown(got.logits, there), logits, atol=1e-3, rtol=0)
    torch.testing.assert_close(got.canvas_losses.double(), each, atol=1e-4, rtol=0)
    assert got.noise_proportions.shape == got.canvas_losses.shape
    assert got.diffusion_loss.item() == pytest.approx(float(each.mean()), abs=1e-4)
    assert got.causal_loss.item() == pytest.approx(causal, abs=1e-4)
    assert torch.equal(got.loss, got.diffusion_loss + got.causal_loss) and bool(got.loss.isfinite())
    if seed == 1:
        assert 0 < conditioned.sum() < len(conditioned), "both kinds of rows are compared"


@torch.no_grad()
def test_loss_with_mask_noise_equals_its_definition(model):
    inputs = batch(seed=3)
    each, _, logits, _, there = slow_loss(model, inputs, 3, noise_is_mask=True)
    torch.manual_seed(3)
    got = block_diffusion_loss(model, **inputs, noise=MaskNoise(4))
    torch.testing.assert_close(shown(got.logits, there), logits, atol=1e-3, rtol=0)
    assert got.diffusion.item() == pytest.approx(float(each.mean()), abs=1e-4)


@torch.no_grad()
def test_without_the_causal_loss_the_canvas_loss_is_the_same(model):
    """The shorter prompt pass of `causal=False` leaves out only what no canvas can see."""
    inputs = batch(side="right", seed=4)
    torch.manual_seed(4)
    both = block_diffusion_loss(model, **inputs)
    torch.manual_seed(4)
    alone = block_diffusion_loss(model, **inputs, causal=False)
    assert alone.causal is None
    torch.testing.assert_close(alone.logits, both.logits, atol=1e-3, rtol=0)


def test_loss_reaches_every_weight_of_the_text_model():
    own = small_model(seed=1).train()
    torch.manual_seed(0)
    own(**batch(), self_conditioning_mask=torch.tensor([True, False, True, False])).loss.backward()
    trained = {name: p.grad for name, p in own.named_parameters() if "encoder." not in name}
    assert [name for name, grad in trained.items() if grad is None or not bool(grad.abs().sum() > 0)] == []


@torch.no_grad()
def test_tuple_output_begins_with_the_loss(model):
    torch.manual_seed(0)
    whole = model(**batch())
    torch.manual_seed(0)
    assert torch.equal(model(**batch(), return_dict=False)[0], whole.loss)


# What the canvas sees


@torch.no_grad()
@pytest.mark.parametrize("starts", [[5, 9], [12, 22], [1, 20]])
def test_canvas_sees_nothing_clean_from_itself_on(model, starts):
    """`>=` for `>` in the mask is silent, total leakage: a clean token at or behind the canvas's start must change nothing.

    1e-5: such a token goes through experts together with others', and on some CPUs a product's last bit depends on its row.
    """
    length, starts = 25, torch.tensor(starts)
    ids = torch.randint(5, 90, (2, length), generator=torch.Generator().manual_seed(0))
    canvas = torch.randint(VOCAB, (2, CANVAS), generator=torch.Generator().manual_seed(1))

    def logits(clean):
        cache = model.prefill(clean, past_key_values=DynamicCache()).past_key_values
        positions = starts[:, None] + torch.arange(CANVAS)
        view = model.prepare_canvas(cache, tuple(canvas.shape), position_ids=positions, prefix_length=starts)
        return model.compute_logits(model.denoise(canvas, view=view).last_hidden_state)

    expected = logits(ids)
    for place in range(length):
        changed = ids.clone()
        changed[:, place] = (ids[:, place] - 5 + 40) % 85 + 5
        moved = (logits(changed) - expected).abs().amax(dim=(1, 2))
        for row, start in enumerate(starts.tolist()):
            if place >= start:
                assert moved[row] < 1e-5, f"row {row}: the clean token {place} shows in the canvas that starts at {start}"
            else:
                assert moved[row] > 1e-4, f"row {row}: the token {place} before the canvas at {start} is not seen"


@torch.no_grad()
def test_loss_itself_shows_the_canvas_nothing_behind_it(model):
    """The same through the loss: what follows the chosen canvas in the response changes nothing in its logits."""
    inputs = batch([(4, 40)] * 8, seed=5)
    torch.manual_seed(6)
    start = choose_canvas(inputs)[1]
    assert len(set(start.tolist())) > 2, "several canvases are chosen"
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    for row in range(8):
        behind = slice(int(start[row]) + CANVAS, None)
        changed["input_ids"][row, behind] = changed["labels"][row, behind] = (inputs["input_ids"][row, behind] + 7) % 90
    torch.manual_seed(6)
    expected = block_diffusion_loss(model, **inputs, canvases="one")
    torch.manual_seed(6)
    got = block_diffusion_loss(model, **changed, canvases="one")
    assert torch.equal(got.logits, expected.logits) and not torch.equal(got.causal, expected.causal)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_canvas_logits_of_a_padded_row_are_those_of_the_row_alone(model, side):
    """A sliding window that counted padding would hide real tokens; the second row's prompt is longer than the window."""
    inputs = batch([(30, 10), (WINDOW + 3, 10), (2, 3)], side=side, seed=7)
    off = torch.zeros(3, dtype=torch.bool)
    torch.manual_seed(8)
    together = block_diffusion_loss(model, **inputs, self_conditioning_mask=off, canvases="one")
    for row in range(3):
        torch.manual_seed(8)
        clean, start = choose_canvas(inputs)
        noised = corrupt(clean, noise_proportions(3, torch.device("cpu")), UniformNoise(VOCAB))
        real = inputs["attention_mask"][row].bool() & (torch.arange(inputs["input_ids"].shape[1]) < start[row])
        alone = model(input_ids=inputs["input_ids"][row][real][None], decoder_input_ids=noised[row : row + 1]).logits
        torch.testing.assert_close(together.logits[row], alone[0], atol=1e-3, rtol=0)


# Canvases and noise


def test_every_canvas_of_a_response_is_chosen_about_equally():
    """25 tokens are three canvases; 4 standard deviations of 3,000 draws with p = 1/3 are 103."""
    rows = {name: tensor.expand(3000, -1) for name, tensor in batch([(7, 25)]).items()}
    torch.manual_seed(0)
    clean, starts = choose_canvas(rows, fill=77)
    counts = [int((starts == start).sum()) for start in (7, 17, 27)]
    assert sum(counts) == 3000 and all(abs(count - 1000) < 103 for count in counts), counts
    ids = rows["input_ids"][0].tolist()
    for start in (7, 17, 27):
        cut = clean[starts == start][0].tolist()
        assert cut == (ids[start : start + CANVAS] + [77] * CANVAS)[:CANVAS]


def test_response_of_whole_canvases_gets_no_empty_one():
    rows = {name: tensor.expand(500, -1) for name, tensor in batch([(3, 20)]).items()}
    torch.manual_seed(0)
    clean, starts = choose_canvas(rows, fill=77)
    assert set(starts.tolist()) == {3, 13} and not bool((clean == 77).any())


def test_padding_behind_a_response_becomes_fill():
    """The row's own padding may hold anything, and the next row's length must not matter."""
    inputs = batch([(3, 4), (10, 14)])
    inputs["input_ids"][0, 7:] = 55
    clean, _ = choose_canvas(inputs)
    assert clean[0].tolist() == inputs["input_ids"][0, 3:7].tolist() + [PAD] * 6


def test_corruption_replaces_each_row_in_its_proportion():
    """10,000 tokens a row: 5 standard deviations are below 0.025."""
    clean = torch.full((4, 10_000), 5)
    torch.manual_seed(0)
    proportions = torch.tensor([1e-4, 0.25, 0.6, 1 - 1e-4])
    share = (corrupt(clean, proportions, MaskNoise(4)) != 5).float().mean(dim=1)
    torch.testing.assert_close(share, proportions, atol=0.025, rtol=0)
    share = (corrupt(clean, proportions, UniformNoise(VOCAB)) != 5).float().mean(dim=1)
    torch.testing.assert_close(share, proportions * (1 - 1 / VOCAB), atol=0.025, rtol=0)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_noise_proportions_cover_their_range_in_every_batch(rows):
    """Exactly one proportion in each of the batch's strata, in random order, never 0 or 1."""
    torch.manual_seed(0)
    orders = set()
    for _ in range(50):
        t = noise_proportions(rows, torch.device("cpu"))
        assert 1e-4 <= t.min() and t.max() <= 1 - 1e-4
        stratum = ((t - 1e-4) / (1 - 2e-4) * rows).clamp(max=rows - 1e-3).long().tolist()
        assert sorted(stratum) == list(range(rows))
        orders.add(tuple(stratum))
    assert len(orders) > 30 or rows == 1


# Self-conditioning


@torch.no_grad()
def test_rows_that_are_not_self_conditioned_equal_a_pass_without_it(model):
    inputs, results = batch(), {}
    for name, mask in {"none": [False] * 4, "some": [True, False, True, False], "all": [True] * 4}.items():
        torch.manual_seed(1)
        results[name] = model(**inputs, self_conditioning_mask=torch.tensor(mask)).logits[:, :CANVAS]
    for row, chosen in enumerate([True, False, True, False]):
        same, other = ("all", "none") if chosen else ("none", "all")
        torch.testing.assert_close(results["some"][row], results[same][row], atol=1e-4, rtol=0)
        assert (results["some"][row] - results[other][row]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(("mask", "passes"), [([False] * 4, 2), ([False, False, True, False], 3)])
def test_extra_pass_runs_only_where_a_row_needs_it(model, mask, passes):
    """One prompt pass and one canvas pass, and one more canvas pass where it conditions anything."""
    calls = []
    hook = model.model.decoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        model(**batch(), self_conditioning_mask=torch.tensor(mask))
    finally:
        hook.remove()
    assert len(calls) == passes


# Refusals


def spoil(inputs, name):
    ids, labels, mask = (inputs[key] for key in ("input_ids", "labels", "attention_mask"))
    if name == "shape":
        inputs["labels"] = labels[:, 1:]
    elif name == "none in a row":
        labels[2] = IGNORED
    elif name == "other ids":
        labels[0, 7] = (ids[0, 7] + 1) % VOCAB
    elif name == "begins at 0":
        labels[0, :5] = ids[0, :5]
    elif name == "target at padding":
        mask[1, 20:] = 0
    elif name == "begins with its conversation":
        inputs["position_ids"] = torch.arange(labels.shape[1]).expand_as(labels).clone()
        inputs["position_ids"][0, 5:] -= 5
    elif name == "positions that jump":
        inputs["position_ids"] = torch.arange(labels.shape[1]).expand_as(labels).clone()
        inputs["position_ids"][1, 7:] += 1
    elif name == "positions of another shape":
        inputs["position_ids"] = torch.arange(labels.shape[1])[None]
    elif name == "mask shape":
        inputs["attention_mask"] = mask[:, 1:]
    elif name == "no ids":
        inputs["input_ids"] = None
    elif name == "self-conditioning shape":
        inputs["self_conditioning_mask"] = torch.ones(3, dtype=torch.bool)


BAD_LABELS = {
    "shape": "`labels` has shape", "none in a row": r"-100 everywhere in rows \[2\]",
    "other ids": "differs from `input_ids`", "begins at 0": "begins with a target", "target at padding": "disagree",
    "begins with its conversation": "begins with a target", "positions that jump": "neither count on",
    "positions of another shape": "`position_ids` has shape", "mask shape": "attention_mask", "no ids": "input_ids",
    "self-conditioning shape": "self_conditioning_mask",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LABELS)
def test_bad_labels_are_refused(model, name):
    inputs = batch()
    spoil(inputs, name)
    with pytest.raises(ValueError, match=BAD_LABELS[name]):
        model(**inputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_good_labels_pass(side):
    inputs = batch(side=side)
    assert check_labels(inputs["input_ids"], inputs["labels"], inputs["attention_mask"]) is None


@pytest.mark.parametrize("name", ["cache", "self_conditioning_logits", "decoder_position_ids"])
def test_arguments_the_loss_does_not_use_are_refused(model, name):
    value = DynamicCache() if name == "cache" else torch.zeros(4, CANVAS)
    with pytest.raises(ValueError, match=name):
        model(**batch(), **{name: value})


# A canvas of one's own


@torch.no_grad()
def test_labels_of_a_given_canvas_give_its_plain_cross_entropy(model):
    generator = torch.Generator().manual_seed(9)
    ids, canvas, clean = (torch.randint(5, 90, (2, size), generator=generator) for size in (7, CANVAS, CANVAS))
    clean[0, 3:6] = clean[1, 0] = IGNORED
    got = model(input_ids=ids, decoder_input_ids=canvas, labels=clean)
    terms = [
        cross_entropy(got.logits[row, place], token)
        for row, tokens in enumerate(clean.tolist()) for place, token in enumerate(tokens) if token != IGNORED
    ]  # fmt: skip
    assert len(terms) == 16 and got.loss.item() == pytest.approx(sum(terms) / 16, abs=1e-4)
    assert got.causal_loss is None and torch.equal(got.logits, model(input_ids=ids, decoder_input_ids=canvas).logits)


@pytest.mark.parametrize("size", [CANVAS - 1, CANVAS + 1, 7])
def test_labels_of_another_length_than_the_canvas_are_refused(model, size):
    ids, canvas = torch.full((2, 7), 5), torch.full((2, CANVAS), 6)
    with pytest.raises(ValueError, match="`labels` has shape"):
        model(input_ids=ids, decoder_input_ids=canvas, labels=torch.full((2, size), 6))


@pytest.mark.parametrize(("value", "match"), [(IGNORED, "-100 everywhere"), (VOCAB, "holds ids from"), (-5, "holds ids from -5")])
def test_labels_of_a_given_canvas_that_mean_nothing_are_refused(model, value, match):
    """The loss was NaN without a word, or an IndexError; on a GPU an assertion that breaks the device."""
    ids, canvas = torch.randint(3, VOCAB, (2, 5)), torch.randint(3, VOCAB, (2, CANVAS))
    with pytest.raises(ValueError, match=f"`labels` .*{match}"):
        model(input_ids=ids, decoder_input_ids=canvas, labels=torch.full((2, CANVAS), value))


def test_model_without_a_pad_token_names_it():
    """It ended in a TypeError of `torch.where`; there is nothing to fill a canvas with."""
    own = small_model(pad_token_id=None)
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])}
    for call in (own, own.score):
        with pytest.raises(ValueError, match="`pad_token_id` of the text config is None"):
            call(**batch)
