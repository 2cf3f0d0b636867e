"""Sudoku 9x9: read, draw, check, solve, generate and multiply puzzles.

Contract: a grid is 81 digits, row by row from the top left, 0 for a blank. Functions that take a puzzle accept text (see `parse`) or an
integer array (81,) or (9, 9). Everything random takes its generator as an argument. Needs NumPy and the standard library only (`make` also
tqdm); knows nothing about tokenisation or models.

The solver holds all candidates of a grid in one 729-bit integer, bit `81 * (digit - 1) + cell`, so that a few shifts count the candidates
of every cell, or the places of every digit in every unit, at once. Singles follow from the counts; search branches on a cell with the
minimum of remaining values. `augment` draws from the symmetry group of Sudoku (Russell and Jarvis, "Mathematics of Sudoku II", 2006).

    python examples/jobs/sudoku.py make --count 20000 --clues 26-36 --seed 0 --out base.npz --workers 2
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import random

import numpy as np

BLANKS = ".0_"
DECORATION = "|-+"
FEWEST_CLUES = 17  # no 9x9 puzzle with 16 clues has a unique solution (McGuire, Tugemann and Civario, 2012)

_BOX_STEPS = (0, 1, 2, 9, 10, 11, 18, 19, 20)
_BOX_CORNERS = (0, 3, 6, 27, 30, 33, 54, 57, 60)
_UNITS = np.array(
    [[9 * row + column for column in range(9)] for row in range(9)]
    + [[9 * row + column for row in range(9)] for column in range(9)]
    + [[corner + step for step in _BOX_STEPS] for corner in _BOX_CORNERS]
)  # (27, 9)
_PEERS = [sorted({int(peer) for unit in _UNITS if cell in unit for peer in unit} - {cell}) for cell in range(81)]

_EVERY_CELL = (1 << 81) - 1
_EVERY_DIGIT = sum(1 << 81 * digit for digit in range(9))  # all digits of cell 0; shift it left for another cell
_EVERYTHING = (1 << 729) - 1
_BIT = [1 << index for index in range(729)]
# What stays possible once a digit is placed: all but the same digit at the peers and the other digits in the cell.
_KEEP = [
    _EVERYTHING
    ^ sum(1 << 81 * digit + peer for peer in _PEERS[cell])
    ^ (sum(1 << 81 * other + cell for other in range(9)) ^ (1 << 81 * digit + cell))
    for digit in range(9)
    for cell in range(81)
]


# Rows, columns, boxes: shifts from a unit's corner to its cells, mask of all corners, multiplier that spreads a corner over its unit.
_FAMILIES = [
    (tuple(steps), sum(1 << corner for corner in corners) * _EVERY_DIGIT, sum(1 << step for step in steps))
    for steps, corners in ((range(9), range(0, 81, 9)), (range(0, 81, 9), range(9)), (_BOX_STEPS, _BOX_CORNERS))
]

# All 3!^4 = 1,296 orders of nine rows that keep bands together: bands permuted, then rows within each band.
_THREE = list(itertools.permutations(range(3)))
_LINE_ORDERS = np.array(
    [
        [3 * band + row for band, rows in zip(bands, within, strict=False) for row in rows]
        for bands, *within in itertools.product(_THREE, repeat=4)
    ]
)  # (1296, 9)


def _grid(name, value):
    """`value` (text, or an array of 81 digits) as a checked grid (81,) int8; ValueErrors start with `name`."""
    if isinstance(value, str):
        cells = [character for character in value if not character.isspace() and character not in DECORATION]
        for cell, character in enumerate(cells):
            if character not in "123456789" + BLANKS:
                raise ValueError(f"{name}: got {character!r} at cell {cell}, expected a digit or one of {BLANKS!r} for a blank.")
        if len(cells) != 81:
            raise ValueError(f"{name}: got {len(cells)} cells, expected 81.")
        values = [0 if character in BLANKS else int(character) for character in cells]
    else:
        array = np.asarray(value)
        if array.shape not in ((81,), (9, 9)):
            raise ValueError(f"{name}: got shape {array.shape}, expected (81,) or (9, 9).")
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 9:
            raise ValueError(f"{name}: got {array.dtype} from {array.min()} to {array.max()}, expected integers from 0 (blank) to 9.")
        values = array.ravel().tolist()
    for cell, digit in enumerate(values):
        for peer in _PEERS[cell] if digit else ():
            if values[peer] == digit:
                first, second = (f"row {where // 9 + 1} column {where % 9 + 1}" for where in (cell, peer))
                raise ValueError(f"{name}: got {digit} at both {first} and {second}, expected each digit once in a unit.")
    return np.array(values, dtype=np.int8)


def parse(text):
    """Reads a grid from text.

    Args:
        text: 81 characters, digits 1 to 9 and any of `.0_` for blanks; white space and `|-+` between them are decoration.

    Returns:
        (81,) int8, 0 for a blank.

    Raises:
        ValueError: a wrong character, a wrong number of cells, or a clash (names the two cells).
    """
    if not isinstance(text, str):
        raise ValueError(f"text: got {type(text).__name__}, expected str.")
    return _grid("text", text)


def render(grid):
    """Draws a grid as nine lines of digits with rules between the boxes; dots are blanks. `parse` reads it back."""
    text = to_text(grid)
    lines = [" | ".join(" ".join(text[start : start + 3]) for start in range(row, row + 9, 3)) for row in range(0, 81, 9)]
    rule = ["------+-------+------"]
    return "\n".join(lines[:3] + rule + lines[3:6] + rule + lines[6:])


def to_text(grid):
    """A grid as 81 characters, dots for blanks: the form that goes into a prompt."""
    return "".join(str(value) if value else "." for value in _grid("grid", grid).tolist())


def is_solution(puzzle, answer):
    """Whether `answer` solves `puzzle`: every row, column and box holds 1 to 9, and every given is kept.

    A malformed answer (a model may write anything) is a wrong answer; a malformed puzzle raises ValueError.
    """
    givens = _grid("puzzle", puzzle)
    try:
        filled = _grid("answer", answer)
    except ValueError:
        return False
    complete = bool((np.sort(filled[_UNITS], axis=1) == np.arange(1, 10)).all())
    return complete and bool(((givens == 0) | (givens == filled)).all())


def _candidates(values):
    """(all candidates left by the givens, the givens) as 729-bit integers."""
    candidates, placed = _EVERYTHING, 0
    for cell, value in enumerate(values):
        if value:
            index = 81 * value - 81 + cell
            candidates &= _KEEP[index]
            placed |= _BIT[index]
    return candidates, placed


def _propagate(candidates, placed):
    """Places naked and hidden singles until none is left.

    Invariant: the peers of every bit in `placed` are gone from `candidates`. Two singles that exclude each other erase each other, which
    the next count sees as an empty cell or an empty place.

    Returns:
        (candidates, placed), or (0, 0) where a cell or a digit of a unit has no place left.
    """
    while True:
        some = several = 0
        for shift in range(0, 729, 81):
            hit = candidates >> shift & _EVERY_CELL
            several |= some & hit
            some |= hit
        if some != _EVERY_CELL:
            return 0, 0
        single = ((some ^ several) * _EVERY_DIGIT & candidates) & ~placed
        if not single:
            for steps, corners, spread in _FAMILIES:
                some = several = 0
                for step in steps:
                    hit = candidates >> step & corners
                    several |= some & hit
                    some |= hit
                if some != corners:
                    return 0, 0
                single |= (some ^ several) * spread & candidates
            single &= ~placed
            if not single:
                return candidates, placed
        placed |= single
        while single:
            index = single.bit_length() - 1
            candidates &= _KEEP[index]
            single ^= _BIT[index]


def _branch(candidates, rng):
    """The candidate bits of an open cell that has the fewest; the first such cell, or one drawn by `rng`, its bits shuffled."""
    at_least = [_EVERY_CELL] + [0] * 10
    for shift in range(0, 729, 81):
        hit = candidates >> shift & _EVERY_CELL
        for count in range(9, 0, -1):
            at_least[count] |= at_least[count - 1] & hit
    fewest = next(exactly for count in range(2, 10) if (exactly := at_least[count] & ~at_least[count + 1]))
    cells = [cell for cell in range(81) if fewest >> cell & 1]
    cell = rng.choice(cells) if rng else cells[0]
    bits = [index for index in range(cell, 729, 81) if candidates >> index & 1]
    if rng:
        rng.shuffle(bits)
    return bits


def _search(candidates, placed, rng=None):
    """Yields every solution as a 729-bit integer; with `rng`, in a random order."""
    candidates, placed = _propagate(candidates, placed)
    if not candidates:
        return
    if candidates == placed:
        yield placed
        return
    for index in _branch(candidates, rng):
        yield from _search(candidates & _KEEP[index], placed | _BIT[index], rng)


def _values(placed):
    return [next(digit + 1 for digit in range(9) if placed >> 81 * digit + cell & 1) for cell in range(81)]


def count_solutions(puzzle, limit=2):
    """Counts solutions, and stops at `limit` (2: enough to tell a unique solution from several)."""
    if limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1.")
    return sum(1 for _ in itertools.islice(_search(*_candidates(_grid("puzzle", puzzle).tolist())), limit))


def solve(puzzle):
    """The first solution found as (81,) int8, or None where there is none."""
    placed = next(_search(*_candidates(_grid("puzzle", puzzle).tolist())), None)
    return None if placed is None else np.array(_values(placed), dtype=np.int8)


def singles_only(puzzle):
    """Whether naked and hidden singles alone solve `puzzle`: the easy class when results are stated by difficulty."""
    candidates, placed = _propagate(*_candidates(_grid("puzzle", puzzle).tolist()))
    return bool(candidates) and candidates == placed


def generate(rng, clues):
    """Makes a puzzle with one solution: fills a grid at random, then blanks cells in random order while the solution stays unique.

    A cell can be blanked when no solution of the rest holds another digit there. One pass is enough: what could not be blanked cannot be
    blanked later, with even fewer givens.

    Args:
        rng: `random.Random`.
        clues: number of givens to stop at, 17 to 81. The pass may end earlier, at a puzzle with more givens where each one is needed:
            often below 25, seldom above.

    Returns:
        puzzle, solution: (81,) int8.
    """
    if not FEWEST_CLUES <= clues <= 81:
        raise ValueError(f"clues: got {clues}, expected {FEWEST_CLUES} to 81.")
    start = [0] * 81
    for corner in (0, 30, 60):  # three boxes that share no row or column: any filling of them can be completed
        for step, digit in zip(_BOX_STEPS, rng.sample(range(1, 10), 9), strict=False):
            start[corner + step] = digit
    solution = _values(next(_search(*_candidates(start), rng)))

    puzzle = list(solution)
    left = 81
    for cell in rng.sample(range(81), 81):
        if left == clues:
            break
        puzzle[cell] = 0
        candidates, placed = _candidates(puzzle)
        if next(_search(candidates & ~_BIT[81 * solution[cell] - 81 + cell], placed), None) is None:
            left -= 1
        else:
            puzzle[cell] = solution[cell]
    return np.array(puzzle, dtype=np.int8), np.array(solution, dtype=np.int8)


def _check_pairs(**pairs):
    for name, boards in pairs.items():
        if not isinstance(boards, np.ndarray) or boards.ndim != 2 or boards.shape[1] != 81 or boards.dtype.kind not in "iu":
            got = f"{boards.dtype} {boards.shape}" if isinstance(boards, np.ndarray) else type(boards).__name__
            raise ValueError(f"{name}: got {got}, expected an integer array of shape (N, 81).")
    first, second = (len(boards) for boards in pairs.values())
    if first != second:
        raise ValueError(f"{name}: got {second} boards, expected {first}, one for each puzzle.")


def augment(puzzles, solutions, rng):
    """Applies a random symmetry of Sudoku to each pair: its own draw for every row of the batch, the same for puzzle and solution.

    Relabels digits (9!), orders rows and columns within bands and stacks, orders bands and stacks (1,296 each way), and transposes.
    Validity, the number of clues and the number of solutions stay as they were.

    Args:
        puzzles, solutions: (N, 81) integers, 0 for a blank.
        rng: `np.random.Generator`.

    Returns:
        puzzles, solutions: new arrays of the shapes and dtypes given.
    """
    _check_pairs(puzzles=puzzles, solutions=solutions)
    count = len(puzzles)
    rows, columns = _LINE_ORDERS[rng.integers(len(_LINE_ORDERS), size=(2, count))]  # (N, 9) each
    transposed = rng.integers(2, size=(count, 1), dtype=np.int8).astype(bool)
    down, across = np.where(transposed, rows, 9 * rows), np.where(transposed, 9 * columns, columns)
    board = np.arange(count)[:, None]
    source = (down[:, :, None] + (across + 81 * board)[:, None, :]).reshape(count, 81)  # (N, 81), into the flat batch

    labels = np.zeros((count, 10), dtype=np.int8)
    labels[:, 1:] = rng.random((count, 9)).argsort(axis=1) + 1
    labels, offset = labels.ravel(), 10 * board
    return tuple(labels[offset + boards.ravel()[source]].astype(boards.dtype) for boards in (puzzles, solutions))


def sample_training(base_puzzles, base_solutions, n, rng, extra_clues=(0, 20)):
    """Makes `n` training pairs from a pool: draws a pair, reveals some more of its solution, and augments it.

    Revealing cells keeps a unique solution unique, so no search is needed.

    Args:
        base_puzzles, base_solutions: (N, 81) integers, puzzles with one solution.
        n: number of pairs.
        rng: `np.random.Generator`.
        extra_clues: (fewest, most) cells to reveal, both included, uniform for each pair; with fewer blanks all are revealed.

    Returns:
        puzzles, solutions: (n, 81), dtypes as given.
    """
    _check_pairs(base_puzzles=base_puzzles, base_solutions=base_solutions)
    fewest, most = extra_clues
    if not 0 <= fewest <= most <= 80:
        raise ValueError(f"extra_clues: got {extra_clues}, expected (fewest, most) with 0 <= fewest <= most <= 80.")
    if n and not len(base_puzzles):
        raise ValueError("base_puzzles: got no boards, expected at least one.")
    chosen = rng.integers(len(base_puzzles), size=n)
    puzzles, solutions = base_puzzles[chosen], base_solutions[chosen]
    extra = rng.integers(fewest, most + 1, size=(n, 1))
    order = rng.random((n, 81))
    order[puzzles != 0] = 2.0  # givens come last, after every blank
    revealed = order < np.take_along_axis(np.sort(order, axis=1), extra, axis=1)
    return augment(np.where(revealed, solutions, puzzles), solutions, rng)


def _one(job):
    """Puzzle `index` of a seed; its own generator, so that the result depends neither on the count nor on the number of workers."""
    seed, index, (fewest, most) = job
    rng = random.Random(f"sudoku {seed} {index}")
    return generate(rng, rng.randint(fewest, most))


def save(path, puzzles, solutions):
    """Writes `puzzles` and `solutions` as uint8 arrays into one .npz, whole or not at all: a temporary file beside it, then a rename."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        np.savez_compressed(file, puzzles=np.asarray(puzzles, dtype=np.uint8), solutions=np.asarray(solutions, dtype=np.uint8))
    os.replace(temporary, path)


