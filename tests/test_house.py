"""The order of the house, read from the source: who imports whom, how, and what a file owes its readers.

transformers loads remote code by reading the source of flat files (`transformers.dynamic_module_utils`): relative imports
are found line by line with a regular expression, other imports outside of `try:` are taken as requirements.
"""

import ast
import functools
import importlib.util
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The rooms of each package and the files beside them, leaves first: who stands behind a `<` may import from whoever stands before it, and
# from nobody else.
ORDER = {
    "generation": "rules cache_names < arguments fast output < asking checks constraints vocabulary < watch < call contract < loop < "
    "decisions filling renoising < revising < mixin",
    "modeling_diffusiongemma": "version checkpoints layers < training weights < model < drop_in < console < quantize serve lm_evaluation",
}
PACKAGES = tuple(ORDER)
FILES = [path.relative_to(ROOT).as_posix() for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
ROOMS = sorted({file.rpartition("/")[0] for file in FILES} - set(PACKAGES))
REQUIRED = {"accelerate", "huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers"}
MAX_LINES = 600
REEXPORTED = {"DiffusionGemmaConfig", "DiffusionGemmaTextConfig"}
PUBLISHED_RULES = {"EntropyBoundSampler"}
DOOR = "modeling_diffusiongemma/drop_in"  # the room that users import, and that has the names of transformers' classes
RELEASED_MODULES = ("configuration_diffusion_gemma", "generation_diffusion_gemma", "modeling_diffusion_gemma")
RELATIVE_IMPORT_LINE = re.compile(r"^\s*(from|import)\s+\.", re.MULTILINE)

every_file = pytest.mark.parametrize("file", FILES)


def read(file):
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), filename=file)


def imports(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def absolute_modules(node):
    """Dotted names that an import statement loads; none where it is relative."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [] if node.level else [node.module]


def module_of(file):
    """Its dotted name; of an `__init__.py` its folder's."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def our_imports(file):
    """The statements of a file that import from our packages, each with the dotted name that it means; None where that is nothing."""
    folder, found = file.rpartition("/")[0].replace("/", "."), []
    for node in imports(read(file)):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = folder.split(".")[: folder.count(".") + 2 - node.level]
            found.append((node, ".".join([*parts, node.module]) if parts and node.module else None))
        else:
            found += [(node, name) for name in absolute_modules(node) if top(name) in PACKAGES]
    return found


def place(module):
    """What stands in the order: the room of a module, or the module itself where it lies beside the rooms."""
    return module.split(".")[1]


def top(module):
    return module.split(".")[0]


def unguarded(node):
    """Import statements under `node` that run when the module is imported and whose failure is not caught."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    caught = node.body if isinstance(node, ast.Try) and node.handlers else []
    for child in ast.iter_child_nodes(node):
        if child not in caught:
            yield from unguarded(child)


def where(file, nodes):
    return [f"{file}:{node.lineno}: {ast.unparse(node)}" for node in nodes]


def exported(tree):
    """The names in `__all__`, or None where the module has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def class_names(tree):
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_have_one_level_of_rooms(package):
    assert (ROOT / package / "__init__.py").is_file()
    assert [file for file in FILES if file.startswith(f"{package}/") and file.count("/") > 2] == []


@pytest.mark.parametrize("room", ROOMS)
def test_room_opens_with_what_it_is_for_and_what_it_does_not_know(room):
    """And with nothing else: whoever imports one file of a room would run whatever else stood there."""
    tree = read(f"{room}/__init__.py")
    assert (len(tree.body) == 1 or room == DOOR) and re.search(r"\bknows?\b", ast.get_docstring(tree))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_down_the_order_of_the_rooms(package):
    """So no two rooms import each other, not by way of a third either."""
    levels = {name: level for level, names in enumerate(ORDER[package].split("<")) for name in names.split()}
    files = [file for file in FILES if file.startswith(f"{package}/") and file.split("/")[1] not in ("__init__.py", "__main__.py")]
    assert {place(module_of(file)) for file in files} == set(levels)
    upwards = []
    for file in files:
        here = place(module_of(file))
        there = [(node, place(target)) for node, target in our_imports(file) if target and target.startswith(f"{package}.")]
        upwards += where(file, [node for node, name in there if name != here and levels[name] >= levels[here]])
    assert upwards == []


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("generation/")])
def test_generation_never_imports_the_model(file):
    assert where(file, [node for node, target in our_imports(file) if target and top(target) == "modeling_diffusiongemma"]) == []


