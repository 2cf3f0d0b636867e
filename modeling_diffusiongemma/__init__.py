"""DiffusionGemma for Transformers: the model, its loss, its checkpoints. Importing this package registers the Auto classes."""

import importlib.util
import pathlib
import sys

_spec = importlib.util.find_spec("generation")
if _spec is None or not (pathlib.Path(_spec.origin or "").parent / "mixin.py").is_file():
    raise ImportError(
        f"modeling_diffusiongemma needs its sibling package `generation`, but `import generation` finds "
        f"{_spec.origin if _spec else 'nothing'}; expected generation/mixin.py of this project earlier on sys.path"
    )


def _starts_console() -> bool:
    """Whether this import only leads to the console. It imports the rest when a command runs (`console_arguments.import_package`),
    so that `--help` and complaints about wrong usage do not wait for torch."""
    program, line = (sys.argv or [""])[0], sys.orig_argv
    script = pathlib.Path(program).name in ("diffusiongemma", "diffusiongemma.exe") and program in line  # not a worker it has spawned
    module = program == "-m" and __name__ in line and line[line.index(__name__) - 1] == "-m"
    return (script or module) and f"{__name__}.console" not in sys.modules


if not _starts_console():
    from .auto import register
    from .checkpoints import default_checkpoint
    from .collator import BlockDiffusionCollator
    from .configuration import DiffusionGemmaConfig, DiffusionGemmaTextConfig
    from .head import DiffusionGemmaForMaskedBlockLM
    from .model import DiffusionGemmaBlockModel
    from .outputs import BlockModelOutput, MaskedBlockOutput
    from .score import Score

    register()

__all__ = [
    "BlockDiffusionCollator",
    "BlockModelOutput",
    "DiffusionGemmaBlockModel",
    "DiffusionGemmaConfig",
    "DiffusionGemmaForMaskedBlockLM",
    "DiffusionGemmaTextConfig",
    "MaskedBlockOutput",
    "Score",
    "default_checkpoint",
]
