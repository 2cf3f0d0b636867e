"""A text revised: some of its positions become noise, and the canvases that hold it are denoised from there on.

The start is that of editing by noise (SDEdit, Meng et al. 2022, arXiv 2108.01073): the more of it, the more may change. The steps are those
of `generate`, in one call for each canvas, behind the canvases revised before it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .arguments import ARGUMENTS, read, shown
from .asking import check_text, end_of_turn, prompt_ids
from .call.configuration import DiffusionGenerationConfig
from .call.constrained import compile_languages
from .call.settings import pad_id, resolve_config, resolve_stopping, stop_ids
from .call.together import allowed_tokens, is_greedy
from .constraints.automaton import Automaton
from .loop.transcript import AfterCanvas
from .renoising import Positions, any_text, begun, choose, hold, likelihood, read_choice
from .rules.constraint import is_constraint
from .rules.draws import row_draws
from .rules.noise import make_noise
from .rules.stopping import StoppingRule
from .watch.callback import gather_watchers
from .watch.watcher import StreamerWatcher, Watcher, candidates_of, watch

# What `generate` takes, and a revised text says itself or has no place for.
REFUSED = (
    "inputs", "input_ids", "inputs_embeds", "attention_mask", "cache", "past_key_values", "decoder_input_ids", "first_step",
    "self_conditioning_logits", "pixel_values", "image_position_ids", "mm_token_type_ids", "stopping_criteria", "return_dict_in_generate",
    "output_scores", "output_logits",
)  # fmt: skip


class Revised(NamedTuple):
    """`text`, without special tokens; `tokens` int64 (m,), without an end. Of the n tokens of the text that was given: `renoised` bool
    (n,); `changed` bool (n,), where another token stands now, or none. `steps`: denoising steps of each canvas of it, 0 of one
    left alone; those of canvases that the text went on into count with the last."""

    text: str
    tokens: torch.Tensor
    renoised: torch.Tensor
    changed: torch.Tensor
    steps: tuple[int, ...]


class Call(NamedTuple):
    """What every call of `generate` for one text has. `before` int64 (1, P): the prompt; `new_tokens`: how many the text may have behind
    it; `stops`: ids that end it; `stopping`: as `generate` takes it; `others`: arguments that are no fields."""

    config: DiffusionGenerationConfig
    before: torch.Tensor
    new_tokens: int
    stops: list[int]
    stopping: StoppingRule | None
    watchers: list[Watcher]
    others: dict[str, Any]


class OneCall(Watcher):
    """Tells watchers of several calls of `generate`, one for each canvas, as of one, whose prompt is int64 (1, P).

    `canvas_index`: of the canvas with which the next call begins; `goes_on`: whether another call comes behind it.
    """

    def __init__(self, watchers: Sequence[Watcher], prompt: torch.Tensor):
        self.watchers, self.prompt, self.waiting = watchers, prompt, list(watchers)
        self.canvas_index, self.goes_on = 0, False
        self.wants_logits = any(watcher.wants_logits for watcher in watchers)
        self.candidates = candidates_of(watchers)

    def begin(self, schedule) -> None:
        for watcher in self.waiting:
            watcher.begin(schedule)

    def start(self, prompt: torch.Tensor) -> None:
        for watcher in self.waiting:
            watcher.start(self.prompt)
        self.waiting = []

    def step(self, canvas_index, step, places, state, prediction):
        return watch(self.watchers, self.canvas_index + canvas_index, step, places, state, prediction)

    def commit(self, tokens, lengths, finish_reasons) -> None:
        for watcher in self.watchers:
            watcher.commit(tokens, lengths, [None] if self.goes_on else finish_reasons)

    def stream(self, tokens: torch.Tensor, finish_reason: str | None) -> None:
        """Hands tokens (1, n), which no step made, to streamers alone."""
        for watcher in self.watchers:
            if not isinstance(watcher, StreamerWatcher):
                continue
            if watcher in self.waiting:
                watcher.start(self.prompt)
                self.waiting.remove(watcher)
            watcher.commit(tokens, tokens.new_full((1,), tokens.shape[1]), [finish_reason])


def revise(
    model, text: str, tokenizer, prompt: str | Sequence[dict[str, Any]] | None = None, noise: float | None = None,
    keep: Positions | str | None = None, where: Positions | str = "random", **settings,
) -> Revised:  # fmt: skip
    """The text with some of its positions written anew; see `DiffusionGenerationMixin.revise`."""
    # 1. Read.
    language, seed, generator = take(settings, "constraint", "seed", "generator")
    sees_predictions = is_constraint(language)
    call = read_call(model, tokenizer, prompt, settings)
    ids, offsets = read_text(tokenizer, text, call.new_tokens)
    choice = read_choice(text, offsets, len(ids), noise, keep, where)
    size = model.config.get_text_config().vocab_size
    if sees_predictions and keep is not None:
        raise ValueError(f"`constraint` is {shown(language)}, which sees predictions; expected a language, or none, together with `keep`")
    demanded = None if language is None or sees_predictions else compile_languages(language, tokenizer, 1, 1, size)[0]
    automaton = any_text(tokenizer, size) if demanded is None and keep is not None else demanded
    if keep is not None:
        hold(automaton, ids, choice.kept, exact=choice.alone)  # refused now, not behind a pass
    # 2. Renoise.
    draws = row_draws(seed, generator, 1, 1, fixed=is_greedy(call.config))
    length = call.config.canvas_length or model.config.canvas_length
    canvases = lay_out(ids, call, tokenizer, length)
    renoised = choice.told
    if renoised is None:
        log_probs = likelihood(model, call.before, canvases).flatten()[: len(ids)] if where == "uncertain" else None
        renoised = choose(draws, ~choice.kept, choice.noise, log_probs)
    kept = ~renoised if choice.alone else choice.kept
    source = make_noise(call.config.noise, size, call.config.mask_token_id)
    drawn = torch.cat([draws.at(place, -1).noise(source, (1, length), canvases.device) for place in range(len(canvases))])
    there = torch.nn.functional.pad(renoised, (0, canvases.numel() - len(ids))).view(canvases.shape).to(canvases.device)
    noisy = torch.where(there, drawn, canvases)
    # 3. Denoise.
    seeds = row_draws(draws.seeds[0], None, 1, len(canvases)).seeds  # one a canvas
    told, written, steps, state = OneCall(call.watchers, call.before), [], [], 0
    for place in range(len(canvases)):
        start, last = place * length, place == len(canvases) - 1
        told.canvas_index, told.goes_on = place, not last
        ahead = None if automaton is None else begun(automaton, state)
        if keep is not None:
            ahead = hold(ahead, ids[start:], kept[start:], choice.alone)
        of_text = ids[start : start + length].tolist()
        if not bool(there[place].any()) and stands(ahead, of_text, last):
            tokens, ended = canvases[place, : call.new_tokens - start].tolist(), last
            told.stream(canvases[place, None, : len(tokens)], "stop" if last else None)
            steps.append(0)
        else:
            share = int(there[place].sum()) / max(len(of_text), 1)
            first_step = min(round((1 - share) * call.config.max_denoising_steps), call.config.max_denoising_steps - 1)
            # Behind a canvas with others behind it no call goes on; and without a constraint the text does not end there.
            ends = {} if last else {"stopping_criteria": [AfterCanvas(lambda ids, scores: True)]}
            least = max((call.config.min_new_tokens or 0) - start, 0 if last or demanded is not None else length)
            output = model.generate(
                torch.cat((call.before, call.before.new_tensor([written])), dim=1), generation_config=call.config,
                decoder_input_ids=noisy[place : place + 1], first_step=first_step, max_new_tokens=call.new_tokens - start,
                min_new_tokens=least, canvas_length=length, return_dict_in_generate=True, tokenizer=tokenizer,
                watcher=told if call.watchers else None, seed=seeds[place], constraint=language if sees_predictions else ahead,
                stopping=call.stopping, **ends, **call.others,
            )  # fmt: skip
            tokens = output.sequences[0, call.before.shape[1] + len(written) :][: int(output.lengths[0])].tolist()
            steps.append(int(output.denoising_steps[0]))
            ended = last or tokens[-1] in call.stops
        tokens = tokens[: next((index for index, token in enumerate(tokens) if token in call.stops), len(tokens))]
        state, written = None if automaton is None else automaton.run(tokens, state), written + tokens
        if ended:
            break
    for watcher in call.watchers:
        watcher.end()
    tokens = torch.tensor(written, dtype=torch.int64, device="cpu")
    changed = torch.ones_like(renoised)
    both = min(len(ids), len(tokens))
    changed[:both] = ids[:both] != tokens[:both]
    return Revised(tokenizer.decode(written, skip_special_tokens=True), tokens, renoised, changed, tuple(steps))


def take(settings: dict[str, Any], *names: str) -> list[Any]:
    """Arguments of `generate` among settings, which lose them, read as it reads them; None for each that is not there."""
    return [read(name, settings.pop(name, None), ARGUMENTS[name]) for name in names]


def read_call(model, tokenizer, prompt, settings: dict[str, Any]) -> Call:
    """From the arguments of `generate` among those of `revise`.

    Raises:
        ValueError: one that a revised text does not take, or that `generate` refuses.
    """
    if given := [name for name in REFUSED if settings.get(name) is not None]:
        raise ValueError(f"`{given[0]}` is given to `revise`; expected None: `generate` takes it")
    others = {name: settings.pop(name) for name in ("logits_processor",) if name in settings}
    stopping, asked = take(settings, "stopping", "generation_config")
    told = take(settings, "callback_on_step_end", "callback_on_step_end_tensor_inputs", "streamer", "watcher")
    stopping = resolve_stopping(stopping, settings)
    config, use_max_length = resolve_config(asked, model.generation_config, settings)
    for name, fits, expected in (
        ("decoding", config.decoding == "diffusion", "'diffusion', since canvases are denoised"),
        ("backend", config.backend != "reference", "another than the reference, which draws for whole batches"),
        ("num_return_sequences", config.num_return_sequences in (None, 1), "1: a text is revised once"),
        ("max_time", config.max_time is None, "None: a text is revised to its end"),
        ("stop_strings", config.stop_strings is None, "None: a text is revised to its end"),
    ):  # fmt: skip
        if not fits:
            raise ValueError(f"`{name}` is {getattr(config, name)!r}; expected {expected}")
    before = prompt_ids(prompt, tokenizer, model.device)
    stops = stop_ids(config, model.config.get_text_config().vocab_size)
    if not stops:
        raise ValueError("`eos_token_id` holds no id of the vocabulary; expected at least one, with which a text ends")
    watchers = gather_watchers(model, config.max_denoising_steps, *told)
    new_tokens = allowed_tokens(config, use_max_length, before.shape[1])
    return Call(config, before, new_tokens, stops, stopping, watchers, others)


def read_text(tokenizer, text: str, most: int) -> tuple[torch.Tensor, list[tuple[int, int]] | None]:
    """Int64 (n,), and the characters that each token writes; None where the tokenizer does not say.

    Raises:
        ValueError: it is no text, empty, of more than `most` tokens, or not what its tokens write.
    """
    if not isinstance(text, str) or not text:
        raise ValueError(f"`text` is {shown(text)}; expected a string that is not empty")
    check_text("text", text)
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=False, **({"return_offsets_mapping": True} if fast else {}))
    ids = encoded["input_ids"]
    if (found := tokenizer.decode(ids, skip_special_tokens=True)) != text:
        raise ValueError(
            f"`text` is {shown(text)}, which the tokens of `tokenizer` write as {shown(found)}; expected a text as they write it"
        )
    if len(ids) > most:
        raise ValueError(f"`text` has {len(ids)} tokens; expected at most {most}, as `max_new_tokens` or `max_length` allow")
    return torch.tensor(ids, dtype=torch.int64, device="cpu"), encoded["offset_mapping"] if fast else None


def lay_out(ids: torch.Tensor, call: Call, tokenizer, length: int) -> torch.Tensor:
    """Int64 (canvases, C), as `generate` would have committed them: the text, the token that ends it where one may stand behind it, and
    padding."""
    end, pad = end_of_turn(tokenizer, call.stops), pad_id(call.config, call.stops)
    flat = torch.cat((ids, ids.new_tensor([end] * (len(ids) < call.new_tokens))))
    return torch.nn.functional.pad(flat, (0, -len(flat) % length), value=pad).view(-1, length).to(call.before.device)


def stands(ahead: Automaton | None, tokens: list[int], last: bool) -> bool:
    """Whether a canvas may stay as it is: `tokens` lead on to a text of `ahead`, or, on the last canvas, are one."""
    if ahead is None:
        return True
    state = ahead.run(tokens)
    return state is not None and (not last or bool(ahead.accepting[state]))


__all__ = ["Revised", "revise"]
