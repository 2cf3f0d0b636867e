"""A text revised: some of its positions become noise, and the canvases that hold it are denoised from there on.

The start is that of editing by noise (SDEdit, Meng et al. 2022, arXiv 2108.01073): the more of it, the more may change. The rest is one
call of `generate`, to which the first canvases are given.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .arguments import ARGUMENTS, read_arguments, shown
from .asking import Ends, check_text, prompt_ids
from .call.configuration import DiffusionGenerationConfig
from .call.constrained import compile_languages
from .call.settings import ends_of, resolve_config
from .call.together import allowed_tokens, check_seeds, is_greedy
from .constraints.automaton import Automaton
from .renoising import Positions, any_text, choose, hold, likelihood, read_selection
from .rules.constraint import Constraint, is_constraint
from .rules.draws import row_draws
from .rules.noise import make_noise

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


def revise(
    model, text: str, tokenizer, prompt: str | Sequence[dict[str, Any]] | None = None, noise: float | None = None,
    keep: Positions | str | None = None, where: Positions | str = "random", **settings,
) -> Revised:  # fmt: skip
    """The text with some of its positions written anew; see `DiffusionGenerationMixin.revise`."""
    # 1. Read.
    settings = read_arguments(settings)
    config, use_max_length = read_config(model, settings)
    before, size = prompt_ids(prompt, tokenizer, model.device), model.config.get_text_config().vocab_size
    ends, source = ends_of(config, tokenizer, size), make_noise(config.noise, size, config.mask_token_id)
    new_tokens = allowed_tokens(config, use_max_length, before.shape[1])
    ids, offsets = read_text(tokenizer, text, new_tokens, ends.stops)
    selection = read_selection(text, offsets, len(ids), noise, keep, where)
    constraint = read_constraint(settings.get("constraint"), keep, tokenizer, size)
    demanded = isinstance(constraint, Automaton)
    if keep is not None:
        allowed = constraint if demanded else any_text(tokenizer, size)
        constraint = hold(allowed, ids, selection.kept, exact=selection.alone)  # refused now, not behind a pass
    # 2. Renoise.
    draws = row_draws(settings.get("seed"), settings.get("generator"), 1, 1, fixed=is_greedy(config))
    canvases = lay_out(ids, new_tokens, ends, config.canvas_length or model.config.canvas_length).to(before.device)
    renoised = selection.told
    if renoised is None:
        log_probs = likelihood(model, before, canvases).flatten()[: len(ids)] if where == "uncertain" else None
        renoised = choose(draws, ~selection.kept, selection.noise, log_probs)
    if selection.alone:
        constraint = hold(allowed, ids, ~renoised, exact=True)
    count, length = canvases.shape
    drawn = torch.cat([draws.at(place, -1).noise(source, (1, length), canvases.device) for place in range(count)])
    there = torch.nn.functional.pad(renoised, (0, canvases.numel() - len(ids))).view(count, length)
    noised = there.sum(dim=1).tolist()
    # 3. Denoise.
    unended = 0 if demanded else (count - 1) * length  # without a language no canvas but the last ends the text
    settings |= {
        "decoder_input_ids": torch.where(there.to(canvases.device), drawn, canvases).view(1, -1),
        "first_step": [begin(noised[place], min(len(ids) - place * length, length), config) for place in range(count)],
        "max_new_tokens": new_tokens, "max_length": None, "min_new_tokens": max(config.min_new_tokens or 0, unended),
        "constraint": constraint, "seed": draws.seeds[0], "generator": None, "tokenizer": tokenizer, "return_dict_in_generate": True,
    }  # fmt: skip
    output = model.generate(before, **settings)
    # 4. Compare.
    written = output.sequences[0, before.shape[1] :][: int(output.lengths[0])].to("cpu")
    written = written[:-1] if int(written[-1]) in ends.stops else written
    changed = torch.ones_like(renoised)
    both = min(len(ids), len(written))
    changed[:both] = ids[:both] != written[:both]
    steps = output.canvas_steps[0].tolist()
    steps[count - 1 :] = [sum(steps[count - 1 :])] if len(steps) >= count else []
    return Revised(tokenizer.decode(written.tolist(), skip_special_tokens=True), written, renoised, changed, tuple(steps))


def read_config(model, settings: dict[str, Any]) -> tuple[DiffusionGenerationConfig, bool]:
    """The configuration of the call, and whether `max_length` counts (`resolve_config`); `settings`: arguments of `generate`.

    Raises:
        ValueError: one that a revised text does not take, or that `generate` refuses.
    """
    if given := [name for name in REFUSED if settings.get(name) is not None]:
        raise ValueError(f"`{given[0]}` is given to `revise`; expected None: `generate` takes it")
    check_seeds(settings.get("seed"), settings.get("generator"))
    fields = {name: value for name, value in settings.items() if name not in ARGUMENTS}
    config, use_max_length = resolve_config(settings.get("generation_config"), model.generation_config, fields)
    for name, fits, expected in (
        ("decoding", config.decoding == "diffusion", "'diffusion', since canvases are denoised"),
        ("backend", config.backend != "reference", "another than the reference, which draws for whole batches"),
        ("num_return_sequences", config.num_return_sequences in (None, 1), "1: a text is revised once"),
        ("max_time", config.max_time is None, "None: a text is revised to its end"),
        ("stop_strings", config.stop_strings is None, "None: a text is revised to its end"),
    ):  # fmt: skip
        if not fits:
            raise ValueError(f"`{name}` is {getattr(config, name)!r}; expected {expected}")
    return config, use_max_length


def read_text(tokenizer, text: str, most: int, stops: Sequence[int]) -> tuple[torch.Tensor, list[tuple[int, int]] | None]:
    """Int64 (n,), and the characters that each token writes; None where the tokenizer does not say.

    Raises:
        ValueError: it is no text, empty, of more than `most` tokens, not what its tokens write, or holding one of the ids `stops`.
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
    if held := sorted(set(ids) & set(stops)):
        raise ValueError(f"`text` holds the ids {held}, which end a text by `eos_token_id`; expected a text without an end in it")
    if len(ids) > most:
        raise ValueError(f"`text` has {len(ids)} tokens; expected at most {most}, as `max_new_tokens` or `max_length` allow")
    return torch.tensor(ids, dtype=torch.int64, device="cpu"), encoded["offset_mapping"] if fast else None


