"""How packages of any depth are laid flat: which imports are rewritten, which refused, and that what comes out runs."""

import importlib
import re
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_diffusiongemma.weights.remote_code import PREFIXES, flatten, travelling_files

SOURCE = '''"""A line of text may say: from reeds.noise import Noise."""

import torch
from transformers import Cache

from reeds.rules.noise import (
    MaskNoise as Masked,
    Noise,
)

from ..attention import Attention, \\
    Mask
from .depths.checks import check_mask  # kept
from . depths \\
    .layers import Layers
from .sibling import *

try:
    from ..attention import Experts
    from pond_model.import_names import Names
except ImportError:
    Experts = "é"; Names = None


def late():
    from reeds.draws import Draws

    return Draws
'''
FLAT = {  # what a statement becomes
    "from reeds.rules.noise import (": "from .reeds_rules_noise import (",
    "from ..attention import": "from .pond_attention import",
    "from .depths.checks import": "from .pond_room_depths_checks import",
    "from . depths \\\n    .layers import": "from .pond_room_depths_layers import",
    "from .sibling import": "from .pond_room_sibling import",
    "from pond_model.import_names import": "from .pond_import_names import",
    "    from reeds.draws import": "    from .reeds_draws import",
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Writes modules of two packages that the exporter takes for ours: dotted names to texts, in folders of any depth."""

    def write(sources):
        for module, text in sources.items():
            path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            for folder in path.relative_to(tmp_path).parents[:-1]:
                (tmp_path / folder / "__init__.py").touch()
        importlib.invalidate_caches()

    for package, prefix in (("pond_model", "pond"), ("reeds", "reeds")):
        monkeypatch.setitem(PREFIXES, package, prefix)
        write({f"{package}.leaf": ""})
    monkeypatch.syspath_prepend(tmp_path)
    return write


def test_imports_of_ours_are_rewritten_and_nothing_else(packages):
    packages({"pond_model.room.new": SOURCE})
    text, needed = flatten("pond_model.room.new")
    head, rest = text.split("\n\n", 1)
    expected = SOURCE
    for statement, flat in FLAT.items():
        expected = expected.replace(statement, flat)
    assert rest == expected and all(line.startswith("# ") for line in head.splitlines())
    modules = {f"pond_model.{name}" for name in ("attention", "room.depths.checks", "room.depths.layers", "room.sibling")}
    assert set(needed) == modules | {"pond_model.import_names", "reeds.rules.noise", "reeds.draws"}


@pytest.mark.parametrize(
    "statement",
    [
        "import reeds", "import torch, reeds.noise", "import pond_model.head as head",
        "from reeds import noise", "from . import noise", "from .. import noise", "from ..room import noise",
        "from reeds.room import noise", "from ...noise import Noise", "x = 2; from .noise import Noise",
        "if x: from .noise import Noise", "try:\n    import reeds\nexcept ImportError: pass", "def late():\n    from . import noise",
    ],
)  # fmt: skip
def test_import_in_another_form_is_refused_with_its_place(statement, packages, tmp_path):
    packages({"reeds.room.new": f"x = 1\n{statement}\n"})
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 'reeds' / 'room' / 'new.py'))}:[23] has `(import|from)"):
        flatten("reeds.room.new")


DEEP = {
    "pond_model.rooms.cellar.entry": "from ...top import A\nfrom ..near import B\nfrom reeds.far import C\n",
    "pond_model.rooms.near": "from .cellar.shelf import B\n",
    "pond_model.rooms.cellar.shelf": "from ...top import A as B\n",
    "pond_model.rooms.cellar.idle": "from .entry import A\n",
    "pond_model.top": "A = 1\n",
    "reeds.far": "C = 3\n",
}


def test_packages_of_any_depth_run_flat_and_keep_their_order(packages, monkeypatch, tmp_path):
    packages(DEEP)
    monkeypatch.setattr("modeling_diffusiongemma.weights.remote_code.ENTRY", "pond_model.rooms.cellar.entry")
    files = travelling_files()
    names = ["pond_rooms_cellar_entry", "pond_rooms_cellar_shelf", "pond_rooms_near", "pond_top", "reeds_far"]
    assert list(files) == [f"{name}.py" for name in names]
    folder = tmp_path / "flat_repository"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    found = get_relative_import_files(folder / "pond_rooms_cellar_entry.py")
    assert {Path(path).name for path in found} == files.keys() - {"pond_rooms_cellar_entry.py"}
    importlib.invalidate_caches()
    entry = importlib.import_module("flat_repository.pond_rooms_cellar_entry")
    assert (entry.A, entry.B, entry.C) == (1, 1, 3)
    packages({name: "\n".join(reversed(text.splitlines())) for name, text in DEEP.items()})
    assert list(travelling_files()) == list(files)


def test_two_modules_of_one_flat_name_are_refused(packages, monkeypatch, tmp_path):
    packages({"reeds.entry": "from .a_b import A\nfrom .a.b import B\n", "reeds.a_b": "", "reeds.a.b": ""})
    monkeypatch.setattr("modeling_diffusiongemma.weights.remote_code.ENTRY", "reeds.entry")
    with pytest.raises(ValueError, match=r"reeds_a_b\.py") as error:
        travelling_files()
    assert all(str(tmp_path / "reeds" / name) in str(error.value) for name in ("a_b.py", "a/b.py"))


def test_file_that_does_not_exist_is_an_error(packages, monkeypatch):
    packages({"reeds.new": "from .absent import A\n"})
    monkeypatch.setattr("modeling_diffusiongemma.weights.remote_code.ENTRY", "reeds.new")
    with pytest.raises(FileNotFoundError, match=r"absent\.py"):
        travelling_files()
