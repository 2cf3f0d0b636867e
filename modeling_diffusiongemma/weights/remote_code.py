"""Repositories that carry their own code, for `trust_remote_code=True`.

transformers takes such code as one flat folder of Python files, in which siblings import each other as `from .name import A`; no
other import of ours would be found (`transformers.dynamic_module_utils`). So the two packages are laid flat, and underscores stand for
the folders between: `modeling_diffusiongemma/model/head.py` becomes `modeling_model_head.py`. Their imports are rewritten.
What travels is the entry and whatever it imports, directly or not; there is no list to keep.

This file travels too. In a repository its siblings are flat already, and are copied as they are.
"""

import ast
import contextlib
import importlib.util
import os
import re
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from ..version import VERSION
from .auto import REGISTERED

PREFIXES = {"modeling_diffusiongemma": "modeling", "generation": "generation"}  # package: what its files' names begin with
ENTRY = "modeling_diffusiongemma.drop_in.model"  # holds every class that an Auto class loads
IN_REPOSITORY = __name__.split(".")[0] not in PREFIXES
UP_TO_NAMES = re.compile(r"(from)\b.*?\b(import)\b", re.DOTALL)  # `from MODULE import`, also where it is broken over lines

NOTICE = """\
# SPDX-License-Identifier: Apache-2.0
# From modeling-diffusiongemma {version}, {path}; changed: this notice, and imports rewritten for a flat folder.

"""

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- diffusion_gemma
- block-diffusion
{tag}---

# {name}

A DiffusionGemma in the released layout, saved by modeling-diffusiongemma {version}. transformers' own class loads it:

```python
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("{name}")
```
"""
CODE_CARD = """
The Python files here are the implementation of modeling-diffusiongemma {version} (Apache-2.0), which this runs without installing
anything but transformers 5.17 or newer; read them first, and pin a `revision`:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
```

With the package `modeling_diffusiongemma` imported its installed code runs instead, with or without the flag.
"""


def flat_name(module: str) -> str:
    """Name of one of our modules in a repository: `generation.mixin` is `generation_mixin` there."""
    package, *inside = module.split(".")
    return "_".join([PREFIXES[package], *inside])


def source(module: str) -> Path:
    """The file that one of our modules would stand in, which need not be there."""
    package, *inside = module.split(".")
    return Path(importlib.util.find_spec(package).origin).parent.joinpath(*inside).with_suffix(".py")


def flatten(module: str) -> tuple[str, list[str]]:
    """The text of one of our modules as a repository holds it, and the modules of ours that it imports; ValueError where such an import
    names no file (`from . import name`, `import generation.name`), or does not begin its line."""
    path, package, needed = source(module), module.rpartition(".")[0], []
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in sorted(imports, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else ["." * node.level + (node.module or "")]
        if not any(name.startswith(".") or name.split(".")[0] in PREFIXES for name in names):
            continue
        target, before = "", lines[node.lineno - 1][: node.col_offset]
        with contextlib.suppress(ImportError):  # more dots than there are folders
            target = importlib.util.resolve_name(names[0], package)
        if isinstance(node, ast.Import) or before.strip() or "." not in target or source(f"{target}.__init__").is_file():
            forms = "`from .file import A`, `from ..room.file import A` or `from generation.room.file import A`"
            other = f"{forms}: no other import of ours works in a remote-code repository"
            raise ValueError(f"{path}:{node.lineno} has `{ast.unparse(node)}`; expected a line that begins with {other}")
        needed.append(target)
        start = sum(len(line) + 1 for line in lines[: node.lineno - 1]) + node.col_offset
        text = text[:start] + UP_TO_NAMES.sub(rf"\1 .{flat_name(target)} \2", text[start:], count=1)
    return NOTICE.format(version=VERSION, path=f"{module.replace('.', '/')}.py") + text, needed


def travelling_files() -> dict[str, str]:
    """Every Python file of a repository, name to text: the entry and whatever it imports of ours, directly or not. ValueError where two
    modules would have one name there, `generation.a_b` and `generation.a.b`; or as `flatten`."""
    if IN_REPOSITORY:
        entry = Path(__file__).with_name(f"{flat_name(ENTRY)}.py")
        paths = {entry, *map(Path, get_relative_import_files(entry))}
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(paths)}
    files, modules, waiting = {}, {}, [ENTRY]
    while waiting:
        module = waiting.pop()
        name = f"{flat_name(module)}.py"
        if (there := modules.setdefault(name, module)) != module:
            raise ValueError(f"{source(there)} and {source(module)} would both be {name} in a repository; expected other names")
        if name not in files:
            files[name], needed = flatten(module)
            waiting += needed
    return dict(sorted(files.items()))


def auto_map() -> dict[str, str]:
    """What config.json says of the code: Auto class to file and class. All in one file, so that all share their modules."""
    return {auto: f"{flat_name(ENTRY)}.{model}" for auto, model in REGISTERED.items()}


def write_code(folder: str | os.PathLike) -> None:
    """Writes the Python files into `folder`."""
    for name, text in travelling_files().items():
        (Path(folder) / name).write_text(text, encoding="utf-8", newline="\n")


def write_card(folder: str | os.PathLike, remote_code: bool, name: str = "ORGANIZATION/NAME") -> None:
    """Writes a model card, README.md, for the repository `name`; one that is there is left alone."""
    path = Path(folder) / "README.md"
    if not path.exists():
        text = CARD + CODE_CARD if remote_code else CARD
        text = text.format(tag="- custom_code\n" if remote_code else "", name=name, version=VERSION)
        path.write_text(text, encoding="utf-8", newline="\n")


__all__ = ["auto_map", "flat_name", "flatten", "travelling_files", "write_card", "write_code"]
