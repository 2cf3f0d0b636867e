"""Which positions of a text are renoised when it is revised, and which are kept, as a language that a canvas must write.

Knows the text as ids and characters; a model is asked for one thing, how likely it finds the tokens that stand there.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch

from .arguments import shown
from .call.caches import dynamic_cache
from .constraints.automaton import Automaton, make_automaton
from .constraints.compiled import compile_constraint
from .constraints.languages import Pins
from .contract import check_contract, passes_in_step
from .loop.rows import plain_rows
from .rules.draws import RowDraws
from .rules.prediction import check_finite, dense_prediction
from .vocabulary.walk import streamed_prediction

Positions: TypeAlias = torch.Tensor | Sequence[int] | Sequence[bool] | Sequence[tuple[int, int]] | Sequence[str]
NOISE = 0.3  # share of the positions that become noise, where nothing is said
EXPECTED = "token positions, a bool for each token, pairs (start, stop) of characters, or strings of the text"


class Selection(NamedTuple):
    """`kept` bool (n,): tokens that stay; `alone`: and all that are not renoised. `told` bool (n,): which are renoised; None: the share
    `noise` of those that are not kept."""

    kept: torch.Tensor
    alone: bool
    told: torch.Tensor | None
    noise: float


def read_selection(
    text: str, offsets: Sequence[tuple[int, int]] | None, count: int, noise: float | None, keep: Positions | str | None,
    where: Positions | str,
) -> Selection:  # fmt: skip
    """Of a text of `count` tokens.

    Raises:
        ValueError: no such choice, positions outside the text, nothing that may change, or arguments that contradict.
    """
    alone = isinstance(keep, str)
    if alone and keep != "others":
        raise ValueError(f"`keep` is {keep!r}; expected 'others', or a list of what is kept, such as [{keep!r}]")
    unsaid = keep is None or alone
    kept = torch.zeros(count, dtype=torch.bool, device="cpu") if unsaid else read_positions("keep", keep, text, offsets, count)
    if bool(kept.all()):
        raise ValueError(f"`keep` covers all {count} tokens of `text`; expected some that may change")
    if isinstance(where, str):
        if where not in ("random", "uncertain"):
            raise ValueError(f"`where` is {where!r}; expected 'random', 'uncertain', or a list of what is renoised, such as [{where!r}]")
        given = NOISE if noise is None else noise
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= 1:
            raise ValueError(f"`noise` is {shown(noise)}; expected a share above 0, at most 1, of the tokens that are not kept")
        return Selection(kept, alone, None, float(given))
    told = read_positions("where", where, text, offsets, count)
    if noise is not None:
        raise ValueError(f"`noise` is {shown(noise)}, and `where` says which positions are renoised; expected one of them")
    if not bool(told.any()):
        raise ValueError("`where` holds no position; expected at least one that is renoised")
    if both := (told & kept).nonzero().flatten().tolist():
        raise ValueError(f"`keep` and `where` both hold the token positions {both}; expected each in one of them at most")
    return Selection(kept, alone, told, 0.0)


def read_positions(name: str, given: Positions, text: str, offsets: Sequence[tuple[int, int]] | None, count: int) -> torch.Tensor:
    """Bool (count,): which tokens of `text` are meant. Of characters those are meant that write any of them, of a string every place.

    Args:
        given: int64 (k,) or a sequence of token positions; bool (count,); a sequence of pairs (start, stop) of characters; or one of
            strings, each of which the text holds.
        offsets: the characters that each token writes, from start to stop; None: the tokenizer does not say.

    Raises:
        ValueError: it is something else, or lies outside of the text.
    """
    if isinstance(given, torch.Tensor):
        if given.dim() != 1 or given.dtype not in (torch.bool, torch.int64, torch.int32):
            raise ValueError(f"`{name}` is {shown(given)}; expected {EXPECTED}")
        given = given.tolist()
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError(f"`{name}` is {shown(given)}; expected {EXPECTED}")
    kinds, found = {type(one) for one in given}, torch.zeros(count, dtype=torch.bool, device="cpu")
    if kinds == {bool}:
        if len(given) != count:
            raise ValueError(f"`{name}` has {len(given)} bools; expected {count}, one for each token of `text`")
        return torch.tensor(given, dtype=torch.bool, device="cpu")
    if kinds <= {int}:
        if outside := [place for place in given if not 0 <= place < count]:
            raise ValueError(f"`{name}` holds the positions {outside}; expected positions from 0 to {count - 1}, of the tokens of `text`")
        found[list(given)] = True
        return found
    if kinds == {str}:
        if missing := [piece for piece in given if not piece or piece not in text]:
            raise ValueError(f"`{name}` holds {missing}; expected strings that `text` holds")
        given = [(place, place + len(piece)) for piece in given for place in range(len(text)) if text.startswith(piece, place)]
    elif not all(isinstance(one, Sequence) and len(one) == 2 and {type(end) for end in one} == {int} for one in given):
        raise ValueError(f"`{name}` is {shown(given)}; expected {EXPECTED}")
    if outside := [span for span in given if not 0 <= span[0] < span[1] <= len(text)]:
        raise ValueError(f"`{name}` holds {outside}; expected characters from 0 to {len(text)}, where `text` ends")
    if offsets is None:
        raise ValueError(f"`{name}` is {shown(given)}, and `tokenizer` does not say which characters a token writes; expected positions")
    for place, (first, last) in enumerate(offsets):
        found[place] = any(first < stop and start < last for start, stop in given)
    return found


@torch.no_grad()
def likelihood(model, before: torch.Tensor, canvases: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, float32 (canvases, C) nats, of the tokens of clean canvases int64 (canvases, C), each behind the ids `before`
    int64 (1, P) and the canvases before it: one canvas pass each, at a temperature of 1 and without any filter, whatever the model's
    settings.

    A token sees itself there. Taking that out by Bayes' rule (`PredictorCorrectorSampler`) orders the positions of a canvas alike.

    Raises:
        ValueError: as `check_contract`, and `check_prompt` of the model; logits that are NaN.
    """
    check_contract(model)
    rows, new, found = plain_rows(before, dynamic_cache(model.config.get_text_config())), before, []
    if hasattr(model, "check_prompt"):
        model.check_prompt(input_ids=before, attention_mask=rows.real, cache=None)
    with passes_in_step(model):
        for canvas in canvases[:, None]:
            hidden = rows.prefill(model, {"input_ids": new}, new.shape[1], last_states=1)
            soft_embeds = hidden.new_zeros((*canvas.shape, hidden.shape[-1]))
            states = model.denoise(canvas, soft_embeds=soft_embeds, view=rows.view(model, canvas.shape[1])).last_hidden_state
            if not hasattr(model, "vocabulary_head") or model.why_dense(states.device) is not None:
                prediction = dense_prediction(model.compute_logits(states), rows.draws, True, canvas)
            else:
                with model.vocabulary_head() as head:
                    prediction = streamed_prediction(states, head, 1.0, rows.draws, True, canvas)
            check_finite(prediction.bad)
            found.append(prediction.current_log_probs.cpu())
            rows, new = rows.commit(canvas), canvas
    return torch.cat(found)


