"""Block-diffusion generation. Imports torch and transformers, never a model."""

from .canvas import CanvasState
from .configuration import DiffusionGenerationConfig
from .events import CommitEvent, StepEvent, stream_events, stream_text
from .mixin import DiffusionGenerationMixin
from .noise import MaskNoise, Noise, UniformNoise
from .output import DiffusionGenerationOutput, TokenScores
from .samplers import ConfidenceSampler, EntropyBoundSampler, FixedStepsSampler, PredictorCorrectorSampler, Proposal, Sampler
from .schedule import TemperatureSchedule
from .stopping import StableAndConfident
from .streaming import CanvasStreamer

__all__ = [
    "CanvasState",
    "CanvasStreamer",
    "CommitEvent",
    "ConfidenceSampler",
    "DiffusionGenerationConfig",
    "DiffusionGenerationMixin",
    "DiffusionGenerationOutput",
    "EntropyBoundSampler",
    "FixedStepsSampler",
    "MaskNoise",
    "Noise",
    "PredictorCorrectorSampler",
    "Proposal",
    "Sampler",
    "StableAndConfident",
    "StepEvent",
    "TemperatureSchedule",
    "TokenScores",
    "UniformNoise",
    "stream_events",
    "stream_text",
]