def read_constraint(given: Any, keep: Positions | str | None, tokenizer, vocab_size: int) -> Automaton | Constraint | None:
    """What the text must be beside what is kept, as `constraint` of `generate` says it: a language, compiled; or one that sees predictions.

    Raises:
        ValueError: one that sees predictions, together with `keep`; as `compile_languages`.
    """
    if not is_constraint(given):
        return compile_languages(given, tokenizer, 1, 1, vocab_size)[0]
    if keep is not None:
        raise ValueError(f"`constraint` is {shown(given)}, which sees predictions; expected a language, or none, together with `keep`")
    return given


def lay_out(ids: torch.Tensor, new_tokens: int, ends: Ends, length: int) -> torch.Tensor:
    """Int64 (canvases, C), as `generate` would have committed them: the text, the token that ends it where one may stand behind it, and
    padding."""
    ended = torch.nn.functional.pad(ids, (0, int(len(ids) < new_tokens)), value=ends.turn)
    return torch.nn.functional.pad(ended, (0, -len(ended) % length), value=ends.pad).view(-1, length)


def begin(noised: int, tokens: int, config: DiffusionGenerationConfig) -> int:
    """The step that has the noise proportion of a canvas of `tokens`; without noise the one at which it stands as it is."""
    steps = config.max_denoising_steps
    return min(round((1 - noised / tokens) * steps), steps - 1) if noised else steps


__all__ = ["Revised", "revise"]
