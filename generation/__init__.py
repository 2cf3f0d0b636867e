"""Block-diffusion generation. Imports torch and transformers, never a model."""

from .canvas import CanvasState
from .configuration import DiffusionGenerationConfig
from .mixin import DiffusionGenerationMixin
from .noise import MaskNoise, Noise, UniformNoise
from .output import DiffusionGenerationOutput
from .samplers import EntropyBoundSampler
from .schedule import TemperatureSchedule
from .streaming import CanvasStreamer
from .stopping import StableAndConfident

__all__ = [
    "CanvasState",
    "CanvasStreamer",
    "DiffusionGenerationConfig",
    "DiffusionGenerationMixin",
    "DiffusionGenerationOutput",
    "EntropyBoundSampler",
    "MaskNoise",
    "Noise",
    "StableAndConfident",
    "TemperatureSchedule",
    "UniformNoise",
]
