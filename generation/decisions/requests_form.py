"""`decide` as transformers' pipeline "decision" calls it (transformers 5.23 and newer; before, there is no such pipeline).

A request, `{"state": ..., "questions": {name: {"type", "instructions", "criteria"}}}`, is rendered by the checkpoint's template into
prompts, and of each the model is asked to score the labels of its questions. What stands on the canvas: where the template reads
`questions`, the JSON object of their names and labels; where it reads one `question`, its label alone.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..arguments import shown
from ..asking import template_variables
from ..call.prompt import IMAGES
from .calibration import FILE, Calibration, find_files
from .deciding import score_questions
from .questions import Asked, checked
from .reading import How, settle

try:
    from transformers.decision.configuration_utils import DecisionConfig
    from transformers.decision.modeling_utils import DecisionMixin
except ImportError:  # before 5.23
    DecisionConfig, DecisionMixin = None, object

TEMPLATE = "decision_template.jinja"
KINDS = ("noul", "choice", "score")


if DecisionConfig is not None:

    @dataclass
    class DiffusionDecisionConfig(DecisionConfig):
        """transformers' `DecisionConfig` with what canvases need; in `decision.json` under the same names, where transformers' class passes
        over them.

        Args:
            bias: as in `Calibration`, by type.
            reads, steps, seed: as `decide` takes them.
            orders: over how many rotations of the options of choices and scores probabilities are averaged, so that their order cancels
                out; each is a prompt of its own.
        """

        bias: dict[str, list[float]] = field(default_factory=dict)
        reads: int = 4
        steps: int = 1
        seed: int = 0
        orders: int = 1

        def prepare_inputs(self, request: dict[str, Any] | str, processor) -> list[tuple[dict, list]]:
            """As `DecisionConfig.prepare_inputs`; inputs hold the tokenizer and the prompts of further orders, too."""
            if not isinstance(self.orders, int) or isinstance(self.orders, bool) or self.orders < 1:
                raise ValueError(f"`orders` of the decision config is {shown(self.orders)}; expected an integer of at least 1")
            prompts = super().prepare_inputs(request, processor)
            others = [super(DiffusionDecisionConfig, self).prepare_inputs(rotated(request, by), processor) for by in range(1, self.orders)]
            tokenizer = getattr(processor, "tokenizer", processor)
            return [
                ({**inputs, "tokenizer": tokenizer, "further_orders": [other[place][0]["input_ids"] for other in others]}, asked)
                for place, (inputs, asked) in enumerate(prompts)
            ]

else:
    DiffusionDecisionConfig = None


def rotated(request: dict[str, Any] | str, by: int) -> dict[str, Any]:
    """The request with the options of choices and scores `by` places on: what was at that place is the first. Yes and no have labels of
    their own, and stay."""
    given = json.loads(request) if isinstance(request, str) else request

    def turned(question: dict[str, Any]) -> dict[str, Any]:
        criteria = question["criteria"] if question["type"] != "noul" else None
        if criteria is None:
            return question
        items = list(criteria.items()) if isinstance(criteria, dict) else list(criteria)
        items = items[by % len(items) :] + items[: by % len(items)]
        return {**question, "criteria": dict(items) if isinstance(criteria, dict) else items}

    return {**given, "questions": {name: turned(question) for name, question in given["questions"].items()}}


class DecidesRequests(DecisionMixin):
    """Makes a model one that the pipeline asks for scores, and changes nothing of how it is loaded and saved: what `DecisionMixin` does
    there is handed on, since a checkpoint of this model has no head of its own for decisions.

    `calibration`: the checkpoint's, or one that is set. `decision_config`: the checkpoint's, with the calibration in it.
    """

    if DecisionConfig is None:
        calibration = Calibration()
    else:

        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            """As without decisions."""
            return super(DecisionMixin, cls).from_pretrained(*args, **kwargs)

        def post_init(self) -> None:
            """As without decisions."""
            super(DecisionMixin, self).post_init()

        def save_pretrained(self, *args, **kwargs) -> None:
            """As without decisions."""
            super(DecisionMixin, self).save_pretrained(*args, **kwargs)

        @property
        def decision_config(self) -> "DiffusionDecisionConfig":
            """transformers' `DecisionConfig`, with fields of canvases."""
            return self.__dict__.setdefault("_decision_config", DiffusionDecisionConfig())

        @decision_config.setter
        def decision_config(self, value: DecisionConfig) -> None:
            self.__dict__["_decision_config"] = value

        @property
        def calibration(self) -> Calibration:
            """What `decision_config` says of it."""
            return Calibration(self.decision_config.temperature, getattr(self.decision_config, "bias", {}))

        @calibration.setter
        def calibration(self, value: Calibration) -> None:
            given = {each.name: getattr(self.decision_config, each.name) for each in fields(self.decision_config)}
            said = {"temperature": dict(value.temperature), "bias": {key: list(values) for key, values in value.bias.items()}}
            self.decision_config = DiffusionDecisionConfig(**given | said)

    def load_decisions(self, name: str | None, **download: Any) -> None:
        """Reads what a checkpoint says of decisions, `decision.json` and `decision_template.jinja`; nothing where there is neither."""
        if name is None:
            return
        paths = find_files(name, FILE, TEMPLATE, **download)
        calibration = Calibration() if paths[FILE] is None else Calibration.from_file(paths[FILE])  # what it may not hold is said
        texts = {file: Path(path).read_text(encoding="utf-8") for file, path in paths.items() if path is not None}
        if DecisionConfig is None:
            self.calibration, self.__dict__["_decision_files"] = calibration, texts
            return
        config = DiffusionDecisionConfig.from_file(paths[FILE])
        config.chat_template = texts.get(TEMPLATE, config.chat_template)
        self.decision_config = config

    def save_decisions(self, folder: str | os.PathLike) -> None:
        """Writes them again, where there was anything."""
        if DecisionConfig is not None:
            if self.decision_config != DiffusionDecisionConfig():
                self.decision_config.save_pretrained(folder)
            return
        for file, text in self.__dict__.get("_decision_files", {}).items():
            (Path(folder) / file).write_text(text, encoding="utf-8")
        if self.calibration != Calibration():
            self.calibration.save(folder)


