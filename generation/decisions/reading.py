"""Reading canvases: a prompt that is prefilled once, canvases of noise behind it, and one canvas pass each; nothing is committed.

The noise of a read is its own, by the seed, the read's place and the canvas's, whatever else stands in the batch. More than one step are
steps of `generate` under the constraint that the canvas be one of those the options allow, and the last one is read.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from transformers import Cache, DynamicCache, PreTrainedTokenizerBase

from ..arguments import shown
from ..asking import Ends
from ..call.caches import dynamic_cache
from ..call.configuration import DiffusionGenerationConfig
from ..call.prompt import IMAGES
from ..call.settings import ends_of, resolve_config
from ..checks import check_ids, check_images
from ..contract import check_contract, passes_in_step
from ..loop.rows import Rows, plain_rows, select_cache
from ..rules.draws import RowDraws, row_draws
from ..rules.noise import Noise, make_noise
from ..watch.watcher import Watcher
from .allowed import canvas_automaton
from .layout import Layout
from .scores import Named, name_ids, named_log_probs, option_scores
from .spelling import Spelling


class How(NamedTuple):
    """How canvases are read.

    Args:
        reads: how many of other noise.
        steps: denoising steps of each, the last of which is read.
        seed: of the noise.
        canvas_length: positions of a canvas; None: the model's.
        cache: what stands before the prompt; stays as it is.
    """

    reads: int = 4
    steps: int = 1
    seed: int = 0
    canvas_length: int | None = None
    cache: Cache | None = None

    def check(self) -> None:
        """Raises ValueError for what is none of these."""
        for name, low in (("reads", 1), ("steps", 1), ("seed", 0), ("canvas_length", 1)):
            value = getattr(self, name)
            if (value is not None or name != "canvas_length") and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ValueError(f"`{name}` is {shown(value)}; expected an integer of at least {low}")
        if self.cache is not None and (type(self.cache) is not DynamicCache or not self.cache.get_seq_length()):
            raise ValueError(f"`cache` is {shown(self.cache)}; expected a `DynamicCache` that holds the tokens before the prompt, or None")


class Prepared(NamedTuple):
    """A model for the length of a call, and of it: `length`, positions of a canvas; how its `ends` are written; `noise`; `vocab_size`."""

    model: object
    length: int
    ends: Ends
    noise: Noise
    vocab_size: int


def settle(model, how: How, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """What a call needs to know of a model, whose generation config says pad, stop ids and the kind of noise.

    Raises:
        ValueError: `how` is out of range; the model does not keep `generation.contract`, or has no end of sequence.
    """
    how.check()
    check_contract(model)
    config, _ = resolve_config(None, model.generation_config or DiffusionGenerationConfig(), {})
    vocab_size = model.config.get_text_config().vocab_size
    ends, noise = ends_of(config, tokenizer, vocab_size), make_noise(config.noise, vocab_size, config.mask_token_id)
    return Prepared(model, how.canvas_length or model.config.canvas_length, ends, noise, vocab_size)


@torch.no_grad()
def read_canvases(
    given: Prepared, ids: torch.Tensor, layouts: Sequence[Layout], spelling: Spelling, how: How,
    images: Mapping[str, torch.Tensor] | None = None,
) -> dict[int, torch.Tensor]:  # fmt: skip
    """The scores of every question by its place: float64 (reads, options), nats.

    Args:
        ids (`int64 (1, P)`): the prompt, or what of it is not in `how.cache`.
        images: as `prefill` takes them.

    Raises:
        ValueError: ids or images that do not fit the model; logits that are NaN.
    """
    model, device = given.model, ids.device
    images = {name: images[name] for name in IMAGES if (images or {}).get(name) is not None}
    check_ids("input_ids", ids, given.vocab_size)
    check_images(ids, images.get("pixel_values"), getattr(model.config, "image_token_id", None))
    count = ids.shape[1] - (how.steps > 1)  # the last token is left for `generate` to prefill, which takes no prompt without any
    inputs = {"input_ids": ids[:, :count], **images}
    if "mm_token_type_ids" in images:
        inputs["mm_token_type_ids"] = images["mm_token_type_ids"][:, :count]
    cache = dynamic_cache(model.config.get_text_config()) if how.cache is None else select_cache(how.cache, ids.new_zeros(1))
    rows, last = plain_rows(inputs["input_ids"], cache), ids[:, count:]
    if hasattr(model, "check_prompt"):
        model.check_prompt(input_ids=ids, attention_mask=rows.commit(last).real, cache=how.cache, **images)
    draws = row_draws(how.seed, None, 1, how.reads)  # a seed for each read
    canvases = _noised(layouts, given, draws, device)
    with passes_in_step(model):
        if count:
            hidden = rows.prefill(model, inputs, count, last_states=1)
    rows = rows.select(torch.zeros(len(canvases), dtype=torch.int64, device="cpu"))
    rows = rows.commit(last.expand(len(canvases), -1))
    if how.steps > 1:
        canvases, soft_embeds = _after_steps(given, rows, canvases, layouts, spelling, how, [*draws.seeds] * len(layouts))
    else:
        soft_embeds = hidden.new_zeros((*canvases.shape, hidden.shape[-1]))
    with passes_in_step(model):
        view = rows.view(model, given.length)
        states = model.denoise(canvases, soft_embeds=soft_embeds, view=view).last_hidden_state
        found = {}
        for layout, read in zip(layouts, states.split(how.reads), strict=True):
            found |= _scores(model, read, layout, name_ids(layout, spelling, given.ends))
    return found


def _after_steps(
    given: Prepared, rows: Rows, canvases: torch.Tensor, layouts: Sequence[Layout], spelling: Spelling, how: How, seeds: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What the last of several steps reads, canvases and their soft embeddings; `rows` with the one token that is not in the cache yet."""
    taken = Taken(how.steps - 2)
    automata = [canvas_automaton(layout, spelling, given.ends, given.vocab_size) for layout in layouts]
    try:
        given.model.generate(
            input_ids=rows.committed[:, -1:], attention_mask=rows.real, cache=rows.cache, watcher=taken, decoder_input_ids=canvases,
            constraint=[automaton for automaton in automata for _ in range(how.reads)], max_denoising_steps=how.steps,
            canvas_length=given.length, max_new_tokens=given.length, stability_threshold=None, confidence_threshold=None, seed=seeds,
            decoding="diffusion", num_return_sequences=1,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"`steps` is {how.steps}, which are steps of `generate` by the model's generation config; {error}") from error
    if taken.canvas is None:
        raise ValueError(f"`max_time` of the model's generation config ended a canvas before {how.steps} steps; expected more")
    pinned, open_ = (
        torch.stack([getattr(layout, name) for layout in layouts]).to(canvases.device).repeat_interleave(how.reads, dim=0)
        for name in ("ids", "open")
    )
    return torch.where(open_, taken.canvas, pinned), taken.soft_embeds


