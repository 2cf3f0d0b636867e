"""What the shipped checkpoints learn from: batches of every recipe, as `examples/train.py` hands them to the loss."""

import random
import re

import numpy as np
import pytest
import torch
from tiny import build_oracle, same_weights, tokens
from transformers import DiffusionGemmaForBlockDiffusion

from deepen import deepened
from jobs import sudoku
from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, block_diffusion_loss
from recipes import RECIPES, SudokuFurtherRecipe, SudokuRecipe


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    """40 puzzles, some of which need search."""
    sudoku.make(40, (26, 30), 0, path := tmp_path_factory.mktemp("puzzles") / "puzzles.npz")
    return str(path)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_batches_are_taken_by_the_loss_of_the_recipes_model(name, progress, puzzles):
    recipe, rng = RECIPES[name](puzzles), random.Random(1)
    torch.manual_seed(0)
    model = DiffusionGemmaForMaskedBlockLM(recipe.config(32, 2))
    batch, options = recipe.batch(rng, 8, progress)
    learned = batch["labels"] >= 0
    assert batch["input_ids"].shape == batch["labels"].shape and bool(learned.any(dim=1).all())
    assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])
    assert int(learned.sum(dim=1).max()) <= options["canvas_length"]
    losses = block_diffusion_loss(model, **batch, **options)
    assert bool(losses.diffusion.isfinite()) and (losses.causal is not None) == options["causal"]


def test_sudoku_goes_on_with_puzzles_nearly_as_they_are_asked_half_of_which_need_search(puzzles):
    recipe = SudokuFurtherRecipe(puzzles)
    some, solutions = recipe.draw(np.random.default_rng(0), 400)
    assert all(sudoku.is_solution(puzzle, solution) for puzzle, solution in zip(some, solutions, strict=True))
    clues = (some > 0).sum(axis=1)
    assert 26 <= clues.min() and clues.max() <= 36
    before, _ = SudokuRecipe(puzzles).draw(np.random.default_rng(0), 400)
    needs, usual = (np.mean([not sudoku.singles_only(puzzle) for puzzle in each]) for each in (some, before))
    assert needs > 0.42 and needs > usual + 0.3


@pytest.mark.parametrize("behind, layers", [(0, 1), (1, 3), (2, 2)])
def test_new_layers_change_no_logit_of_either_pass_and_learn(behind, layers, tmp_path):
    model = same_weights(build_oracle())
    deeper = deepened(model, behind, layers)
    ids, canvas = tokens(2, 13), tokens(2, 10, seed=1)
    with torch.no_grad():
        before, after = (one(ids, decoder_input_ids=canvas).logits for one in (model, deeper))
        causal = [one.causal_logits(ids) for one in (model, deeper)]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    torch.testing.assert_close(*causal, rtol=0, atol=1e-5)
    deeper.train()
    deeper(ids, labels=torch.cat((torch.full((2, 4), -100), ids[:, 4:]), dim=1)).loss.backward()
    new = deeper.model.decoder.layers[behind : behind + layers]
    assert all(layer.post_attention_layernorm.weight.grad.abs().max() > 0 for layer in new)
    assert all(layer.post_feedforward_layernorm.weight.grad.abs().max() > 0 for layer in new)
    deeper.save_pretrained(tmp_path)
    read, told = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert read.config.text_config.num_hidden_layers == model.config.text_config.num_hidden_layers + layers


@pytest.mark.parametrize("behind, layers", [(-1, 2), (0, 0), (2, 3), (4, 1)])
def test_new_layers_are_copies_of_layers_that_are_there(behind, layers):
    with pytest.raises(ValueError, match=f"`behind` is {behind} and `layers` {layers}"):
        deepened(same_weights(build_oracle()), behind, layers)


def test_deepen_writes_a_checkpoint_that_training_begins_with(here, tmp_path):
    printed, error = here("deepen.py", "sudoku", str(tmp_path), "--layers", "1")
    assert error is None and re.fullmatch(r"[\d,]+ parameters in (\d+) layers\n[\d,]+ parameters in (\d+) layers\n", printed)
    assert (tmp_path / "tokenizer.json").is_file() and DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path)
    assert "`layers` 99" in here("deepen.py", "sudoku", str(tmp_path / "no"), "--layers", "99")[1] and not (tmp_path / "no").exists()
