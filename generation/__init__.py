"""Block-diffusion generation. Imports torch and transformers, never a model."""

from .configuration import DiffusionGenerationConfig
from .constraint import Constraint
from .events import CommitEvent, StepEvent, stream_events, stream_text
from .mixin import DiffusionGenerationMixin
from .noise import MaskNoise, Noise, UniformNoise
from .output import DiffusionGenerationOutput, TokenScores
from .prediction import Prediction, Wanted
from .samplers import ConfidenceSampler, EntropyBoundSampler, FixedStepsSampler, PredictorCorrectorSampler, Proposal, Sampler
from .schedule import TemperatureSchedule
from .state import CanvasState
from .stopping import StableAndConfident
from .streaming import CanvasStreamer
from .watcher import Watcher

__all__ = [
    "CanvasState",
    "CanvasStreamer",
    "CommitEvent",
    "ConfidenceSampler",
    "Constraint",
    "DiffusionGenerationConfig",
    "DiffusionGenerationMixin",
    "DiffusionGenerationOutput",
    "EntropyBoundSampler",
    "FixedStepsSampler",
    "MaskNoise",
    "Noise",
    "Prediction",
    "PredictorCorrectorSampler",
    "Proposal",
    "Sampler",
    "StableAndConfident",
    "StepEvent",
    "TemperatureSchedule",
    "TokenScores",
    "UniformNoise",
    "Wanted",
    "Watcher",
    "stream_events",
    "stream_text",
]
