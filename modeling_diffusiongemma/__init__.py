"""DiffusionGemma for Transformers: the model, its loss, its checkpoints. Importing this package registers the Auto classes."""

import importlib.util
import pathlib

_spec = importlib.util.find_spec("generation")
if _spec is None or not (pathlib.Path(_spec.origin or "").parent / "mixin.py").is_file():
    raise ImportError(
        f"modeling_diffusiongemma needs its sibling package `generation`, but `import generation` finds "
        f"{_spec.origin if _spec else 'nothing'}; expected generation/mixin.py of this project earlier on sys.path"
    )

from .console_usage import answer_usage  # noqa: E402

answer_usage()  # before the seconds that the rest takes

from .auto import register  # noqa: E402
from .checkpoints import default_checkpoint  # noqa: E402
from .collator import BlockDiffusionCollator  # noqa: E402
from .configuration import DiffusionGemmaConfig, DiffusionGemmaTextConfig  # noqa: E402
from .four_bit import FourBitConfig  # noqa: E402
from .fp8_quantizer import FP8Config  # noqa: E402
from .head import DiffusionGemmaForMaskedBlockLM  # noqa: E402
from .loss import block_diffusion_loss  # noqa: E402
from .model import DiffusionGemmaBlockModel  # noqa: E402
from .outputs import BlockModelOutput, MaskedBlockOutput  # noqa: E402
from .rollout import Rollout  # noqa: E402
from .score import Score  # noqa: E402

register(DiffusionGemmaBlockModel, DiffusionGemmaForMaskedBlockLM)

__all__ = [
    "BlockDiffusionCollator",
    "BlockModelOutput",
    "DiffusionGemmaBlockModel",
    "DiffusionGemmaConfig",
    "DiffusionGemmaForMaskedBlockLM",
    "DiffusionGemmaTextConfig",
    "FP8Config",
    "FourBitConfig",
    "MaskedBlockOutput",
    "Rollout",
    "Score",
    "block_diffusion_loss",
    "default_checkpoint",
]