def choose(draws: RowDraws, free: torch.Tensor, noise: float, log_probs: torch.Tensor | None) -> torch.Tensor:
    """Bool (n,): the share `noise` of the positions `free` bool (n,), rounded, at least one: at random, or, where `log_probs` float32 (n,)
    are given, those of the least."""
    order = draws.uniforms((1, len(free)), free.device, "renoised")[0] if log_probs is None else log_probs
    count = max(1, round(noise * int(free.sum())))
    chosen = order.masked_fill(~free, float("inf")).argsort(stable=True)[:count]
    return torch.zeros_like(free).index_fill(0, chosen, True)


def any_text(tokenizer, vocab_size: int) -> Automaton:
    """The language of all ids that write text, none included."""
    classes = compile_constraint(Pins(*(torch.zeros(1, dtype=dtype, device="cpu") for dtype in (torch.int64, torch.bool))), tokenizer,
                                 vocab_size).classes  # fmt: skip
    zero = torch.zeros(1, dtype=torch.int64, device="cpu")
    return make_automaton(classes, zero, zero + 1, zero, zero == 0)


def hold(automaton: Automaton, ids: torch.Tensor, kept: torch.Tensor, exact: bool) -> Automaton:
    """The texts of `automaton` that hold the ids int64 (n,) where `kept` bool (n,) is True, and go on behind the last of these; `exact`:
    that have n tokens.

    Raises:
        ValueError: there is none.
    """
    length = len(ids) if exact else int(kept.nonzero().max()) + 1 if bool(kept.any()) else 0
    given, place = ids[:length][kept[:length]].unique(return_inverse=True)
    count, states = automaton.kinds, automaton.states
    classes = automaton.classes.clone()
    classes[given] = count + torch.arange(len(given), dtype=torch.int64, device="cpu")  # each is a class by itself
    edges, of_given = torch.stack((automaton.source, automaton.kind, automaton.target)), []
    for kind, before in enumerate(automaton.classes[given].tolist(), start=count):
        some = edges[:, automaton.kind == before].clone()
        some[1] = kind
        of_given.append(some)
    everywhere, turns = torch.cat((edges, *of_given), dim=1), iter(place.tolist())
    reached, found = torch.arange(states, dtype=torch.int64, device="cpu") == 0, []
    for position in range(length):  # a state is one of the automaton's and how many tokens there are
        allowed = of_given[next(turns)] if bool(kept[position]) else everywhere
        allowed = allowed[:, reached[allowed[0]]]
        found.append(allowed + allowed.new_tensor([[position * states], [0], [(position + 1) * states]]))
        reached = torch.zeros_like(reached).index_fill(0, allowed[2], True)
    if not exact:
        found.append(everywhere + everywhere.new_tensor([[length * states], [0], [length * states]]))
    accepting = torch.zeros((length + 1) * states, dtype=torch.bool, device="cpu")
    accepting[length * states :] = automaton.accepting
    try:
        return make_automaton(classes, *torch.cat((everywhere[:, :0], *found), dim=1), accepting)
    except ValueError as error:
        raise ValueError("`keep` holds tokens with which `constraint` accepts no text; expected some that stand in one") from error


__all__ = ["Positions", "Selection", "any_text", "choose", "hold", "likelihood", "read_selection"]
