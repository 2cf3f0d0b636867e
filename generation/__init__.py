"""Block-diffusion generation. Imports torch and transformers, never a model."""

from .canvas import CanvasState
from .configuration import DiffusionGenerationConfig
from .mixin import DiffusionGenerationMixin
from .noise import MaskNoise, Noise, UniformNoise
from .output import DiffusionGenerationOutput, TokenScores
from .samplers import ConfidenceSampler, EntropyBoundSampler, FixedStepsSampler, Sampler
from .schedule import TemperatureSchedule
from .stopping import StableAndConfident
from .streaming import CanvasStreamer

__all__ = [
    "CanvasState",
    "CanvasStreamer",
    "ConfidenceSampler",
    "DiffusionGenerationConfig",
    "DiffusionGenerationMixin",
    "DiffusionGenerationOutput",
    "EntropyBoundSampler",
    "FixedStepsSampler",
    "MaskNoise",
    "Noise",
    "Sampler",
    "StableAndConfident",
    "TemperatureSchedule",
    "TokenScores",
    "UniformNoise",
]
