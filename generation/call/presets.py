"""Whole settings of generation by name. It imports nothing, so that a command line can name them without loading torch."""

PRESETS = {  # the released settings, and two measured in benchmarks/presets.py
    "released": {},
    "fast": {"entropy_bound": 0.3, "confidence_threshold": 0.05, "max_denoising_steps": 24},
    "thorough": {"entropy_bound": 0.05, "stability_threshold": 2, "max_denoising_steps": 96},
}

__all__ = ["PRESETS"]
