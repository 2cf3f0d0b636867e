"""The `constraint` of a call of `generate` as the loops take it: one of the caller's that sees predictions, or languages, compiled for the
tokenizer, closed by the call's stop ids, and held against its length, all before anything is computed."""

from collections.abc import Sequence
from typing import Any

import torch

from ..arguments import shown
from ..constraints.automaton import Automaton, closed
from ..constraints.compiled import compile_constraint
from ..constraints.languages import Language
from .plan import Plan
from .progress import Progress, start_progress

EXPECTED = "a `Regex`, `JsonSchema`, `Choice`, `Template`, `ToolCalls` or `Pins`, a list with one for each prompt, or a `Constraint`"


def compile_languages(given: Any, tokenizer, prompts: int, copies: int, vocab_size: int) -> list[Automaton | None]:
    """The automata of `prompts * copies` rows, the copies of a prompt lying side by side; equal languages are compiled once.

    Args:
        given: a language or an `Automaton` for all, or a list with one for each prompt; None in it: no constraint.
        tokenizer: the model's, or a processor that has it.

    Raises:
        ValueError: something else, the wrong number of them, a tokenizer that is missing, or whatever is wrong with a language.
    """
    one_each = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * prompts
    if len(one_each) != prompts:
        raise ValueError(f"`constraint` has {len(one_each)} entries; expected {prompts}, one for each prompt")
    made: dict[Any, Automaton | None] = {None: None}
    for language in one_each:
        if not isinstance(language, Automaton | Language | None):
            raise ValueError(f"`constraint` is {shown(language)}; expected {EXPECTED}")
        if language in made:
            continue
        if isinstance(language, Automaton):
            made[language] = language
        elif tokenizer is None:
            raise ValueError(
                f"`tokenizer` is None; expected the tokenizer, since `constraint` is {shown(language)}; a pipeline is "
                "given it in its call, and does not hand over the one it has"
            )
        else:
            made[language] = compile_constraint(language, getattr(tokenizer, "tokenizer", tokenizer), vocab_size)
        if len(made[language].classes) != vocab_size:
            raise ValueError(f"`constraint` is for {len(made[language].classes)} ids; expected the model's vocabulary, {vocab_size}")
    return [made[language] for language in one_each for _ in range(copies)]


def bind(automata: Sequence[Automaton | None], plan: Plan, device: torch.device) -> Progress | None:
    """What the rows must write, with its end, before anything is written.

    Raises:
        ValueError: no stop id, one that a constraint itself writes, or a constraint whose shortest text is longer than a row may get.
    """
    stops, ended = plan.rules.eos.tolist(), {None: None}
    for automaton in automata:
        if automaton in ended:
            continue
        fewest = int(automaton.fewest[0])
        if fewest > plan.lengths.new_tokens:
            raise ValueError(
                f"`max_new_tokens` leaves {plan.lengths.new_tokens} tokens; expected at least {fewest}, the fewest of any text that "
                "`constraint` accepts"
            )
        ended[automaton] = closed(automaton, stops, plan.rules.pad)
    return start_progress([ended[automaton] for automaton in automata], plan.rules.pad, device)


__all__ = ["bind", "compile_languages"]