def make(count, clues, seed, out, workers=1, save_every=0):
    """Generates `count` puzzles into `out`, an .npz, with a progress line.

    Args:
        count: number of puzzles. A longer run begins with the puzzles of a shorter one.
        clues: (fewest, most) target numbers of givens, both included; each puzzle draws its own uniformly.
        workers: processes; the result does not depend on it.
        save_every: also write what is there after every so many puzzles; 0 writes once, at the end.
    """
    for name, value, least in (("count", count, 1), ("workers", workers, 1), ("save_every", save_every, 0)):
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}.")
    from tqdm import tqdm  # here, so that importing this file needs NumPy alone

    jobs = ((seed, index, clues) for index in range(count))
    pairs = []
    with multiprocessing.Pool(workers) if workers > 1 else contextlib.nullcontext() as pool:
        for pair in tqdm(pool.imap(_one, jobs, chunksize=16) if pool else map(_one, jobs), total=count, unit=" puzzles"):
            pairs.append(pair)
            if len(pairs) == count or (save_every and len(pairs) % save_every == 0):
                save(out, *zip(*pairs, strict=False))


def _clue_range(text):
    """'26' or '24-34' as (fewest, most)."""
    try:
        fewest, most = (int(part) for part in (text.split("-") if "-" in text else (text, text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number like 26 or a range like 24-34.") from None
    if not FEWEST_CLUES <= fewest <= most <= 81:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {FEWEST_CLUES} <= fewest <= most <= 81.")
    return fewest, most


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Sudoku puzzles with one solution.")
    command = parser.add_subparsers(dest="command", required=True).add_parser("make", help="generate puzzles into an .npz")
    command.add_argument("--count", type=int, required=True, help="number of puzzles")
    command.add_argument("--clues", type=_clue_range, default=(26, 26), help="target number of givens, 26, or a range, 24-34")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", required=True, help="path of the .npz")
    command.add_argument("--workers", type=int, default=1, help="processes")
    command.add_argument("--save-every", type=int, default=0, help="also write after every so many puzzles")
    options = parser.parse_args(arguments)
    make(options.count, options.clues, options.seed, options.out, options.workers, options.save_every)


if __name__ == "__main__":
    main()
