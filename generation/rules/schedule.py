"""The temperature over a canvas's denoising steps, `step` counting up from 0."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TemperatureSchedule:
    """`t_min + (t_max - t_min) * noise proportion`: t_max at the first step, falling linearly towards t_min. The noise
    proportion is `1 - step / max_denoising_steps`."""

    t_min: float
    t_max: float
    max_denoising_steps: int

    def temperatures(self) -> torch.Tensor:
        """Of every step, float32 `(max_denoising_steps,)`. In float32 from the start, as transformers computes it: the last bit of a
        temperature grows tenfold a step through self-conditioning and changes tokens after about eight."""
        remaining = torch.arange(self.max_denoising_steps, 0, -1, dtype=torch.float32, device="cpu")
        return self.t_min + (self.t_max - self.t_min) * (remaining / self.max_denoising_steps)


__all__ = ["TemperatureSchedule"]
