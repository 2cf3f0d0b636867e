"""Block-diffusion generation. Imports torch and transformers, never a model."""

from .call.configuration import DiffusionGenerationConfig
from .constraints.automaton import Automaton
from .constraints.calls import RESPONSE_TEMPLATE
from .constraints.languages import Choice, JsonSchema, Pins, Regex, Template, ToolCalls
from .decisions.calibration import Calibration, fit_calibration
from .decisions.judging import judge
from .decisions.questions import Decision, Decisions
from .filling import Filled
from .loop.transcript import AfterCanvas
from .mixin import DiffusionGenerationMixin
from .output import DiffusionGenerationOutput, TokenScores
from .revising import Revised
from .rules.constraint import Constraint
from .rules.noise import MaskNoise, Noise, UniformNoise
from .rules.prediction import Prediction, Wanted
from .rules.samplers import ConfidenceSampler, EntropyBoundSampler, FixedStepsSampler, PredictorCorrectorSampler, Proposal, Sampler
from .rules.schedule import TemperatureSchedule
from .rules.state import CanvasState
from .rules.stopping import AnyOf, Never, Settled, StableAndConfident, StoppingRule
from .watch.events import CommitEvent, StepEvent, stream_events, stream_text
from .watch.streamer import CanvasStreamer
from .watch.trace import Trace
from .watch.watcher import Watcher

__all__ = [
    "AfterCanvas", "AnyOf", "Automaton", "Calibration", "CanvasState", "CanvasStreamer", "Choice", "CommitEvent", "ConfidenceSampler",
    "Constraint", "Decision", "Decisions", "DiffusionGenerationConfig", "DiffusionGenerationMixin", "DiffusionGenerationOutput",
    "EntropyBoundSampler", "Filled", "FixedStepsSampler", "JsonSchema", "MaskNoise", "Never", "Noise", "Pins", "Prediction",
    "PredictorCorrectorSampler", "Proposal", "RESPONSE_TEMPLATE", "Regex", "Revised", "Sampler", "Settled", "StableAndConfident",
    "StepEvent", "StoppingRule", "TemperatureSchedule", "Template", "TokenScores", "ToolCalls", "Trace", "UniformNoise", "Wanted",
    "Watcher", "fit_calibration", "judge", "stream_events", "stream_text",
]  # fmt: skip
