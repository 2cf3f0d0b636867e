"""Repositories that carry their own code, for `trust_remote_code=True`.

transformers takes such code as one flat folder of Python files, in which siblings import each other as `from .name import A`; no
other import of ours would be found (`transformers.dynamic_module_utils`). So the two packages are laid flat:
`modeling_diffusiongemma/head.py` becomes `modeling_head.py`, `generation/mixin.py` becomes `generation_mixin.py`, and their
imports are rewritten. What travels is `head.py` and whatever it imports, directly or not; there is no list to keep.

This file travels too. In a repository its siblings are flat already, and are copied as they are.
"""

import ast
import importlib.util
import os
import re
from pathlib import Path

from .auto import REGISTERED
from .version import VERSION

PREFIXES = {"modeling_diffusiongemma": "modeling_", "generation": "generation_"}  # package: what its files' names begin with
OWN_PREFIX = Path(__file__).stem.removesuffix("remote_code")  # "" in the package, "modeling_" in a repository
ENTRY = Path(__file__).with_name(f"{OWN_PREFIX}head.py")  # holds every class that an Auto class loads
OUR_IMPORT = re.compile(r"from (\.|generation\.)(\w+) import\b")

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


def flat_name(path: Path) -> str:
    """Name of a source file in a repository."""
    return path.name if OWN_PREFIX else PREFIXES[path.parent.name] + path.name


def flatten(path: Path) -> tuple[str, list[Path]]:
    """The text of a source file as a repository holds it, and the files of ours that it imports.

    Raises:
        ValueError: an import of ours in another form than `from .sibling import A` or `from generation.file import A`.
    """
    text, needed = path.read_text(encoding="utf-8"), []
    lines = text.split("\n")
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in sorted(imports, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else ["." * node.level + (node.module or "")]
        if not any(name.startswith(".") or name.split(".")[0] in PREFIXES for name in names):
            continue
        line = lines[node.lineno - 1]
        found = OUR_IMPORT.match(line, node.col_offset)
        if found is None:
            raise ValueError(
                f"{path}:{node.lineno} has `{ast.unparse(node)}`; expected `from .sibling import A` or "
                "`from generation.file import A`: no other import of ours works in a remote-code repository"
            )
        folder = path.parent if found[1] == "." else Path(importlib.util.find_spec("generation").origin).parent
        needed.append(folder / f"{found[2]}.py")
        lines[node.lineno - 1] = f"{line[: found.start(1)]}.{flat_name(needed[-1]).removesuffix('.py')}{line[found.end(2) :]}"
    text = "\n".join(lines)
    if not OWN_PREFIX:
        text = NOTICE.format(version=VERSION, path=f"{path.parent.name}/{path.name}") + text
    return text, needed


def travelling_files() -> dict[str, str]:
    """Every Python file of a repository, name to text: `head.py` and whatever it imports of ours, directly or not."""
    files, waiting = {}, [ENTRY]
    while waiting:
        path = waiting.pop()
        if flat_name(path) not in files:
            files[flat_name(path)], needed = flatten(path)
            waiting += needed
    return dict(sorted(files.items()))


def auto_map() -> dict[str, str]:
    """What config.json says of the code: Auto class to file and class. All in one file, so that all share their modules."""
    return {auto: f"{flat_name(ENTRY).removesuffix('.py')}.{model}" for auto, model in REGISTERED.items()}


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


__all__ = ["auto_map", "flatten", "travelling_files", "write_card", "write_code"]
