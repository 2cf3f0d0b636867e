"""Attention, the same for the prompt pass and the canvas pass: it reads the cached keys and values and the new ones, and appends nothing.

Queries and keys are RMS-normed, so scores are not scaled. Full-attention layers have no value projection: the value is
the unscaled norm of the key projection.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import DiffusionGemmaTextConfig, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from generation.fast.proofs import FastPath, numbers, works

from .caches import LayerCache, join
from .layers import RMSNorm, rotate
from .masks import additive, block_mask, boolean, expanded, flex_keys


def eager_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=1.0, **kwargs):
    """Softmax attention written out, the reference of every other implementation; keys are never repeated per query head.

    Args: `query` (B, H, Q, head_dim), `key` and `value` (B, K, S, head_dim), `attention_mask` additive (B, 1, Q, S).
    Returns: output `(B, Q, H, head_dim)` and the attention weights `(B, H, Q, S)`.
    """
    batch_size, heads, queries, head_dim = query.shape
    folded = query.reshape(batch_size, key.shape[1], -1, head_dim)  # (B, K, H / K * Q, head_dim)
    scores = torch.matmul(folded, key.transpose(-2, -1)).view(batch_size, heads, queries, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights.view(batch_size, key.shape[1], -1, key.shape[-2]), value)
    return output.view(batch_size, heads, queries, head_dim).transpose(1, 2), weights


def kernel_shares_keys(key: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Whether torch's fused kernel lets several query heads share a key head without repeating it: the CPU's always does, CUDA's
    flash kernel without a mask and up to this head_dim. Elsewhere torch would write the scores out."""
    if key.device.type in ("cpu", "meta"):
        return True
    return attention_mask is None and key.shape[-1] <= 256 and shares_keys(key.device, key.dtype, key.shape[-1])


def sdpa_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=1.0, is_causal=False, **kwargs):
    """torch's fused attention; keys and values are never repeated per query head.

    Where the kernel does not share them, the query heads that share a key head become one long block of queries if no mask
    tells queries apart (a canvas), and go one after another if one does. transformers' own `"sdpa"` repeats keys and values with a
    mask or a head_dim above 256: eight times, on the released full-attention layers.

    Args: as `eager_attention`; `attention_mask` boolean (B or 1, 1, Q or 1, S). Returns: output `(B, Q, H, head_dim)`, None.
    """
    batch_size, heads, queries, head_dim = query.shape
    options = {"dropout_p": dropout, "scale": scaling, "is_causal": is_causal and attention_mask is None}
    sharing = heads // key.shape[1]  # query heads a key head
    if sharing == 1 or kernel_shares_keys(key, attention_mask):
        output = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, enable_gqa=sharing > 1, **options)
        return output.transpose(1, 2), None
    if not options["is_causal"] and (attention_mask is None or attention_mask.shape[2] == 1):
        folded = query.reshape(batch_size, key.shape[1], sharing * queries, head_dim)
        output = nn.functional.scaled_dot_product_attention(folded, key, value, attention_mask, **options)
    else:
        attend = nn.functional.scaled_dot_product_attention
        singles = query.reshape(batch_size, key.shape[1], sharing, queries, head_dim).unbind(dim=2)  # one query head a key head, each
        output = torch.stack([attend(single, key, value, attention_mask, **options) for single in singles], dim=2)
    return output.view(batch_size, heads, queries, head_dim).transpose(1, 2), None


def _prove_shared_keys(device: torch.device, dtype: torch.dtype, head_dim: int):
    """Four query heads on two key heads; a canvas, which sees more keys than it has queries, and a prompt, causally."""
    got, expected = [], []
    for queries, keys, is_causal in ((5, 9, False), (9, 9, True)):
        shapes = ((1, 4, queries, head_dim), (1, 2, keys, head_dim), (1, 2, keys, head_dim))
        query, key, value = ((numbers(*shape, seed=place) / head_dim**0.25).to(device, dtype) for place, shape in enumerate(shapes))
        attended = nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True, scale=1.0, is_causal=is_causal)
        got.append(attended.transpose(1, 2))
        unseen = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries + 1)
        mask = torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill(unseen, -float("inf")) if is_causal else None
        expected.append(eager_attention(nn.Identity(), query, key, value, mask)[0])
    return got, expected


# 3 %: half precision, and TF32 where it is on.
SHARED_KEYS = FastPath(
    "attention with shared keys", "query heads that share a key head are laid one behind another", lambda device, *case: None,
    _prove_shared_keys, 0.03, cases=((torch.bfloat16, 256), (torch.float32, 64)),
)  # fmt: skip


@torch.compiler.assume_constant_result
def shares_keys(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return works(SHARED_KEYS, device, dtype, head_dim)


def flex_attention(module, query, key, value, attention_mask, **kwargs):
    """transformers' flex_attention, or whoever's is registered by its name, over as many keys as `flex_keys` says."""
    keys = key.shape[2]
    if more := flex_keys(keys, key.device) - keys:
        key, value = (nn.functional.pad(states, (0, 0, 0, more)) for states in (key, value))
        if attention_mask is None:
            seen = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=key.device)
            attention_mask = block_mask(seen, query.shape[0], query.shape[2], query.dtype)
    return ALL_ATTENTION_FUNCTIONS.get_interface("flex_attention", eager_attention)(module, query, key, value, attention_mask, **kwargs)


