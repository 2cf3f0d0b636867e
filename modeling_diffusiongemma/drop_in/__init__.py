"""For scripts that use transformers' class for this model: ours in its place, with its manners. All names of that class, and of what
Diffusers calls, stand in this room; the model and the generation know nothing of them.

    from modeling_diffusiongemma.drop_in import DiffusionGemmaForBlockDiffusion

    undo = modeling_diffusiongemma.drop_in.install()  # `transformers.DiffusionGemmaForBlockDiffusion` is this one, until `undo()`

`python -m modeling_diffusiongemma.drop_in script.py` runs a script that cannot be touched.
"""

from ..model.adapters import save_for_two_stacks
from .generation import DiffusionGemmaGenerationConfig, DiffusionGemmaGenerationOutput
from .install import install
from .model import DiffusionGemmaForBlockDiffusion, DiffusionGemmaModel

__all__ = [
    "DiffusionGemmaForBlockDiffusion", "DiffusionGemmaGenerationConfig", "DiffusionGemmaGenerationOutput", "DiffusionGemmaModel", "install",
    "save_for_two_stacks",
]  # fmt: skip
