"""The order of the house, read from the source: who imports whom, how, and what a file owes its readers.

transformers loads remote code by reading the source of flat files (`transformers.dynamic_module_utils`): relative imports
are found line by line with a regular expression, other imports outside of `try:` are taken as requirements.
"""

import ast
import importlib.util
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("generation", "modeling_diffusiongemma")
FILES = [path.relative_to(ROOT).as_posix() for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
REQUIRED = {"accelerate", "huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers"}
MAX_LINES = 600
REEXPORTED = {"DiffusionGemmaConfig", "DiffusionGemmaTextConfig"}
PUBLISHED_RULES = {"EntropyBoundSampler"}
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


def siblings(tree):
    """The statements `from .sibling import name`."""
    return [node for node in imports(tree) if isinstance(node, ast.ImportFrom) and node.level and node.module]


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
def test_both_packages_are_flat(package):
    assert (ROOT / package / "__init__.py").is_file()
    assert [file for file in FILES if file.startswith(f"{package}/") and file.count("/") > 1] == []


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("generation/")])
def test_generation_never_imports_the_model(file):
    found = [node for node in imports(read(file)) if "modeling_diffusiongemma" in map(top, absolute_modules(node))]
    assert where(file, found) == []


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("modeling_diffusiongemma/")])
def test_the_model_imports_from_files_of_generation(file):
    found = [node for node in imports(read(file)) if "generation" in map(top, absolute_modules(node))]
    wrong = [node for node in found if isinstance(node, ast.Import) or node.module.count(".") != 1]
    assert where(file, wrong) == []
    absent = [node for node in found if node not in wrong and not (ROOT / f"{node.module.replace('.', '/')}.py").is_file()]
    assert where(file, absent) == []


@every_file
def test_siblings_are_imported_one_level_up_by_name(file):
    package = file.split("/")[0]
    wrong = [
        node
        for node in imports(read(file))
        if package in map(top, absolute_modules(node))
        or (isinstance(node, ast.ImportFrom) and node.level and not (node.level == 1 and node.module and "." not in node.module))
    ]
    assert where(file, wrong) == []


@every_file
def test_imported_siblings_exist(file):
    absent = [node for node in siblings(read(file)) if not (ROOT / file).with_name(f"{node.module}.py").is_file()]
    assert where(file, absent) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_relative_imports_have_no_cycle(package):
    graph = {Path(file).stem: {node.module for node in siblings(read(file))} for file in FILES if file.startswith(f"{package}/")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"cycle in {package}: {' < '.join(error.args[1])}")


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


@pytest.mark.parametrize("file", [file for file in FILES if Path(file).stem == "__init__" or not Path(file).stem.startswith("_")])
def test_public_modules_define_all(file):
    assert exported(read(file)) is not None, f"{file} has no `__all__`"


@every_file
def test_no_class_takes_the_name_of_one_in_transformers(file):
    """transformers looks up weight conversions by class name, so a model class of ours must not carry one of its names.

    `EntropyBoundSampler` is no model: it is the published name of a rule, in a package that holds no weights.
    """
    taken = set()
    for module in RELEASED_MODULES:
        spec = importlib.util.find_spec(f"transformers.models.diffusion_gemma.{module}")
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        taken |= class_names(tree) | set(exported(tree))
    assert REEXPORTED < taken
    tree = read(file)
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