def _scores(model, states: torch.Tensor, layout: Layout, named: Named) -> dict[int, torch.Tensor]:
    """Of the questions of one canvas, by their places; `states` `(reads, C, D)`."""
    places = layout.open.nonzero().flatten()
    log_probs = named_log_probs(model, states[:, places.to(states.device)], named.ids.to(states.device))
    found = {}
    for field, automata in zip(layout.fields, named.automata, strict=True):
        begin = int((places < field.begin).sum())
        found[field.place] = option_scores(log_probs[:, begin : begin + field.width], automata)
    return found


def _noised(layouts: Sequence[Layout], given: Prepared, draws: RowDraws, device: torch.device) -> torch.Tensor:
    """int64 (layouts * reads, C): every canvas with noise where it is open, by the draws of each read."""
    shape, found = (len(draws.seeds), given.length), []
    for place, layout in enumerate(layouts):
        noise = draws.at(place, -1).noise(given.noise, shape, device)
        found.append(torch.where(layout.open.to(device), noise, layout.ids.to(device)))
    return torch.cat(found)


class Taken(Watcher):
    """Ends a canvas after step `last`, and keeps what the next canvas pass would have read."""

    def __init__(self, last: int):
        self.last, self.canvas, self.soft_embeds = last, None, None

    def step(self, canvas_index, step, places, state, prediction):
        """As of `Watcher`."""
        if step != self.last:
            return None
        self.canvas, self.soft_embeds = state.canvas, state.soft_embeds
        return state._replace(finished=torch.ones_like(state.finished))


__all__ = ["How", "Prepared", "Taken", "read_canvases", "settle"]