def decide_request(
    model, input_ids: Any, marks: Any, decision_questions: Any, decision_config: Any = None, tokenizer: Any = None,
    further_orders: Sequence[torch.Tensor] = (), **rest: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """The scores of the labels of each question, float32 (options,): their calibrated log-probabilities.

    Args:
        input_ids (`int64 (1, P)`): the prompt, which ends where the answer begins.
        marks (`int64 (n,)`): how many tokens stand before each mark; the last of them is P.
        decision_questions: transformers' `Question`s, each with a name, a type, options and labels.
        decision_config: default: the model's.
        tokenizer: default: that of the folder or name that the model was loaded from.
        further_orders (`int64 (1, P)` each): the prompt with its options 1, 2, ... places on.
        rest: images, as `prefill` takes them.

    Raises:
        ValueError: whatever of these does not fit, by name.
    """
    if DecisionConfig is None:
        raise ValueError("`input_ids` is given to `decide`; expected transformers 5.23 or newer, which has requests, or a `prompt`")
    config = model.decision_config if decision_config is None else decision_config
    if not isinstance(config, DecisionConfig):
        raise ValueError(f"`decision_config` is {shown(config)}; expected a `DecisionConfig`")
    if wrong := sorted(name for name, value in rest.items() if name not in IMAGES and value is not None):
        raise ValueError(f"`decide` got the unknown arguments {wrong}; expected those of transformers' `DecisionMixin.decide`, or images")
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or len(input_ids) != 1:
        raise ValueError(f"`input_ids` is {shown(input_ids)}; expected the ids of one prompt, of shape (1, length)")
    _check_marks(marks, input_ids.shape[1])
    asked = _read_asked(decision_questions)
    as_json = "questions" in template_variables(config.chat_template)  # transformers' generic prompt asks one question
    if len(asked) > 1 and not as_json:
        raise ValueError(f"`decision_questions` has {len(asked)} questions, and the template of `decision_config` reads one `question`")
    how = How(**{name: getattr(config, name, getattr(DiffusionDecisionConfig, name)) for name in ("reads", "steps", "seed")})
    calibration = Calibration(config.temperature, getattr(config, "bias", {}))
    tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
    settled, found = settle(model, how, tokenizer), []
    for by, ids in enumerate((input_ids, *further_orders)):
        scores, _ = score_questions(settled, ids.to(model.device), asked, tokenizer, how, as_json, rest)
        found.append([])
        for one, score, question in zip(asked, scores, decision_questions, strict=True):
            said = calibration.apply(score, one.name, one.kind).logsumexp(dim=0) - math.log(how.reads)
            found[-1].append(said if question.type == "noul" else said.roll(by, dims=0))
    means = [torch.stack(each).logsumexp(dim=0) - math.log(len(found)) for each in zip(*found, strict=True)]
    return [one.float().to(model.device) for one in means]


def _check_marks(marks: Any, length: int) -> None:
    if not isinstance(marks, torch.Tensor) or marks.dim() != 1 or not len(marks) or marks.is_floating_point():
        raise ValueError(f"`marks` is {shown(marks)}; expected integers of shape (marks,), at least one")
    places = marks.tolist()
    if min(places) < 1 or places[-1] != length:
        raise ValueError(
            f"`marks` is {places}; expected places from 1 to {length}, the last of them {length}: the answer stands behind the prompt"
        )


def _read_asked(given: Any) -> list[Asked]:
    if not isinstance(given, Sequence) or not given:
        raise ValueError(f"`decision_questions` is {shown(given)}; expected a list of at least one `Question`")
    found = []
    for one in given:
        missing = [name for name in ("name", "type", "options", "labels") if not hasattr(one, name)]
        if missing:
            raise ValueError(f"`decision_questions` holds {shown(one)}, which has no {missing}; expected a `Question`")
        if one.type not in KINDS:
            raise ValueError(f"`decision_questions` holds the type {one.type!r} of {one.name!r}; expected one of {list(KINDS)}")
        if len(one.labels) != len(one.options):
            raise ValueError(f"the question {one.name!r} has {len(one.labels)} labels for {len(one.options)} options; expected as many")
        found.append(checked(Asked(one.name, tuple(one.labels), one.type)))
    if len({one.name for one in found}) < len(found):
        raise ValueError(f"`decision_questions` has the names {[one.name for one in found]}; expected each once")
    return found


def _tokenizer_of(model: Any) -> Any:
    """That of the checkpoint; loaded once for a model."""
    if "_decision_tokenizer" not in model.__dict__:
        try:
            model.__dict__["_decision_tokenizer"] = AutoTokenizer.from_pretrained(model.name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(f"`tokenizer` is None, and {model.name_or_path!r} has none; expected the model's tokenizer") from error
    return model.__dict__["_decision_tokenizer"]


__all__ = ["DecidesRequests", "DiffusionDecisionConfig", "decide_request", "rotated"]
