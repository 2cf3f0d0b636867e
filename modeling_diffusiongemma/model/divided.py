"""A model whose weights are divided between processes: transformers' plans, for tensor and expert parallelism and FSDP2, fitted to it.

The plans are the configs' (`base_model_tp_plan`, `base_model_ep_plan`) and the head's; transformers applies them. Here is what they do not
know: where the layers are that FSDP2 gathers one by one, which numbers of processes divide the heads, what cannot be divided, and the mean
row of an embedding of which each process holds some rows.
"""

import torch
from torch import nn
from transformers.utils import logging

from ..layers.layers import ScaledEmbedding

logger = logging.get_logger(__name__)


def fit_plan(model: nn.Module, distributed_config) -> None:
    """Called before a plan is applied: has FSDP2 gather a layer at a time, and leaves attention whole where its key heads do not go round,
    as the plan for experts does.

    Args: `distributed_config`: transformers' `DistributedConfig`, whose `tp_size` processes divide the matrices.

    Raises:
        ValueError: a quantised checkpoint; layers divided between processes; or rules of the caller's that cut a key head.
    """
    processes = distributed_config.tp_size or 1
    if getattr(model.config, "quantization_config", None) is not None:
        kind = type(model.config.quantization_config).__name__
        raise ValueError(f"`distributed_config` divides weights that {kind} quantises; expected a checkpoint in bfloat16 or float32")
    if (stages := getattr(distributed_config, "pp_size", None) or 1) > 1:
        why = "transformers' pipeline knows no second pass that reads what the first has written"
        raise ValueError(f"`pp_size` is {stages} in `distributed_config`; expected 1: {why}")
    if getattr(distributed_config, "enable_sequence_parallel", False):
        raise ValueError("`enable_sequence_parallel` is True in `distributed_config`; expected False: transformers does not act on it")
    inside = "" if model.base_model is model else f"{model.base_model_prefix}."
    model._fsdp_plan = dict(type(model)._fsdp_plan or {})  # the configs' rules name layers where other models have them
    model._fsdp_plan |= {f"{inside}decoder.layers.*": "free_full_weight", f"{inside}decoder.embed_tokens": "keep_full_weight"}
    text = model.config.get_text_config()
    heads = sorted({text.per_layer_config[layer].num_key_value_heads for layer in range(text.num_hidden_layers)})
    if all(count % processes == 0 for count in heads):
        return
    given = distributed_config.tp_plan
    cut = [name for name, style in (given if isinstance(given, dict) else {}).items() if ".self_attn." in name and style != "replicate"]
    if cut:
        raise ValueError(f"`tp_plan` divides {cut} between {processes} processes; expected a number that divides {heads} key heads")
    if rules := [name for name in model._tp_plan or () if ".self_attn." in name]:
        logger.warning_once(f"Attention is not divided: {processes} processes do not divide its {heads} key heads. All else is.")
    for name in rules:
        del model._tp_plan[name]


def is_planned(model: nn.Module) -> bool:
    """Whether a plan divides the model's matrices between processes."""
    return (getattr(model, "_tp_size", None) or 1) > 1


def learns_apart(module: nn.Module) -> bool:
    """Whether every process has weights of its own to learn in a module whose others are sharded: nobody averages their gradients."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    parameters = list(module.parameters())
    apart = any(each.requires_grad and not isinstance(each, DTensor) for each in parameters)
    return apart and any(isinstance(each, DTensor) for each in parameters)


def is_divided(embedding: nn.Module) -> bool:
    """Whether each process holds some rows of an embedding that is otherwise as it was built."""
    if not (torch.distributed.is_available() and isinstance(embedding, ScaledEmbedding)):
        return False
    from torch.distributed.tensor import DTensor, Shard

    weight, forward = embedding._parameters.get("weight"), vars(embedding).get("forward")
    by_plan = str(getattr(forward, "__module__", None)).startswith("transformers.distributed.")
    return by_plan and isinstance(weight, DTensor) and tuple(weight.placements) == (Shard(0),) and weight.device_mesh.size() > 1


def divided_mean(embedding: nn.Module, probabilities: torch.Tensor) -> torch.Tensor:
    """The mean row, `(B, C, D)`, under distributions `(B, C, V)`, of an embedding that `is_divided`: each process sums its rows, and the
    sums are added. Asking it for the rows would send all of them round at every step."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    weight = embedding.weight
    spread = DTensor.from_local(probabilities.to(weight.dtype), weight.device_mesh, [Replicate()], run_check=False)
    spread = spread.redistribute(placements=[Shard(probabilities.dim() - 1)])
    return torch.matmul(spread, weight).full_tensor() * embedding.scales[weight.dtype]


__all__ = ["divided_mean", "fit_plan", "is_divided", "is_planned", "learns_apart"]
