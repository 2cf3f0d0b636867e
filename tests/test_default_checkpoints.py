"""The shipped checkpoints do the job their cards say, in this implementation and in transformers'."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DiffusionGemmaForBlockDiffusion

from jobs import TEXT_JOBS, sudoku
from modeling_diffusiongemma import default_checkpoint
from recipes import SudokuRecipe, TextRecipe, ToolsRecipe

NAMES = ["text", "sudoku", "decisions", "tools"]
# Right out of 20 unseen inputs, at least: the cards' accuracy less about three standard deviations.
FLOORS = {
    "date": 19, "number_to_words": 19, "words_to_number": 19, "units": 18, "sort": 17, "note_to_json": 18, "number_pair": 18, "days": 12,
    "words filled in": 14, "digits filled in": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_is_small_and_loads_without_a_missing_key(name):
    path = Path(default_checkpoint(name))
    assert sum(file.stat().st_size for file in path.iterdir()) < 20e6
    for cls in (AutoModelForCausalLM, DiffusionGemmaForBlockDiffusion):
        _, info = cls.from_pretrained(path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="sudoku.*text"):
        default_checkpoint("chess")


def test_text_jobs_are_solved_on_unseen_inputs():
    model = AutoModelForCausalLM.from_pretrained(default_checkpoint())
    results = TextRecipe().evaluate(model, 20)
    assert {name: row["exact"] * 20 for name, row in results.items() if row["exact"] * 20 < FLOORS[name] - 1e-6} == {}
    # Where any answer will do, no guess is sure until one is taken: the steps of such a job are its own.
    told = [row["steps"] for name, row in results.items() if name not in TEXT_JOBS or not TEXT_JOBS[name].many_answers]
    assert max(told) < 20 and set(results) == set(FLOORS) > set(TEXT_JOBS)


def test_text_checkpoint_answers_alike_in_transformers():
    """Same seed, reference draws: a user who goes back loses nothing."""
    path = default_checkpoint()
    ours, theirs = AutoModelForCausalLM.from_pretrained(path), DiffusionGemmaForBlockDiffusion.from_pretrained(path)
    recipe, rng = TextRecipe(), random.Random(5)
    for job in TEXT_JOBS.values():
        ids = torch.tensor(recipe.encode([job.sample(rng, "test")[0]]))
        torch.manual_seed(0)
        expected = theirs.generate(ids).sequences
        torch.manual_seed(0)
        got = ours.generate(ids, backend="reference")
        assert torch.equal(got, expected[:, : got.shape[1]])


def test_functions_are_called_on_unseen_requests():
    """96 of 100 are right, with and without a constraint, under which all fit."""
    results = ToolsRecipe().evaluate(AutoModelForCausalLM.from_pretrained(default_checkpoint("tools")), 20)
    assert set(results) == {"calls", "calls under a constraint"} and min(row["exact"] for row in results.values()) >= 0.8


@pytest.fixture(scope="module")
def solver():
    return AutoModelForCausalLM.from_pretrained(default_checkpoint("sudoku"))


def test_sudoku_solves_most_unseen_puzzles(solver):
    results = SudokuRecipe().evaluate(solver, 40, batch_size=40)
    assert results["all"]["exact"] >= 0.45 and results["all"]["steps"] < 30


def test_sudoku_mends_wrong_cells_in_one_pass(solver):
    """Self-correction: 4 of the solution's cells replaced by other digits, one canvas pass, the argmax."""
    recipe, rng = SudokuRecipe(), random.Random(3)
    pairs = [sudoku.generate(rng, 34) for _ in range(10)]
    puzzles, solutions = (recipe.encode(np.stack(part)) for part in zip(*pairs, strict=True))
    spoiled, places = solutions.clone(), []
    for row in range(10):
        for place in rng.sample([cell for cell in range(81) if puzzles[row, cell] == 5], 4):
            spoiled[row, place] = 6 + (solutions[row, place] - 6 + rng.randint(1, 8)) % 9
            places.append((row, place))
    prompts = torch.cat((torch.full((10, 1), 2), puzzles), dim=1)
    with torch.no_grad():
        guess = solver(input_ids=prompts, decoder_input_ids=spoiled).logits.argmax(dim=-1)
    assert sum(bool(guess[row, place] == solutions[row, place]) for row, place in places) >= 38  # of 40


def test_sudoku_tokenizer_takes_every_way_of_writing_blanks():
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint("sudoku"))
    written = [tokenizer(text)["input_ids"] for text in ("1.2", "102", "1_2", "1 .\n2")]
    assert written == [[2, 6, 5, 7]] * 4
