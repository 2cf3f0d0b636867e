"""Canvases to learn from that the model wrote itself.

A model that only ever sees corrupted responses meets at generation what it never learned from: its own guesses, right and wrong,
and its own self-conditioning, many steps deep. A `Rollout` holds rows in the middle of being denoised. Each optimizer step learns
the clean response from where they stand, and the logits of that very pass take them one denoising step further, so that rolling
out costs no pass of its own. Rows that finish, or have taken their steps, make room for new ones.

Sources: step-unrolled denoising (Savinov et al. 2022, arXiv 2112.06749), here without gradient through the steps and for as many as
generation takes; deep supervision over refinement steps (Wang et al. 2025, arXiv 2506.21734). Knows nothing of optimizers.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from generation.arguments import FIELDS, read, shown
from generation.call.plan import make_rules
from generation.call.settings import resolve_config
from generation.rules.draws import BatchDraws
from generation.rules.noise import Noise
from generation.rules.prediction import dense_prediction, narrowed
from generation.rules.samplers import Sampler
from generation.rules.state import CanvasState, advance, start_canvas

from .canvases import cut_canvases, random_canvas

Inputs = dict[str, torch.Tensor]

# Fields of a generation config that read the tokens before a position, or count them.
LOOKS_BEHIND = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "min_new_tokens", "min_length")


class Rollout:
    """Rows of training data, each with a canvas under way, one at random of those that its responses take.

        rollout = Rollout(model, rows=64)
        inputs, noised, soft_embeds = rollout.batch(draw)  # draw(count): input_ids, labels, attention_mask of new rows
        losses = block_diffusion_loss(model, **inputs, noised=noised, soft_embeds=soft_embeds)
        rollout.advance(losses.logits)

    Canvases begin as noise and are denoised by the rules of the model's `generation_config`, as `generate` would: temperatures, sampler,
    noise, filters, greedy or not, and stopping rules; but a row waits for what lies behind an end that the canvas is sure of, too, unless
    `ignore_after_eos` is True there. Random numbers are torch's global ones.

    Args:
        model: `DiffusionGemmaForMaskedBlockLM`; its weights of the moment are used.
        rows: how many are under way at once.
        max_steps: denoising steps after which a row is given up; at most the schedule's `max_denoising_steps`.
        canvas_length: default: the generation config's, or else the model's.
        noise (*optional*): what canvases begin with and unaccepted positions become. Default: the generation config's.
        sampler (*optional*): makes the next canvas, whichever step a row is at. Default: the generation config's.

    Raises:
        ValueError: `rows` or `max_steps` out of range, a sampler that counts steps or needs more than a prediction holds by itself, a
            generation config that `generate` would refuse, or one that looks at what stands before a position.
    """

    def __init__(
        self, model, rows: int, max_steps: int = 24, canvas_length: int | None = None, noise: Noise | None = None,
        sampler: Sampler | None = None,
    ):  # fmt: skip
        config, _ = resolve_config(None, model.generation_config, {})
        rules = make_rules(config, model.config.text_config.vocab_size, 0, model.device, None)
        sampler = rules.sampler if sampler is None else sampler
        if rows < 1:
            raise ValueError(f"`rows` is {rows}; expected at least 1")
        if not 1 <= max_steps <= config.max_denoising_steps:
            raise ValueError(f"`max_steps` is {max_steps}; expected 1 to {config.max_denoising_steps}, the schedule's steps")
        if sampler.counts_steps or sampler.informed:
            raise ValueError(
                f"`sampler` is {sampler!r}; expected one that asks for no step, such as `EntropyBoundSampler`: rows are at different steps"
            )
        if looks := [name for name in LOOKS_BEHIND if getattr(config, name) not in (None, 0, 1.0)]:
            got = f"`{looks[0]}` of the model's generation config is {shown(getattr(config, looks[0]))}"
            raise ValueError(f"{got}; expected it unset: a rollout has no text before its canvases")
        self.model, self.rows, self.max_steps, self.sampler = model, rows, max_steps, sampler
        canvas_length = read("canvas_length", canvas_length, FIELDS["canvas_length"])
        self.canvas_length = canvas_length or config.canvas_length or model.config.canvas_length
        self.noise = rules.noise if noise is None else noise
        self.rules = rules if config.ignore_after_eos else replace(rules, sure_end=None)
        self.stopping, self.temperatures = rules.stopping, rules.schedule.temperatures()
        self.inputs: Inputs | None = None
        self.state: CanvasState | None = None

    @torch.no_grad()
    def batch(self, draw: Callable[[int], Inputs]) -> tuple[Inputs, torch.Tensor, torch.Tensor]:
        """The rows as they stand, in the places of those that have ended new ones, whose inputs `draw` makes: tensors `(count, P)` of one
        length P.

        Returns: the inputs, tensors `(rows, P)`, and in `canvases`, int64 `(rows,)`, which canvas of its responses a row learns; the
        canvases, int64 `(rows, C)`; and their self-conditioning, `(rows, C, D)`, zero where
        a row has not taken a step.
        """
        if self.state is None:
            ended = torch.arange(self.rows, device="cpu")
        else:
            ended = (self.state.finished | (self.state.passes >= self.max_steps)).nonzero().flatten()  # places, int64
        if len(ended):
            fresh = dict(draw(len(ended)))
            device = fresh["input_ids"].device
            fill = self.model.config.text_config.pad_token_id
            canvases = cut_canvases(fresh["input_ids"], fresh["labels"], self.canvas_length, fill)
            # Where there is nothing to choose, no random number is drawn.
            single = canvases.there.shape[1] == 1
            fresh["canvases"] = torch.zeros_like(canvases.start[:, 0]) if single else random_canvas(canvases)
            shape, size = (len(ended), self.canvas_length), self.model.config.text_config.hidden_size
            soft_embeds = torch.zeros(*shape, size, dtype=self.model.dtype, device=device)
            state = start_canvas(self.noise.draw(shape, device), soft_embeds, self.stopping)
            if self.state is None:
                self.inputs, self.state = fresh, state
            else:
                rows = ended.to(device)
                self.inputs = {name: value.index_copy(0, rows, fresh[name]) for name, value in self.inputs.items()}
                self.state = self.state.place(rows, state)
        return self.inputs, self.state.canvas, self.state.soft_embeds

    @torch.no_grad()
    def advance(self, logits: torch.Tensor) -> None:
        """Takes every row one denoising step further, by the logits `(rows, C, V)` of its canvas."""
        state, draws = self.state, BatchDraws()
        temperatures, shaping = self.temperatures.to(logits.device)[state.passes], self.rules.shaping
        shaped = shaping(logits.detach().float(), shaping.filters, None, None, temperatures[:, None, None], 0)
        soft_embeds = self.model.soft_embed(narrowed(shaped, self.model.dtype)).to(self.model.dtype)  # other bits under autocast
        prediction = dense_prediction(shaped, draws, self.rules.greedy)._replace(soft_embeds=soft_embeds)
        noise = draws.noise(self.noise, tuple(state.canvas.shape), logits.device)
        steps, sure_end = len(self.temperatures), self.rules.sure_end
        self.state = advance(
            state, prediction, 0, steps, noise, self.sampler, self.stopping, sure_end, conditioning_steps=self.rules.conditioning_steps
        )


__all__ = ["Rollout"]
