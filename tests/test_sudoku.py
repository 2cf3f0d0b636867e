"""Sudoku: reading, checking, counting against a plain backtracking count, generation, symmetries, and the command line."""

import random

import numpy as np
import pytest

from jobs import sudoku

UNIQUE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
TWO = "2957438..4318659278761925433874592..612387495549216738763524189928671354154938672"
HARD = "800000000003600000070090200050007000000045700000100030001000068008500010090000400"  # Inkala, 2012: needs search


def plain_count(puzzle, limit):
    """The slow path beside `count_solutions`: first blank cell, every digit, no propagation."""
    values = list(puzzle)
    if 0 not in values:
        return 1
    cell = values.index(0)
    row, column = divmod(cell, 9)
    seen = {values[9 * r + c] for r in range(9) for c in range(9) if r == row or c == column or (r // 3, c // 3) == (row // 3, column // 3)}
    found = 0
    for digit in set(range(1, 10)) - seen:
        values[cell] = digit
        found += plain_count(values, limit - found)
        if found >= limit:
            break
    return found


@pytest.fixture(scope="module")
def pool():
    pairs = [sudoku.generate(random.Random(seed), 30) for seed in range(21)]
    return tuple(np.array(boards, dtype=np.uint8) for boards in zip(*pairs, strict=False))


def test_parse_ignores_decoration_and_takes_every_blank():
    expected = sudoku.parse(UNIQUE)
    assert expected.shape == (81,) and expected.dtype == np.int8 and (expected > 0).sum() == 30
    for text in (
        UNIQUE.replace(".", "0"),
        UNIQUE.replace(".", "_"),
        f"\n {UNIQUE[:40]}\t|-+\n{UNIQUE[40:]} ",
        sudoku.render(UNIQUE),
    ):
        np.testing.assert_array_equal(sudoku.parse(text), expected)
    assert sudoku.to_text(expected.reshape(9, 9)) == UNIQUE


def test_render_draws_boxes():
    lines = sudoku.render(UNIQUE).split("\n")
    assert lines[0] == "5 3 . | . 7 . | . . ."
    assert lines[3] == lines[7] == "------+-------+------"
    assert len(lines) == 11


@pytest.mark.parametrize(
    "text, message",
    [
        (UNIQUE[:-1], "text: got 80 cells, expected 81"),
        (UNIQUE + "1", "got 82 cells"),
        ("x" + UNIQUE[1:], "got 'x' at cell 0"),
        ("²" + UNIQUE[1:], "got '²' at cell 0"),
        ("5.......5" + "." * 72, "got 5 at both row 1 column 1 and row 1 column 9"),
        ("7" + "." * 71 + "7" + "." * 8, "row 1 column 1 and row 9 column 1"),
        ("." * 60 + "4" + "." * 10 + "4" + "." * 9, "row 7 column 7 and row 8 column 9"),
        (7, "text: got int, expected str"),
    ],
)
def test_parse_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        sudoku.parse(text)


@pytest.mark.parametrize(
    "value, message",
    [
        (np.zeros(80, dtype=int), r"puzzle: got shape \(80,\)"),
        (np.zeros(81), "puzzle: got float64 from 0.0 to 0.0"),
        (np.full(81, 10), "puzzle: got int64 from 10 to 10"),
        (np.full(81, 3), "puzzle: got 3 at both"),
    ],
)
def test_arrays_are_checked_too(value, message):
    for function in (
        sudoku.count_solutions,
        sudoku.solve,
        sudoku.singles_only,
        lambda puzzle: sudoku.is_solution(puzzle, SOLVED),
    ):
        with pytest.raises(ValueError, match=message):
            function(value)


def test_the_checker_accepts_the_solution_only():
    solution = sudoku.parse(SOLVED)
    assert sudoku.is_solution(UNIQUE, SOLVED)
    assert sudoku.is_solution(sudoku.parse(UNIQUE), solution.astype(np.uint8).reshape(9, 9))
    for cell in range(0, 81, 7):
        wrong = solution.copy()
        wrong[cell] = wrong[cell] % 9 + 1
        assert not sudoku.is_solution(UNIQUE, wrong)


def test_the_checker_rejects_a_valid_grid_that_changes_a_given():
    relabelled = SOLVED.translate(str.maketrans("12", "21"))
    assert sudoku.is_solution("." * 81, relabelled)
    assert not sudoku.is_solution(UNIQUE, relabelled)


def test_the_checker_rejects_rows_that_hold_where_columns_do_not():
    assert not sudoku.is_solution("." * 81, np.tile(np.arange(1, 10), (9, 1)))
    latin = (np.arange(9)[:, None] + np.arange(9)) % 9 + 1  # rows and columns hold, boxes do not
    assert not sudoku.is_solution("." * 81, latin)


@pytest.mark.parametrize("answer", ["", "no idea", SOLVED[:-1], UNIQUE, "x" * 81, np.zeros((3, 3), dtype=int)])
def test_a_malformed_answer_is_a_wrong_answer(answer):
    assert not sudoku.is_solution(UNIQUE, answer)


def test_counts_of_known_puzzles():
    assert sudoku.count_solutions(UNIQUE) == sudoku.count_solutions(HARD) == sudoku.count_solutions(SOLVED) == 1
    assert sudoku.count_solutions(TWO) == sudoku.count_solutions(TWO, limit=100) == 2
    assert sudoku.count_solutions(TWO, limit=1) == 1
    assert sudoku.count_solutions("." * 81, limit=50) == 50
    assert sudoku.count_solutions("12345678." + "........9" + "." * 63) == 0
    with pytest.raises(ValueError, match="limit: got 0"):
        sudoku.count_solutions(UNIQUE, limit=0)


def test_counts_equal_plain_backtracking(pool):
    """Blanks taken from solved grids at random, so that many counts lie between 2 and the limit."""
    rng = np.random.default_rng(3)
    counts = []
    for solution in pool[1]:
        puzzle = np.where(rng.random(81) < 0.55, 0, solution)
        counts.append(sudoku.count_solutions(puzzle, limit=100))
        assert counts[-1] == plain_count(puzzle.tolist(), 100)
    assert len(set(counts)) > 3


def test_solve():
    assert sudoku.to_text(sudoku.solve(UNIQUE)) == SOLVED
    assert sudoku.is_solution(HARD, sudoku.solve(HARD))
    assert sudoku.solve("12345678." + "........9" + "." * 63) is None


def test_singles_solve_easy_puzzles_only():
    assert sudoku.singles_only(UNIQUE)
    assert not sudoku.singles_only(HARD)
    assert not sudoku.singles_only(TWO)
    assert not sudoku.singles_only("12345678." + "........9" + "." * 63)


def test_generate_gives_one_solution(pool):
    for puzzle, solution in zip(*pool, strict=False):
        assert (puzzle > 0).sum() == 30
        assert sudoku.count_solutions(puzzle) == 1
        assert sudoku.is_solution(puzzle, solution)
        np.testing.assert_array_equal(sudoku.solve(puzzle), solution)


def test_generate_ends_where_every_given_is_needed():
    puzzle, _ = sudoku.generate(random.Random(0), 17)
    givens = np.flatnonzero(puzzle)
    assert 17 <= len(givens) < 30
    for cell in givens:
        fewer = puzzle.copy()
        fewer[cell] = 0
        assert sudoku.count_solutions(fewer) == 2


def test_generate_is_reproducible_and_checks_clues():
    for first, second in zip(sudoku.generate(random.Random(5), 28), sudoku.generate(random.Random(5), 28), strict=False):
        np.testing.assert_array_equal(first, second)
    assert (sudoku.generate(random.Random(5), 28)[1] != sudoku.generate(random.Random(6), 28)[1]).any()
    for clues in (16, 82):
        with pytest.raises(ValueError, match=f"clues: got {clues}, expected 17 to 81"):
            sudoku.generate(random.Random(0), clues)


def test_augment_keeps_validity_and_uniqueness(pool):
    puzzles, solutions = sudoku.augment(*pool, np.random.default_rng(0))
    assert puzzles.dtype == np.uint8 and puzzles.shape == pool[0].shape
    for before, puzzle, solution in zip(pool[0], puzzles, solutions, strict=False):
        assert (puzzle > 0).sum() == (before > 0).sum()
        assert sudoku.is_solution(puzzle, solution)
        assert sudoku.count_solutions(puzzle) == 1
        assert sudoku.singles_only(puzzle) == sudoku.singles_only(before)


def test_augment_draws_for_every_row(pool):
    """A draw shared by the batch would give one board 500 times; a cell of the source must reach every cell."""
    mark = np.zeros((500, 81), dtype=np.int64)
    mark[:, 4] = 1
    puzzles, solutions = sudoku.augment(mark, np.tile(pool[1][:1].astype(np.int64), (500, 1)), np.random.default_rng(1))
    assert len(np.unique(solutions, axis=0)) == 500
    assert ((puzzles > 0).sum(axis=1) == 1).all()
    assert len(np.unique((puzzles > 0).argmax(axis=1))) == 81
    assert len(np.unique(puzzles.max(axis=1))) == 9


def test_augment_transposes_half():
    """Two marks in one band and different stacks stay in one band, unless the board is transposed: then they share a stack."""
    marks = np.zeros((1000, 81), dtype=np.uint8)
    marks[:, 0] = marks[:, 17] = 1
    puzzles, _ = sudoku.augment(marks, marks, np.random.default_rng(2))
    rows = np.nonzero(puzzles)[1].reshape(1000, 2) // 27
    share = (rows[:, 0] != rows[:, 1]).mean()
    assert 0.4 < share < 0.6  # six standard deviations around one half


def test_augment_is_reproducible_and_leaves_its_input(pool):
    before = pool[0].copy(), pool[1].copy()
    first, second = (sudoku.augment(*pool, np.random.default_rng(4)) for _ in range(2))
    for index in range(2):
        np.testing.assert_array_equal(first[index], second[index])
        np.testing.assert_array_equal(pool[index], before[index])


def test_sample_training_reveals_within_the_range(pool):
    puzzles, solutions = sudoku.sample_training(*pool, 1003, np.random.default_rng(0), extra_clues=(3, 12))
    assert puzzles.shape == solutions.shape == (1003, 81)
    clues = (puzzles > 0).sum(axis=1)
    assert set(clues) == set(range(33, 43))
    for puzzle, solution in list(zip(puzzles, solutions, strict=False))[::25]:
        assert sudoku.is_solution(puzzle, solution)
        assert sudoku.count_solutions(puzzle) == 1


def test_sample_training_ends(pool):
    rng = np.random.default_rng(0)
    assert ((sudoku.sample_training(*pool, 50, rng, extra_clues=(0, 0))[0] > 0).sum(axis=1) == 30).all()
    puzzles, solutions = sudoku.sample_training(*pool, 50, rng, extra_clues=(80, 80))
    np.testing.assert_array_equal(puzzles, solutions)
    assert sudoku.sample_training(*pool, 0, rng)[0].shape == (0, 81)


def test_batches_are_checked(pool):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"puzzles: got uint8 \(21, 80\), expected an integer array of shape \(N, 81\)"):
        sudoku.augment(pool[0][:, :80], pool[1], rng)
    with pytest.raises(ValueError, match="puzzles: got list"):
        sudoku.augment(pool[0].tolist(), pool[1], rng)
    with pytest.raises(ValueError, match="solutions: got 20 boards, expected 21"):
        sudoku.augment(pool[0], pool[1][:20], rng)
    with pytest.raises(ValueError, match=r"extra_clues: got \(5, 4\)"):
        sudoku.sample_training(*pool, 3, rng, extra_clues=(5, 4))
    with pytest.raises(ValueError, match="base_puzzles: got no boards"):
        sudoku.sample_training(pool[0][:0], pool[1][:0], 3, rng)


def test_the_command_line_writes_the_same_file_for_any_number_of_workers(tmp_path):
    files = []
    for workers in ("1", "2"):
        path = tmp_path / f"base{workers}.npz"
        sudoku.main(f"make --count 20 --clues 28-32 --seed 3 --save-every 8 --workers {workers} --out {path}".split())
        files.append(np.load(path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base1.npz", "base2.npz"]
    for name in ("puzzles", "solutions"):
        assert files[0][name].dtype == np.uint8 and files[0][name].shape == (20, 81)
        np.testing.assert_array_equal(files[0][name], files[1][name])
    clues = (files[0]["puzzles"] > 0).sum(axis=1)
    assert clues.min() >= 28 and clues.max() <= 32 and len(set(clues)) > 2


@pytest.mark.parametrize("option", ["--clues=abc", "--clues=30-20", "--clues=10", "--clues=1-2-3"])
def test_the_command_line_refuses_bad_clues(option, capsys):
    with pytest.raises(SystemExit):
        sudoku.main(["make", "--count", "1", "--out", "unused.npz", option])
    assert "expected" in capsys.readouterr().err
