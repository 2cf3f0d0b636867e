"""The small layers of DiffusionGemma: norms, rotary positions, the tied embedding, the gated MLP, self-conditioning.

Every module here is a pure function of the tensors it is given; none of them knows about caches, masks or generation.
Numerics follow Gemma 4: norms and rotary angles are computed in float32 whatever the weights' dtype.
Source: the released checkpoint's layout and config.json (google/diffusiongemma-26B-A4B-it), Gemma 4's published design.
"""

import torch
from torch import nn
from transformers import DiffusionGemmaTextConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from generation.call.caches import on_host
from generation.checks import readable


class RMSNorm(nn.Module):
    """Root-mean-square norm, `x / sqrt(mean(x^2) + eps) * weight`, in float32; without a scale if `with_scale=False`."""

    def __init__(self, size: int, eps: float = 1e-6, with_scale: bool = True):
        super().__init__()
        self.size, self.eps, self.with_scale = size, eps, with_scale
        self.weight = nn.Parameter(torch.ones(size)) if with_scale else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight, inputs = self.weight if self.with_scale else None, hidden_states
        if weight is not None and weight.dtype != inputs.dtype:
            weight, inputs = weight.float(), inputs.float()
        # PyTorch computes in float32 and rounds once at the end, in one kernel on a GPU; casting here would give the same bits in four.
        return nn.functional.rms_norm(inputs, (self.size,), weight, self.eps).type_as(hidden_states)


def rotary_frequencies(config: DiffusionGemmaTextConfig, layer_type: str) -> torch.Tensor:
    """Inverse frequencies of one layer type, float32 `(head_dim / 2,)`.

    `"default"` is `theta^(-2i/d)`; every other type (`"proportional"` on the released full-attention layers: the first
    quarter of the pairs rotate, the others stay) comes from transformers' table of RoPE types.
    """
    layer_config, parameters = config.per_layer_config[layer_type], config.rope_parameters[layer_type]
    if parameters["rope_type"] != "default":
        with on_host():
            frequencies, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](layer_config, "cpu", layer_type=layer_type)
        if scaling != 1.0:
            raise ValueError(f"`rope_parameters[{layer_type!r}]` scales attention by {scaling}; expected a type that does not")
        return frequencies.float()
    rotated = int(layer_config.head_dim * parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device="cpu") / rotated
    return 1.0 / parameters["rope_theta"] ** exponents


class RotaryPositions(nn.Module):
    """Cosines and sines of the rotary angles, for every layer type at once. The frequencies are no buffers: `.to(bfloat16)` must not round
    them, nor the meta device lose them. They are computed from the config at first use on a device."""

    def __init__(self, config: DiffusionGemmaTextConfig):
        super().__init__()
        self.config = config
        self._frequencies: dict[tuple[str, torch.device], torch.Tensor] = {}

    def __setattr__(self, name: str, value) -> None:
        """As of a module; ValueError for what transformers' module of this kind reads, and this one computes from the config."""
        if name.endswith(("inv_freq", "attention_scaling")):
            built = "`rope_parameters` of the text config from which a model is built"
            raise ValueError(f"`{name}` is set on the rotary positions, which compute theirs from the config; expected {built}")
        super().__setattr__(name, value)

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Args: `position_ids` integer `(B, L)`. Returns per layer type (cos, sin), each `(B, L, 1, head_dim)` in `dtype`."""
        tables = {}
        for layer_type in sorted(set(self.config.layer_types)):
            if (frequencies := self._frequencies.get((layer_type, position_ids.device))) is None:
                frequencies = rotary_frequencies(self.config, layer_type).to(position_ids.device)
                if readable(frequencies):  # what is traced belongs to the graph
                    self._frequencies[layer_type, position_ids.device] = frequencies
            angles = position_ids[..., None].float() * frequencies  # (B, L, head_dim / 2)
            angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)  # (B, L, 1, head_dim)
            tables[layer_type] = (angles.cos().to(dtype), angles.sin().to(dtype))
        return tables


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + head_dim / 2) of `states` `(B, L, heads, head_dim)` by the position's angles. Returns their dtype, which
    under autocast is not the angles'."""
    first, second = states.chunk(2, dim=-1)
    return (states * cos).add_(torch.cat((-second, first), dim=-1) * sin).to(states.dtype)


class ScaledEmbedding(nn.Embedding):
    """The embedding times `embed_scale`, sqrt(hidden_size), which is rounded to the weights' dtype first, as Gemma does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.embed_scale = self.embedding_dim**0.5

    @property
    def embed_scale(self) -> float:
        """Under this name adapters look for what multiplies their own rows too."""
        return self.scales[torch.float64]

    @embed_scale.setter
    def embed_scale(self, scale: float) -> None:
        # Numbers of the host: a tensor made in `forward` would be copied to the device, which waits for it, at every step.
        scale = torch.tensor(float(scale), dtype=torch.float64, device="cpu")
        self.scales = {dtype: scale.to(dtype).item() for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Args: integer ids `(B, L)`. Returns `(B, L, D)`."""
        return super().forward(input_ids) * self.scales[self.weight.dtype]

    def expect(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The mean row, `(B, L, D)`, under distributions `(B, L, V)`; called by `plain.expected_embedding` alone."""
        return torch.matmul(probabilities.to(self.weight.dtype), self.weight) * self.scales[self.weight.dtype]


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, config: DiffusionGemmaTextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class SelfConditioning(GatedMLP):
    """Adds what the previous denoising step believed to the canvas embeddings: `norm(canvas + mlp(norm(soft)))` (self-conditioning: Chen et
    al. 2022, arXiv 2208.04202). The last norm has no scale and runs also at the first step, where the soft embedding is zero."""

    def __init__(self, config: DiffusionGemmaTextConfig):
        super().__init__(config)
        self.pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, with_scale=False)

    def forward(self, canvas_embeds: torch.Tensor, soft_embeds: torch.Tensor) -> torch.Tensor:
        """Args: both `(B, C, D)`. Returns `(B, C, D)`."""
        return self.post_norm(canvas_embeds + super().forward(self.pre_norm(soft_embeds)))


__all__ = ["GatedMLP", "RMSNorm", "RotaryPositions", "ScaledEmbedding", "SelfConditioning", "rotary_frequencies", "rotate"]
