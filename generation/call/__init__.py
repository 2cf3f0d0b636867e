"""What one call of `generate` is: its arguments, settings, prompt and cache, read and checked, and the plan that follows. It knows
no loop: nothing here runs a model."""
