"""`decide` in its plain form: a prompt, questions with options, and what the model says of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..arguments import shown
from ..asking import prompt_ids
from .calibration import Calibration
from .layout import lay_out
from .questions import Asked, Decisions, make_decision, read_questions
from .reading import How, Prepared, read_canvases, settle
from .spelling import spelling_of


def decide(
    model, prompt: str | Sequence[Mapping[str, Any]], questions: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration | None = None, **how: Any,
) -> Decisions:  # fmt: skip
    """The answers; see `DiffusionGenerationMixin.decide`."""
    asked = read_questions(questions)
    if calibration is not None and not isinstance(calibration, Calibration):
        raise ValueError(f"`calibration` is {shown(calibration)}; expected a `Calibration`, or None for the checkpoint's")
    if wrong := sorted(how.keys() - set(How._fields)):
        raise ValueError(f"`decide` got the unknown arguments {wrong}; expected {list(How._fields)} or `calibration`")
    calibration = model.calibration if calibration is None else calibration
    chosen = How(**how)
    if prompt is None:
        raise ValueError("`prompt` is None; expected a text or a list of messages")
    ids = prompt_ids(prompt, tokenizer, model.device)
    settled = settle(model, chosen, tokenizer)
    scores, canvases = score_questions(settled, ids, asked, tokenizer, chosen)
    answers = {
        one.name: make_decision(one.options, each, calibration.apply(each, one.name, one.kind))
        for one, each in zip(asked, scores, strict=True)
    }
    return Decisions(answers, chosen.reads, canvases, chosen.reads * chosen.steps * canvases)


def score_questions(
    settled: Prepared, ids: torch.Tensor, asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, how: How, as_json: bool = True,
    images: Mapping[str, torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], int]:  # fmt: skip
    """Of every question its scores, float64 (reads, options), and on how many canvases they stand; `as_json`: as an object, or the option
    alone."""
    spelling = spelling_of(tokenizer, settled.vocab_size)
    layouts = lay_out(asked, tokenizer, spelling, settled.length, settled.ends, as_json)
    found = read_canvases(settled, ids, layouts, spelling, how, images)
    return [found[place] for place in range(len(asked))], len(layouts)


__all__ = ["decide", "score_questions"]
