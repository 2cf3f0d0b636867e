"""What one denoising step does to a canvas: noise, draws, samplers, stopping. Tensors in, tensors out; no rule knows a model, a
vocabulary walked in pieces, or what a caller asked for."""
