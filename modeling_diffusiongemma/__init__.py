"""DiffusionGemma for Transformers: the model, its loss, its checkpoints. Importing this package registers the Auto classes."""

import importlib.util
import pathlib

_spec = importlib.util.find_spec("generation")
if _spec is None or not (pathlib.Path(_spec.origin or "").parent / "mixin.py").is_file():
    raise ImportError(
        f"modeling_diffusiongemma needs its sibling package `generation`, but `import generation` finds "
        f"{_spec.origin if _spec else 'nothing'}; expected generation/mixin.py of this project earlier on sys.path"
    )

from .console.usage import answer_usage  # noqa: E402

answer_usage()  # before the seconds that the rest takes

from .checkpoints import default_checkpoint  # noqa: E402
from .drop_in.model import DiffusionGemmaForBlockDiffusion, DiffusionGemmaModel  # noqa: E402
from .layers.adapter_targets import lora_targets  # noqa: E402
from .layers.configuration import DiffusionGemmaConfig, DiffusionGemmaTextConfig  # noqa: E402
from .layers.outputs import BlockModelOutput, MaskedBlockOutput  # noqa: E402
from .model.block_model import DiffusionGemmaBlockModel  # noqa: E402
from .model.head import DiffusionGemmaForMaskedBlockLM  # noqa: E402
from .training.collator import BlockDiffusionCollator  # noqa: E402
from .training.loss import block_diffusion_loss  # noqa: E402
from .training.objective import Objective  # noqa: E402
from .training.rollout import Rollout  # noqa: E402
from .training.score import Score  # noqa: E402
from .weights.auto import register  # noqa: E402
from .weights.four_bit import FourBitConfig  # noqa: E402
from .weights.fp8_quantizer import FP8Config  # noqa: E402

register(DiffusionGemmaForMaskedBlockLM, DiffusionGemmaForBlockDiffusion, DiffusionGemmaModel)

__all__ = [
    "BlockDiffusionCollator", "BlockModelOutput", "DiffusionGemmaBlockModel", "DiffusionGemmaConfig", "DiffusionGemmaForMaskedBlockLM",
    "DiffusionGemmaTextConfig", "FP8Config", "FourBitConfig", "MaskedBlockOutput", "Objective", "Rollout", "Score", "block_diffusion_loss",
    "default_checkpoint", "lora_targets",
]  # fmt: skip
