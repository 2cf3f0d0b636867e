"""Canvases to learn from that the model wrote itself.

A model that only ever sees corrupted responses meets at generation what it never learned from: its own guesses, right and wrong,
and its own self-conditioning, many steps deep. A `Rollout` holds rows in the middle of being denoised. Each optimizer step learns
the clean response from where they stand, and the logits of that very pass take them one denoising step further, so that rolling
out costs no pass of its own. Rows that finish, or have taken their steps, make room for new ones.

Sources: step-unrolled denoising (Savinov et al. 2022, arXiv 2112.06749), here without gradient through the steps and for as many as
generation takes; deep supervision over refinement steps (Wang et al. 2025, arXiv 2506.21734). Knows nothing of optimizers.
"""

from collections.abc import Callable

import torch

from generation.call.plan import schedule_of, stopping_of
from generation.rules.draws import BatchDraws
from generation.rules.noise import Noise, UniformNoise
from generation.rules.prediction import dense_prediction, narrowed
from generation.rules.samplers import EntropyBoundSampler, Sampler
from generation.rules.state import CanvasState, advance, start_canvas

from .canvases import cut_canvases, random_canvas

Inputs = dict[str, torch.Tensor]


class Rollout:
    """Rows of training data, each with a canvas under way, one at random of those that its responses take.

        rollout = Rollout(model, rows=64)
        inputs, noised, soft_embeds = rollout.batch(draw)  # draw(count): input_ids, labels, attention_mask of new rows
        losses = block_diffusion_loss(model, **inputs, noised=noised, soft_embeds=soft_embeds)
        rollout.advance(losses.logits)

    Canvases begin as noise and follow the released schedule: temperatures, entropy bound and stopping rules of the model's
    `generation_config`. Random numbers are torch's global ones.

    Args:
        model: `DiffusionGemmaForMaskedBlockLM`; its weights of the moment are used.
        rows: how many are under way at once.
        max_steps: denoising steps after which a row is given up; at most the schedule's `max_denoising_steps`.
        canvas_length: default: the config's.
        noise (*optional*): what canvases begin with and unaccepted positions become. Default: uniform random ids.
        sampler (*optional*): makes the next canvas, whichever step a row is at.

    Raises:
        ValueError: `rows` or `max_steps` out of range, a sampler that counts steps or needs more than a prediction holds by itself.
    """

    def __init__(
        self, model, rows: int, max_steps: int = 24, canvas_length: int | None = None, noise: Noise | None = None,
        sampler: Sampler | None = None,
    ):  # fmt: skip
        config = model.generation_config.filled()
        if rows < 1:
            raise ValueError(f"`rows` is {rows}; expected at least 1")
        if not 1 <= max_steps <= config.max_denoising_steps:
            raise ValueError(f"`max_steps` is {max_steps}; expected 1 to {config.max_denoising_steps}, the schedule's steps")
        if sampler is not None and (sampler.counts_steps or sampler.informed):
            raise ValueError(
                f"`sampler` is {sampler!r}; expected one that asks for no step, such as `EntropyBoundSampler`: rows are at different steps"
            )
        self.model, self.rows, self.max_steps = model, rows, max_steps
        self.canvas_length = model.config.canvas_length if canvas_length is None else canvas_length
        self.noise = UniformNoise(model.config.text_config.vocab_size) if noise is None else noise
        self.sampler = EntropyBoundSampler(config.entropy_bound) if sampler is None else sampler
        self.stopping, self.temperatures = stopping_of(config), schedule_of(config).temperatures()
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
        temperatures = self.temperatures.to(logits.device)[state.passes]
        shaped = logits.detach().float() / temperatures[:, None, None]
        soft_embeds = self.model.soft_embed(narrowed(shaped, self.model.dtype))
        prediction = dense_prediction(shaped, draws)._replace(soft_embeds=soft_embeds.to(self.model.dtype))  # other bits under autocast
        noise = draws.noise(self.noise, tuple(state.canvas.shape), logits.device)
        self.state = advance(state, prediction, 0, len(self.temperatures), noise, self.sampler, self.stopping)


__all__ = ["Rollout"]