@every_file
def test_files_of_ours_are_imported_by_name(file):
    """`from .file import A`, `from ..file import A` or `from ..room.file import A` in a package, `from generation.room.file import A` from
    the other: a remote-code repository takes no other form. No dot more than it needs."""
    wrong, package = [], file.rpartition("/")[0].split("/")
    for node, target in our_imports(file):
        parts = target.split(".") if target else [""]
        shared = len(package) if parts[: len(package)] == package else 1
        dots = len(package) - shared + 1 if parts[0] == package[0] else 0
        if isinstance(node, ast.Import) or node.level != dots or not (ROOT / f"{'/'.join(parts)}.py").is_file():
            wrong.append(node)
    assert where(file, wrong) == []


def test_imports_have_no_cycle():
    graph = {module_of(file): {target for _, target in our_imports(file)} for file in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"cycle: {' < '.join(error.args[1])}")


@every_file
def test_optional_imports_are_guarded(file):
    """Whatever setup.py does not require is imported in `try:` or in the function that needs it."""
    allowed = REQUIRED | sys.stdlib_module_names | set(PACKAGES)
    found = [node for node in unguarded(read(file)) if not allowed.issuperset(map(top, absolute_modules(node)))]
    assert where(file, found) == []


@every_file
def test_no_line_of_a_string_reads_as_a_relative_import(file):
    """transformers would take a docstring line that begins with `from .name import` for a file to download."""
    strings = [node for node in ast.walk(read(file)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert where(file, [node for node in strings if RELATIVE_IMPORT_LINE.search(node.value)]) == []


@every_file
def test_files_are_short(file):
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("file", [file for file in FILES if "/_" not in file or file.count("/") == 1 and Path(file).stem == "__init__"])
def test_public_modules_define_all(file):
    assert exported(read(file)) is not None, f"{file} has no `__all__`"


@functools.cache
def taken_by_transformers():
    taken = set()
    for module in RELEASED_MODULES:
        spec = importlib.util.find_spec(f"transformers.models.diffusion_gemma.{module}")
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        taken |= class_names(tree) | set(exported(tree))
    return taken


@every_file
def test_no_class_takes_the_name_of_one_in_transformers(file):
    """transformers looks up weight conversions by class name, so a model class of ours must not carry one of its names.

    `EntropyBoundSampler` is no model: it is the published name of a rule, in a package that holds no weights. The room that stands in for
    transformers' class has its names, and tests/test_drop_in.py that there are no conversions for them.
    """
    taken, tree = taken_by_transformers(), read(file)
    assert REEXPORTED < taken
    if file.startswith(DOOR):
        taken = set()
    assert class_names(tree) & taken <= PUBLISHED_RULES
    assert set(exported(tree) or []) & taken <= REEXPORTED | PUBLISHED_RULES


def test_lowest_requirements_differ_in_transformers_alone():
    def pins(name):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        return dict(line.split("==", 1) for line in lines if line and not line.startswith("#"))

    pinned, lowest = pins("requirements.txt"), pins("requirements-lowest.txt")
    assert {name for name in pinned | lowest if pinned.get(name) != lowest.get(name)} == {"transformers"}
    bound = re.search(r'"transformers>=([\d.]+)', (ROOT / "setup.py").read_text(encoding="utf-8")).group(1)
    assert lowest["transformers"].startswith(f"{bound}.")
