"""What the shipped checkpoints learn from: batches of every recipe, as `examples/train.py` hands them to the loss."""

import random

import numpy as np
import pytest
import torch

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


def test_sudoku_goes_on_with_puzzles_nearly_as_they_are_asked_more_of_which_need_search(puzzles):
    recipe = SudokuFurtherRecipe(puzzles)
    some, solutions = recipe.draw(np.random.default_rng(0), 400)
    assert all(sudoku.is_solution(puzzle, solution) for puzzle, solution in zip(some, solutions, strict=True))
    clues = (some > 0).sum(axis=1)
    assert 26 <= clues.min() and clues.max() <= 36
    before, _ = SudokuRecipe(puzzles).draw(np.random.default_rng(0), 400)
    needs, usual = (np.mean([not sudoku.singles_only(puzzle) for puzzle in each]) for each in (some, before))
    assert needs > 0.25 and needs > usual + 0.15
