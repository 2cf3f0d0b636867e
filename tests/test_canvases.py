"""All canvases of a row at once: turns of a conversation, packed conversations, what each canvas sees, the head in pieces."""

import pytest
import torch
from small_models import CANVAS, PAD, VOCAB, WINDOW, small_model
from tiny import needs_flex_attention

from modeling_diffusiongemma.model.head import DiffusionGemmaForMaskedBlockLM
from modeling_diffusiongemma.training import pieces
from modeling_diffusiongemma.training.canvases import conversations, cut_canvases
from modeling_diffusiongemma.training.loss import block_diffusion_loss
from modeling_diffusiongemma.training.objective import Objective

IGNORED = -100
# Of each conversation the lengths of its turns: prompt, response, prompt, response, ...
ONE = [[(4, 13, 3, 7), (2, 21)], [(9, 3, 1, 10, 2, 1)], [(WINDOW + 2, 4, 5, 12)]]


@pytest.fixture(scope="module")
def model():
    return small_model()


def rows_of(turns, seed=0):
    """Packed rows, padded on the right: `input_ids`, `labels`, `attention_mask`, `position_ids`."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(sum(map(sum, row)) for row in turns)
    ids = torch.full((len(turns), longest), PAD)
    labels, mask, positions = torch.full_like(ids, IGNORED), torch.zeros_like(ids), torch.zeros_like(ids)
    for row, packed in enumerate(turns):
        at = 0
        for conversation in packed:
            length, turn = sum(conversation), at
            ids[row, at : at + length] = torch.randint(5, 90, (length,), generator=generator)
            positions[row, at : at + length] = torch.arange(length)
            for place, count in enumerate(conversation):
                if place % 2:
                    labels[row, turn : turn + count] = ids[row, turn : turn + count]
                turn += count
            at += length
        mask[row, :at] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}


def canvases_by_hand(inputs, turns):
    """(row, begin of the conversation, start, clean ids) of every canvas, row by row."""
    found = []
    for row, packed in enumerate(turns):
        begin = 0
        for conversation in packed:
            turn = begin
            for place, count in enumerate(conversation):
                for start in range(turn, turn + count if place % 2 else turn, CANVAS):
                    clean = inputs["input_ids"][row, start : min(start + CANVAS, turn + count)].tolist()
                    found.append((row, begin, start, clean + [PAD] * (CANVAS - len(clean))))
                turn += count
            begin += sum(conversation)
    return found


def learned(model, inputs, seed=3, **kwargs):
    """The loss with canvases given, no row of which is self-conditioned, and those canvases."""
    cut = cut_canvases(inputs["input_ids"], inputs["labels"], CANVAS, PAD)
    shape = (cut.ids.shape[0], cut.ids.shape[1] * CANVAS)
    noised = torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))
    off = torch.zeros(shape[0], dtype=torch.bool)
    return block_diffusion_loss(model, **inputs, noised=noised, self_conditioning_mask=off, **kwargs), noised, cut


def alone(model, inputs, row, begin, start, canvas):
    """Logits of a canvas behind the clean tokens of its conversation, `(C, V)`."""
    return model(input_ids=inputs["input_ids"][row : row + 1, begin:start], decoder_input_ids=canvas[None]).logits[0]


def test_responses_are_cut_at_their_ends_and_filled():
    inputs = rows_of(ONE)
    cut = cut_canvases(inputs["input_ids"], inputs["labels"], CANVAS, PAD)
    expected = canvases_by_hand(inputs, ONE)
    assert cut.there.sum(dim=1).tolist() == [6, 3, 3]
    assert cut.start[cut.there].tolist() == [start for _, _, start, _ in expected]
    assert cut.ids[cut.there].tolist() == [clean for *_, clean in expected]
    assert torch.equal(cut.inside[cut.there], cut.ids[cut.there] != PAD)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flex_attention", marks=needs_flex_attention)])
def test_each_canvas_sees_its_conversation_up_to_itself_and_nothing_else(model, attention):
    """Turns, packing, windows and padding: as if every canvas stood alone behind the tokens before it."""
    model.set_attn_implementation(attention)
    try:
        inputs = rows_of(ONE)
        loss, noised, cut = learned(model, inputs)
        noised, logits = (tensor.view(*cut.ids.shape, *tensor.shape[2:])[cut.there] for tensor in (noised, loss.logits))
        losses = []
        for place, (row, begin, start, clean) in enumerate(canvases_by_hand(inputs, ONE)):
            expected = alone(model, inputs, row, begin, start, noised[place])
            torch.testing.assert_close(logits[place], expected, atol=1e-3, rtol=0)
            losses.append(torch.nn.functional.cross_entropy(expected, torch.tensor(clean)))
    finally:
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(loss.canvas_losses, torch.stack(losses), atol=1e-4, rtol=0)
    torch.testing.assert_close(loss.diffusion, torch.stack(losses).mean(), atol=1e-4, rtol=0)


@torch.no_grad()
def test_packed_conversations_have_the_losses_they_have_apart(model):
    packed, apart = rows_of([[(4, 13), (2, 21), (WINDOW + 1, 4)]], seed=2), []
    loss, noised, cut = learned(model, packed)
    begin, first = 0, 0
    for conversation in [(4, 13), (2, 21), (WINDOW + 1, 4)]:
        length, count = sum(conversation), -(-conversation[1] // CANVAS)
        own = {name: tensor[:, begin : begin + length] for name, tensor in packed.items()}
        canvases = noised[:, first * CANVAS : (first + count) * CANVAS]
        apart.append(block_diffusion_loss(model, **own, noised=canvases, self_conditioning_mask=torch.tensor([False])))
        begin, first = begin + length, first + count
    torch.testing.assert_close(loss.canvas_losses, torch.cat([each.canvas_losses for each in apart]), atol=1e-4, rtol=0)
    tokens = torch.tensor([13.0, 21.0, 4.0])
    causal = torch.stack([each.causal for each in apart])
    torch.testing.assert_close(loss.causal, (causal * tokens).sum() / tokens.sum(), atol=1e-4, rtol=0)


@torch.no_grad()
def test_no_clean_token_from_a_canvas_on_and_of_no_other_conversation_shows(model):
    """The gate: `>=` for `>` in the mask is silent, total leakage. 1e-5: a token's experts compute beside others' (see test_loss.py)."""
    turns = [[(3, 14, 2, 11), (4, 12)]]
    inputs = rows_of(turns)
    reference, noised, cut = learned(model, inputs)
    by_hand = canvases_by_hand(inputs, turns)
    reference = reference.logits.view(len(by_hand), CANVAS, VOCAB)
    for place in range(inputs["input_ids"].shape[1]):
        changed = {name: tensor.clone() for name, tensor in inputs.items()}
        changed["input_ids"][0, place] = (inputs["input_ids"][0, place] - 5 + 40) % 85 + 5
        changed["labels"] = torch.where(inputs["labels"] == IGNORED, IGNORED, changed["input_ids"])
        got = learned(model, changed)[0].logits.view(len(by_hand), CANVAS, VOCAB)
        for canvas, (_, begin, start, _) in enumerate(by_hand):
            moved = (got[canvas] - reference[canvas]).abs().max()
            if begin <= place < start:
                assert moved > 1e-4, f"token {place} before the canvas at {start} is not seen"
            else:
                assert moved < 1e-5, f"token {place} shows in the canvas at {start}"


@torch.no_grad()
def test_forward_takes_packed_rows_as_transformers_collators_write_them(model):
    """`position_ids` that begin at 0 again; without them the row is one conversation."""
    inputs = rows_of([[(4, 13), (6, 9)]])
    found = []
    for given in (inputs, {name: tensor for name, tensor in inputs.items() if name != "position_ids"}):
        torch.manual_seed(0)
        found.append(model.train()(**given, self_conditioning_mask=torch.tensor([True])))
        model.eval()
    first, last = (each.canvas_losses for each in found)
    torch.testing.assert_close(first[:2], last[:2], atol=1e-4, rtol=0)
    assert (first[2] - last[2]).abs() > 1e-3
    shifted = inputs["position_ids"] + 0
    assert conversations(shifted[:, :17], inputs["input_ids"][:, :17], torch.ones(1, 17, dtype=torch.bool)) is None


def test_narrow_canvases_and_one_a_row_are_set_on_the_model():
    model, inputs = small_model(), rows_of(ONE)
    counts = {}
    for canvases, length in (("all", None), ("all", 3), ("one", 3)):
        model.objective = Objective(canvases, length)
        torch.manual_seed(0)
        counts[canvases, length] = len(model.train()(**inputs).canvas_losses)
    assert counts == {("all", None): 12, ("all", 3): 5 + 3 + 7 + 1 + 4 + 1 + 2 + 4, ("one", 3): 3}
    assert DiffusionGemmaForMaskedBlockLM.objective == Objective()


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"canvases": "some"}, "`canvases` is 'some'"),
        ({"canvas_length": 0}, "`canvas_length`"),
        ({"canvas_length": 2.5}, "`canvas_length`"),
    ],
)
def test_wrong_objectives_are_refused(kwargs, told):
    with pytest.raises(ValueError, match=told):
        Objective(**kwargs)


def test_a_canvas_that_a_row_does_not_have_is_refused(model):
    with pytest.raises(ValueError, match=r"`canvases` is \[0, 3, 1\]; expected less than each row has: \[6, 3, 3\]"):
        block_diffusion_loss(model, **rows_of(ONE), canvases=torch.tensor([0, 3, 1]))


# The head in pieces


def gradients(model, inputs, **kwargs):
    model.zero_grad()
    torch.manual_seed(5)
    loss = block_diffusion_loss(model, **inputs, self_conditioning_mask=torch.tensor([True, False, True]), **kwargs)
    (loss.diffusion + loss.causal).backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss, grads


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_pieces_of_the_head_give_the_dense_loss_and_its_gradients(monkeypatch, tokens):
    """1e-5 relative: sums in another order. With a bias on the head, which counts as any module's would."""
    model, inputs = small_model().train(), rows_of(ONE)
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, VOCAB))
    dense, expected = gradients(model, inputs, keep_logits=True)
    monkeypatch.setattr(pieces, "NUMBERS", tokens * VOCAB)
    called = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: called.append(args[0].shape[:-1].numel()))
    loss, got = gradients(model, inputs, keep_logits=False)
    hook.remove()
    assert max(called) <= tokens and loss.logits is None
    for name in ("diffusion", "causal", "canvas_losses"):
        torch.testing.assert_close(getattr(loss, name), getattr(dense, name), atol=1e-5, rtol=1e-5)
    assert got.keys() == expected.keys() and "lm_head.bias" in got
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)


def test_logits_are_left_out_in_training_unless_asked_for():
    model, inputs = small_model(), rows_of(ONE)
    assert model(**inputs).logits.shape == (3, 6 * CANVAS, VOCAB)
    model.train()
    assert model(**inputs).logits is None
    assert model(**inputs, skip_logits=False).logits.shape == (3, 6 * CANVAS, VOCAB)
