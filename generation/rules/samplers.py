"""What a denoising step makes of the canvas. Pure: tensors in, tensors out, no state.

A sampler is a frozen dataclass with one method, `propose`, and a name in `SAMPLERS`. Most accept some positions, which get the step's
sample, and renoise the others; they say which in `accept`, and every one accepts at least one position. The predictor-corrector follows
the reverse process instead.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch

from .prediction import Prediction


class Proposal(NamedTuple):
    """The next canvas, int64 `(B, C)`, and bool `(B, C)`: False where it holds fresh noise."""

    canvas: torch.Tensor
    accepted: torch.Tensor


class Sampler(Protocol):
    """An instance of one's own is passed to `generate` as `sampler`, and needs no `of`.

    `informed`: whether it needs what the canvas's tokens are worth: `current_log_probs` and `other` of the prediction, and `uniform`.
    `counts_steps`: whether what it does depends on `step`.
    """

    informed: ClassVar[bool]
    counts_steps: ClassVar[bool]

    @classmethod
    def of(cls, config, vocab_size: int) -> "Sampler":
        """As a `DiffusionGenerationConfig` says, whose fields are all set."""
        ...

    def propose(
        self,
        canvas: torch.Tensor,
        prediction: Prediction,
        noise: torch.Tensor,
        uniform: torch.Tensor | None,
        step: int,
        max_denoising_steps: int,
    ) -> Proposal:
        """Args: `canvas` int64 (B, C), what the prediction was made from; `noise` int64 (B, C); `uniform` float32 (B, C) in
        [0, 1), None unless `informed`; `step`, an int or an int64 tensor without dimensions, counts up from 0."""
        ...


def check_proposal(sampler: Sampler, proposal: Proposal, canvas: torch.Tensor) -> Proposal:
    """What a sampler returns must be int64 and bool, each of the canvas's shape (B, C). Returns it. Ids are not read."""
    found = proposal if isinstance(proposal, tuple) and len(proposal) == 2 else (None, None)
    for value, dtype in zip(found, (torch.int64, torch.bool), strict=True):
        if not isinstance(value, torch.Tensor) or value.dtype != dtype or value.shape != canvas.shape:
            raise ValueError(
                f"`sampler` is {sampler!r}, whose `propose` returned {type(proposal).__name__}; expected a `Proposal` of int64 and bool "
                f"tensors of shape {tuple(canvas.shape)}"
            )
    return Proposal(*found)


class AcceptingSampler:
    """A sampler that accepts positions and renoises the others."""

    informed = counts_steps = False

    def accept(self, prediction: Prediction, step: int, max_denoising_steps: int) -> torch.Tensor:
        """Returns bool `(B, C)`: True where a position is accepted. `step` counts up from 0."""
        raise NotImplementedError

    def propose(self, canvas, prediction, noise, uniform, step, max_denoising_steps) -> Proposal:
        accepted = self.accept(prediction, step, max_denoising_steps)
        return Proposal(torch.where(accepted, prediction.sample, noise), accepted)


@dataclass(frozen=True)
class EntropyBoundSampler(AcceptingSampler):
    """Accepts positions in ascending order of entropy while `cumulative - own <= entropy_bound`.

    The left side bounds the mutual information that is lost when the accepted positions are sampled independently of each
    other. Source: Ben-Hamu et al. 2025 (arXiv 2505.24857); the released model's sampler.

    Args:
        entropy_bound: nats; 0.1 in the released checkpoint.
    """

    entropy_bound: float

    def __post_init__(self):
        if not self.entropy_bound > 0:
            raise ValueError(f"`entropy_bound` is {self.entropy_bound!r}; expected a number > 0, in nats")

    @classmethod
    def of(cls, config, vocab_size: int) -> "EntropyBoundSampler":
        return cls(config.entropy_bound)

    def accept(self, prediction: Prediction, step: int = 0, max_denoising_steps: int = 1) -> torch.Tensor:
        ascending, order = prediction.entropy.sort(dim=-1)
        accepted = ascending.cumsum(dim=-1) - ascending <= self.entropy_bound
        return torch.zeros_like(accepted).scatter(-1, order, accepted)


@dataclass(frozen=True)
class ConfidenceSampler(AcceptingSampler):
    """Accepts every position whose most probable token has at least the probability `confidence`, and always the best one.

    Source: the threshold rule of Fast-dLLM (Wu et al. 2025, arXiv 2505.22618).
    """

    confidence: float

    def __post_init__(self):
        if not 0 < self.confidence <= 1:
            raise ValueError(f"`confidence` is {self.confidence!r}; expected a probability above 0, at most 1")

    @classmethod
    def of(cls, config, vocab_size: int) -> "ConfidenceSampler":
        return cls(config.confidence)

    def accept(self, prediction: Prediction, step: int = 0, max_denoising_steps: int = 1) -> torch.Tensor:
        top = prediction.log_probs.exp()
        best = torch.zeros_like(top, dtype=torch.bool).scatter(-1, top.argmax(dim=-1, keepdim=True), True)
        return (top >= self.confidence) | best


