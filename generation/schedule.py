"""The two schedules over a canvas's denoising steps, `step` counting up from 0."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TemperatureSchedule:
    """`t_min + (t_max - t_min) * noise proportion`: t_max at the first step, falling linearly towards t_min."""

    t_min: float
    t_max: float
    max_denoising_steps: int

    def noise_proportion(self, step: int) -> float:
        """`1 - step / max_denoising_steps`: 1 at the first step."""
        return (self.max_denoising_steps - step) / self.max_denoising_steps

    def temperature(self, step: int) -> float:
        return self.t_min + (self.t_max - self.t_min) * self.noise_proportion(step)


__all__ = ["TemperatureSchedule"]
