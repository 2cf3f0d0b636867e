"""One word for one thing: names in both packages hold no word that has been retired, or that means something else.

Read from the source: names of files, classes, functions, arguments, variables and attributes, where they are defined. Prose is free.
"""

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers
from transformers.models import diffusion_gemma

ROOT = Path(__file__).parents[1]
PACKAGES = ("generation", "modeling_diffusiongemma")
FILES = [path.relative_to(ROOT).as_posix() for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


class Retired(NamedTuple):
    """`say`: what instead, and why. `kept`: names of files in which the word means what it says there."""

    say: str
    kept: dict[str, str] = {}


# Retired as a whole name of a variable, an argument or an attribute, and free inside longer ones.
NAMES = {
    "number": Retired("canvas_index, step, index, place, count: which of these it is", {"arguments.py": "a kind of argument"}),
    "padding": Retired("`real`: masks are True at real tokens", {"prompt.py": "True at padding"}),
    "cur_step": Retired("`step`, which counts up from 0: transformers' counts down"),
    "x0": Retired("denoiser, argmax or accepted canvas: which of these it is"),
}
# Retired as a word of any name.
WORDS = {
    "statistics": Retired("`prediction`: what a canvas pass says of the canvas"),
    "context": Retired("`committed`: prompt and finished canvases", {"lm_evaluation.py": "lm-evaluation-harness's text before an answer"}),
    "room": Retired("`workspace` for what a walk computes in; room is slots that are free behind cached keys", {"caches.py": "these"}),
    **dict.fromkeys(
        ("part", "parts"),
        Retired(
            "`piece` for ids that are computed at a time, `tile` for ids that share a random draw",
            {"serve_requests.py": "of a message, as its API says",
             **dict.fromkeys(("fp8_layout.py", "fp8_quantizer.py", "nvfp4.py", "quantize.py"), "matrices that lie stacked in one")},
        ),
    ),
    "own": Retired("callers, given or ours: whose it is"),
    **dict.fromkeys(
        ("capture", "captured", "captures", "capturing"),
        Retired("`record`: the denoising step is recorded; CUDA captures", {"proofs.py": "CUDA's own"}),
    ),
    **dict.fromkeys(("timestep", "timesteps", "sigma"), Retired("`step`, or noise proportion")),
    "remask": Retired("`renoise`: released noise is a random token"),
    "nfe": Retired("tokens per forward"),
}  # fmt: skip
PUBLISHED_RULES = {"EntropyBoundSampler"}  # the name of a rule, in a package that holds no weights


def words_of(name):
    """`OwnProcessor2` and `own_processor2` are own, processor."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def defined(tree):
    """Every name that the source defines, where, and whether it is one of a variable, an argument or an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno, True
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno, True
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno, True
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno, False
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno, False
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, node.lineno, True


def retired(source, name):
    """Lines that say which name holds which retired word, and the word; none for words that are kept in a file of this name."""
    for identifier, line, is_value in [(Path(name).stem, 1, False), *defined(ast.parse(source))]:
        entries = {word: WORDS[word] for word in words_of(identifier) if word in WORDS}
        entries |= {identifier: NAMES[identifier]} if is_value and identifier in NAMES else {}
        for word, entry in entries.items():
            if Path(name).name not in entry.kept:
                yield word, f"{name}:{line}: `{identifier}` holds {word!r}; say {entry.say}"


@pytest.mark.parametrize("file", FILES)
def test_names_hold_no_retired_word(file):
    assert [message for _, message in retired((ROOT / file).read_text(encoding="utf-8"), file)] == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("room = 1", ["room"]),
        ("class CanvasContext: pass", ["context"]),
        ("def make(own_seed, *, number): pass", ["own", "number"]),
        ("for part in self.parts: self.number, count_padding = part, 1", ["part", "number"]),
        ("import torch as context", ["context"]),
        ("fields = [number for number in range(3)]", ["number"]),
        ("def number(contextual, padding_side): return padding.room(parts=3)", []),
        ("'own'  # part", []),
    ],
)
def test_words_are_found_where_a_name_is_defined(source, words):
    assert sorted(word for word, _ in retired(source, "generation/new.py")) == sorted(words)


def test_file_in_which_a_word_keeps_its_meaning_may_hold_it():
    assert list(retired("room = 1", "modeling_diffusiongemma/layers/caches.py")) == []
    assert [word for word, _ in retired("", "generation/statistics.py")] == ["statistics"]


@functools.cache
def exported_by_transformers():
    """Found once: so many names take a quarter of a second."""
    return set(dir(transformers))


@pytest.mark.parametrize("file", FILES)
def test_no_class_has_the_name_of_one_that_transformers_exports(file):
    """But where a room stands in for one of them, and for nothing else."""
    classes = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef)}
    stands_in = set(dir(diffusion_gemma)) if file.startswith("modeling_diffusiongemma/drop_in/") else set()
    assert classes & exported_by_transformers() <= PUBLISHED_RULES | stands_in