@dataclass(frozen=True)
class FixedStepsSampler(AcceptingSampler):
    """Accepts the `ceil(C * (step + 1) / max_denoising_steps)` most confident positions: the same number more at each step,
    the whole canvas at the last. Source: the linear schedule of MaskGIT (Chang et al. 2022, arXiv 2202.04200) and LLaDA."""

    counts_steps = True

    @classmethod
    def of(cls, config, vocab_size: int) -> "FixedStepsSampler":
        return cls()

    def accept(self, prediction: Prediction, step: int, max_denoising_steps: int) -> torch.Tensor:
        length = prediction.log_probs.shape[-1]
        count = -(-length * (step + 1) // max_denoising_steps)
        order = prediction.log_probs.argsort(dim=-1, descending=True, stable=True)
        among = (torch.arange(length, device=order.device) < count).expand_as(order)
        return torch.zeros_like(among).scatter(-1, order, among)


@dataclass(frozen=True)
class PredictorCorrectorSampler:
    """Follows the reverse of the uniform corruption, and between its steps resamples the tokens that fit least.

    With noise proportion t a canvas token is its clean token with probability 1 - t, and uniform over the V ids otherwise.

    - Predictor, from t to the next s < t: draws x from the denoiser p(x | canvas) and then the next token from the exact
      posterior q(next | token, x) (D3PM, Austin et al. 2021, arXiv 2107.03006). At s = 0 it is x itself.
    - Corrector, at t: one Gibbs step of the `positions` tokens of lowest conditional probability. Bayes' rule takes the token's
      own observation z out of the denoiser, which gives the leave-one-out posterior
          r(x) = p(x | canvas) / q(z | x), normalised, with q(z | x) = (1 - t) [x = z] + t / V,
      and the new token is drawn from (1 - t) r + t / V: what the noised position holds given all others.

    One predictor pass, then `corrector_steps` corrector passes, and again; at t = 0 nothing is corrected. The leave-one-out
    posterior, and correcting where the present token is least likely under it: Gourevitch et al. 2026 (arXiv 2605.22765), derived
    anew from its abstract.

    Args:
        vocab_size: V, the ids that the noise is drawn from.
        corrector_steps: corrector passes after each predictor pass; 0: none.
        positions: how many tokens a corrector pass resamples, at most the whole canvas.
    """

    vocab_size: int
    corrector_steps: int
    positions: int
    informed = counts_steps = True

    def __post_init__(self):
        if self.corrector_steps < 0:
            raise ValueError(f"`corrector_steps` is {self.corrector_steps!r}; expected an integer >= 0")
        if self.positions < 1:
            raise ValueError(f"`corrector_positions` is {self.positions!r}; expected a positive integer")

    @classmethod
    def of(cls, config, vocab_size: int) -> "PredictorCorrectorSampler":
        return cls(vocab_size, config.corrector_steps, config.corrector_positions)

    def propose(self, canvas, prediction, noise, uniform, step, max_denoising_steps) -> Proposal:
        cycle = 1 + self.corrector_steps
        levels, level = -(-max_denoising_steps // cycle), step // cycle
        level = level.float() if isinstance(level, torch.Tensor) else level  # two integers would divide in torch's default dtype
        following = 1 - (level + 1) / levels  # the noise proportion after this level's predictor
        predicted = self._predict(canvas, prediction, noise, uniform, 1 - level / levels, following)
        corrected = self._correct(canvas, prediction, noise, uniform, following)
        predicts = torch.as_tensor(step % cycle == 0, device=canvas.device)
        return Proposal(*(torch.where(predicts, one, other) for one, other in zip(predicted, corrected, strict=True)))

    def _predict(self, canvas, prediction, noise, uniform, now, following) -> Proposal:
        # The posterior's factors (keep [y = z] + (1 - keep) / V) and (clean [y = x] + (1 - clean) / V), multiplied out.
        clean, keep = 1 - following, (1 - now) / (1 - following)
        agree = (canvas == prediction.sample).to(uniform.dtype)
        stays = keep * following / self.vocab_size + agree * keep * clean
        anything = (1 - keep) * following / self.vocab_size
        moves = (1 - keep) * clean / self.vocab_size
        point = uniform * (stays + anything + moves)
        renoised = (point >= stays) & (point < stays + anything)
        return Proposal(torch.where(point < stays, canvas, torch.where(renoised, noise, prediction.sample)), ~renoised)

    def _correct(self, canvas, prediction, noise, uniform, now) -> Proposal:
        probability = prediction.current_log_probs.exp()
        this, others = probability * now, (1 - probability).clamp(min=0) * ((1 - now) * self.vocab_size + now)
        left_out = this / (this + others).clamp(min=torch.finfo(this.dtype).tiny)  # r(z): p(z) at t = 1, 0 at t = 0 unless p(z) = 1
        worst = prediction.current_log_probs.topk(min(self.positions, canvas.shape[-1]), dim=-1, largest=False).indices
        chosen = torch.zeros_like(canvas, dtype=torch.bool).scatter(-1, worst, True) & torch.as_tensor(now > 0, device=canvas.device)
        drawn = torch.where(uniform < now + (1 - now) * left_out, canvas, prediction.other)
        renoised = chosen & (uniform < now)
        return Proposal(torch.where(renoised, noise, torch.where(chosen, drawn, canvas)), ~renoised)


SAMPLERS: dict[str, type[Sampler]] = {  # as `sampler` of a generation config names them
    "entropy_bound": EntropyBoundSampler,
    "confidence": ConfidenceSampler,
    "fixed_steps": FixedStepsSampler,
    "predictor_corrector": PredictorCorrectorSampler,
}

__all__ = [
    "SAMPLERS", "AcceptingSampler", "ConfidenceSampler", "EntropyBoundSampler", "FixedStepsSampler", "PredictorCorrectorSampler",
    "Proposal", "Sampler", "check_proposal",
]  # fmt: skip