class Implementation(NamedTuple):
    """One way to attend: a function as `eager_attention` (weights may be None), or None for whatever transformers knows by this name at
    the moment; the form of its mask (`masks`); and whether without a mask it is causal where `is_causal` says so, else None means
    everything."""

    attend: Callable | None
    form: Callable
    causal_without: bool = False


# By `attn_implementation`: a kernel is a row here.
ATTENTION = {
    "eager": Implementation(None, additive),
    "sdpa": Implementation(sdpa_attention, boolean, causal_without=True),
    "flex_attention": Implementation(flex_attention, block_mask),
}
OTHERS = Implementation(None, expanded)
# By what makes the masks of a name in transformers: that which ours are then given in.
FORMS = {
    masking_utils.eager_mask: additive, masking_utils.sdpa_mask: expanded, masking_utils.flex_attention_mask: block_mask,
}  # fmt: skip


def implementation(name: str) -> Implementation:
    """The row of `ATTENTION`, or of any other name that transformers knows, whose mask is that which `AttentionMaskInterface` has under it:
    boolean `(B, 1, Q, S)` where it has none. What a user registers counts from the next pass on, under `"sdpa"`, too; `eager_attention`
    where nobody has under "eager".

    Raises:
        ValueError: masks of another form than transformers' own.
    """
    if name == "sdpa" and ALL_ATTENTION_FUNCTIONS.get(name) is not sdpa_attention_forward:
        return Implementation(ALL_ATTENTION_FUNCTIONS[name], expanded)
    attend, form, causal_without = ATTENTION.get(name, OTHERS)
    if name not in ATTENTION and name in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS:
        made_by = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name]
        if made_by not in FORMS:
            expected = f"one of {sorted(each.__name__ for each in FORMS)}"
            raise ValueError(f"`AttentionMaskInterface` has {made_by!r} for the `attn_implementation` {name!r}; expected {expected}")
        form = FORMS[made_by]
    return Implementation(attend or ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention), form, causal_without)


class Attention(nn.Module):
    def __init__(self, config: DiffusionGemmaTextConfig, layer_idx: int):
        super().__init__()
        layer_config = config.per_layer_config[layer_idx]
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = layer_config.head_dim
        self.num_key_value_groups = config.num_attention_heads // layer_config.num_key_value_heads
        self.scaling = 1.0  # queries and keys are normed
        query_size = config.num_attention_heads * self.head_dim
        key_size = layer_config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        is_sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False) if is_sliding else None
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.v_norm = RMSNorm(self.head_dim, config.rms_norm_eps, with_scale=False)

    @property
    def is_sliding(self) -> bool:
        return self.v_proj is not None

    @property
    def layer_type(self) -> str:
        """As `layer_types` of the config has it."""
        return "sliding_attention" if self.is_sliding else "full_attention"

    @property
    def sliding_window(self) -> int | None:
        return self.config.sliding_window if self.is_sliding else None

    @property
    def is_causal(self) -> bool:
        """What functions of attention ask where a pass says nothing; every causal pass here brings its mask, or says so itself."""
        return False

    @is_causal.setter
    def is_causal(self, value: bool) -> None:
        passes = "the prompt pass is causal, the canvas pass is not, whatever stands here"
        raise ValueError(f"`is_causal` of the attention in layer {self.layer_idx} is set to {value!r}; expected it as it is: {passes}")

    def forward(
        self, hidden_states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], mask, cached: LayerCache | None, is_causal: bool
    ) -> tuple[torch.Tensor, LayerCache, torch.Tensor | None]:
        """Attends from the new tokens, `(B, L, D)`, to the cached and the new ones.

        Args:
            rotary: cos and sin, each `(B, L, 1, head_dim)`.
            mask: in the `form` of the implementation, over cached then new keys; None: everything, or causal.
            cached: what the cache holds for this layer; its free slots are written to (`caches.join`).
            is_causal: whether a mask of None means causal.

        Returns: the output `(B, L, D)`, the new keys and values, and the attention weights where eager attention makes them.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = rotate(self.q_norm(self.q_proj(hidden_states).view(shape)), *rotary).transpose(1, 2)  # (B, H, L, head_dim)
        projected = self.k_proj(hidden_states).view(shape)
        value = self.v_proj(hidden_states).view(shape) if self.v_proj is not None else projected
        key = rotate(self.k_norm(projected), *rotary).transpose(1, 2)  # (B, K, L, head_dim)
        value = self.v_norm(value).transpose(1, 2)
        new = LayerCache(key, value)
        key, value = (states.to(query.dtype) for states in join(cached, new)[:2])  # a cache of an autocast call may be in other bits
        attend = implementation(self.config._attn_implementation).attend
        # Transformers' modules hold it; set on one of ours, it counts there.
        dropout = getattr(self, "attention_dropout", self.config.attention_dropout) if self.training else 0.0
        output, weights = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, is_causal=is_causal)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), new, weights


__all__ = [
    "ATTENTION", "SHARED_KEYS", "Attention", "Implementation", "eager_attention", "flex_attention", "implementation", "kernel_shares_keys",
    "sdpa_attention",
]  # fmt: skip
