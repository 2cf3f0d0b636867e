"""The configuration: transformers' own `DiffusionGemmaConfig`, and what this implementation demands of it.

The defaults of transformers' class differ from the released model; build from a checkpoint's config.json.
"""

import copy
from typing import Any

from transformers import DiffusionGemmaConfig, DiffusionGemmaTextConfig
from transformers.activations import ACT2FN

# Fields of the text config that are read where a model is built, or once: changed afterwards, they would change what is saved alone.
BUILT_FROM = (
    "attention_bias", "head_dim", "hidden_activation", "hidden_size", "intermediate_size", "moe_intermediate_size",
    "num_attention_heads", "num_experts", "num_key_value_heads", "rms_norm_eps", "rope_parameters",
)  # fmt: skip


def built_from(text: DiffusionGemmaTextConfig) -> dict[str, Any]:
    """What a model is built from of `BUILT_FROM`."""
    return copy.deepcopy({name: vars(text).get(name) for name in BUILT_FROM})


def check_built(text: DiffusionGemmaTextConfig, built: dict[str, Any]) -> None:
    """Raises ValueError where a config says something else than the model was `built_from`."""
    for name, value in built.items():
        if vars(text).get(name) != value:
            got = f"`{name}` in the config is {vars(text).get(name)!r}, and the model was built with {value!r}"
            raise ValueError(f"{got}; expected the same: another value wants another model, `from_pretrained(..., text_config={{...}})`")


def check_config(config: DiffusionGemmaConfig) -> None:
    """Raises ValueError for values no model can be built from, naming the field, what it holds and what it expects."""
    text = config.text_config
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_experts", "top_k_experts",
        "moe_intermediate_size", "sliding_window", "canvas_length",
    ):  # fmt: skip
        value = getattr(config if name == "canvas_length" else text, name)
        if not isinstance(value, int) or value <= 0:
            raise ValueError(f"`{name}` in the config is {value!r}; expected a positive integer")
    if text.pad_token_id is not None and not 0 <= text.pad_token_id < text.vocab_size:
        raise ValueError(f"`pad_token_id` of the text config is {text.pad_token_id}; expected a token id from 0 to {text.vocab_size - 1}")
    if text.top_k_experts > text.num_experts:
        raise ValueError(f"`top_k_experts` is {text.top_k_experts}; expected at most `num_experts`, {text.num_experts}")
    if len(text.layer_types) != text.num_hidden_layers:
        raise ValueError(f"`layer_types` names {len(text.layer_types)} layers; expected `num_hidden_layers`, {text.num_hidden_layers}")
    if unknown := set(text.layer_types) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"`layer_types` holds {sorted(unknown)}; expected only 'sliding_attention' and 'full_attention'")
    if text.use_bidirectional_attention not in (None, "vision"):
        raise ValueError(f"`use_bidirectional_attention` is {text.use_bidirectional_attention!r}; expected 'vision' or None")
    if text.attention_bias:
        raise ValueError("`attention_bias` is True; expected False: the released layout stores no biases")
    if text.hidden_activation not in ACT2FN:
        raise ValueError(f"`hidden_activation` is {text.hidden_activation!r}; expected a name in transformers' ACT2FN")
    softcap(text)
    for layer_idx in range(text.num_hidden_layers):
        layer = text.per_layer_config[layer_idx]
        if layer.head_dim <= 0 or layer.head_dim % 2:
            raise ValueError(f"`head_dim` of layer {layer_idx} is {layer.head_dim}; expected a positive even number")
        if layer.num_key_value_heads <= 0 or text.num_attention_heads % layer.num_key_value_heads:
            expected = f"a divisor of `num_attention_heads`, {text.num_attention_heads}"
            raise ValueError(f"`num_key_value_heads` of layer {layer_idx} is {layer.num_key_value_heads}; expected {expected}")


def softcap(text: DiffusionGemmaTextConfig) -> float:
    """`final_logit_softcapping`, which may be set on a built model as well; ValueError for what is no positive number."""
    cap = text.final_logit_softcapping
    if isinstance(cap, bool) or not isinstance(cap, int | float) or not 0 < cap < float("inf"):
        raise ValueError(f"`final_logit_softcapping` is {cap!r}; expected a positive number: the released head has a soft cap")
    return cap


def routing_settings(config: DiffusionGemmaConfig) -> tuple[bool, float]:
    """`output_router_logits` and `router_aux_loss_coef`, which no published config holds: whether `forward` gives router logits where it is
    not told, and what the balancing loss is multiplied by (0.001, as in transformers' mixture models). In the config or its text config.

    Raises:
        ValueError: a coefficient that is no number >= 0.
    """
    kept, coefficient = (
        getattr(config, name, getattr(config.text_config, name, default))
        for name, default in (("output_router_logits", False), ("router_aux_loss_coef", 0.001))
    )
    if isinstance(coefficient, bool) or not isinstance(coefficient, int | float) or not 0 <= coefficient < float("inf"):
        raise ValueError(f"`router_aux_loss_coef` in the config is {coefficient!r}; expected a number >= 0")
    return bool(kept), coefficient


__all__ = ["DiffusionGemmaConfig", "DiffusionGemmaTextConfig", "built_from", "check_built", "check_config", "routing_settings", "softcap"]
