"""The full-size architecture with random weights, built on the device it is for, and the bytes that its passes must read.

The layout is the released checkpoint's (tests/data/released/config.json); what is computed does not depend on the values. A
model is made on the meta device and filled layer by layer, each weight in its final dtype, so nothing is there twice and
nothing of it passes through host memory. `share` gives transformers' own class the same tensors: both fit where one does.
"""

import json

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, PreTrainedModel

from measure import ROOT, fixed_steps
from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM
from modeling_diffusiongemma.weights.fp8 import scale_name
from modeling_diffusiongemma.weights.fp8_layout import default_ignore, make_fp8
from modeling_diffusiongemma.weights.fp8_math import quantize_weight

RELEASED = ROOT / "tests" / "data" / "released" / "config.json"
STANDARD_DEVIATION = 0.02
# Small in every direction, with more ids than one piece of the vocabulary pass, and both kinds of layers.
SHRUNK_TEXT = {
    "vocab_size": 8192, "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_global_key_value_heads": 1, "head_dim": 16, "global_head_dim": 32, "intermediate_size": 96, "num_experts": 8,
    "top_k_experts": 2, "moe_intermediate_size": 32, "sliding_window": 64, "max_position_embeddings": 4096,
}  # fmt: skip
SHRUNK_VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
                 "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 3, "position_embedding_size": 64}  # fmt: skip
SHRUNK = {"canvas_length": 32, "image_token_id": 107, "boi_token_id": 108, "eoi_token_id": 109}


def stored_config(shrink: bool = False, layers: int | None = None) -> dict:
    """The released config.json; with `shrink` one of the same form that a CPU runs in milliseconds; with the last `layers` layers alone."""
    values = json.loads(RELEASED.read_text())
    types = values["text_config"]["layer_types"]
    if shrink:
        types = types[: SHRUNK_TEXT["num_hidden_layers"]]
        values["text_config"] |= SHRUNK_TEXT
        values |= {**SHRUNK, "vision_config": {**values["vision_config"], **SHRUNK_VISION}}
    types = types[-layers:] if layers else types
    values["text_config"] |= {"layer_types": types, "num_hidden_layers": len(types)}
    return values


def full_size_config(shrink: bool = False) -> DiffusionGemmaConfig:
    """`stored_config` as an object."""
    return DiffusionGemmaConfig.from_dict(stored_config(shrink))


def build(config: DiffusionGemmaConfig, device: torch.device, dtype: torch.dtype, fp8: bool = False) -> PreTrainedModel:
    """Our model with random weights on `device`.

    Args:
        dtype: of the weights; with `fp8` of those that FP8 leaves alone.
        fp8: attention, dense MLP and experts in FP8, each weight quantised as soon as it is made.
    """
    torch.manual_seed(0)
    with init_empty_weights(include_buffers=False):
        model = DiffusionGemmaForMaskedBlockLM(config)
    model.tie_weights()
    if fp8:
        make_fp8(model, default_ignore(model))
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for part in (*model.model.decoder.layers, model):  # the largest first, then what they leave
        _fill(part, device, dtype, made)
    _place_buffers(model, device, dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


@torch.no_grad()
def _fill(
    part: nn.Module, device: torch.device, dtype: torch.dtype, made: dict[int, tuple[nn.Parameter, nn.Parameter]]
) -> None:  # fmt: skip
    """Gives every parameter of `part` that is still on the meta device a random value, its scale with it; tied ones stay tied."""
    for module in part.modules():
        for name, empty in list(module._parameters.items()):
            if empty is None or not empty.is_meta or module._parameters[name] is not empty:
                continue
            if id(empty) not in made:  # which keeps `empty` alive, so that no other gets its id
                values = torch.empty(empty.shape, dtype=dtype, device=device)
                values.normal_(0, STANDARD_DEVIATION) if empty.dim() > 1 else values.fill_(1)
                if empty.dtype.itemsize == 1:
                    values, scale = quantize_weight(values)
                    module._parameters[scale_name(name)] = nn.Parameter(scale, requires_grad=False)
                made[id(empty)] = (empty, nn.Parameter(values, requires_grad=False))
            module._parameters[name] = made[id(empty)][1]


def _place_buffers(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Moves the buffers; only saved ones take the weights' dtype, since rotary frequencies must not be rounded."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            saved = name not in module._non_persistent_buffers_set and buffer.is_floating_point()
            module._buffers[name] = buffer.to(device, dtype if saved else buffer.dtype)


def share(ours: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' own class over the very tensors of `ours`, which must not be quantised."""
    with init_empty_weights(include_buffers=False):
        model = DiffusionGemmaForBlockDiffusion(ours.config)
    model.tie_weights()
    weights, found = dict(ours.named_parameters(remove_duplicate=False)), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in weights:
            found[id(parameter)] = weights[name]
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = found[id(parameter)]
    _place_buffers(model, ours.device, dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


def cache_bytes(config: DiffusionGemmaConfig, batch_size: int, context: int, itemsize: int) -> int:
    """Keys and values that a canvas pass reads after `context` tokens; sliding layers see the last `sliding_window - 1`."""
    text, total = config.text_config, 0
    for place, layer_type in enumerate(text.layer_types):
        layer = text.per_layer_config[place]
        visible = min(context, text.sliding_window - 1) if layer_type == "sliding_attention" else context
        total += 2 * batch_size * visible * layer.num_key_value_heads * layer.head_dim * itemsize
    return total


def bytes_per_pass(model: PreTrainedModel, batch_size: int, prompt_length: int, canvases: int) -> dict[str, float]:
    """What a canvas pass must read at least, by stage: every parameter of the canvas pass once, all experts among them (see
    `experts_hit`), the embedding once for the head and once for the soft embedding, and the cache, as a mean over the canvases.
    Activations are left out."""
    decoder, config = model.model.decoder, model.config

    def size(*modules: nn.Module) -> int:
        return sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))

    contexts = [prompt_length + number * config.canvas_length for number in range(canvases)]
    embedding = decoder.embed_tokens.weight
    cache = sum(cache_bytes(config, batch_size, context, embedding.element_size()) for context in contexts) / canvases
    attention = sum(size(layer.self_attn) for layer in decoder.layers)
    mlp = sum(size(layer.mlp) for layer in decoder.layers)
    experts = sum(size(layer.router, layer.experts) for layer in decoder.layers)
    return {
        "attention": attention + cache,
        "dense MLP": mlp,
        "router and experts": experts,
        "norms and residuals": sum(map(size, decoder.layers)) - attention - mlp - experts,
        "vocabulary pass": 2 * embedding.nbytes,
        "rest": size(decoder.self_conditioning, decoder.norm),
    }


def experts_hit(model: PreTrainedModel, input_ids: torch.Tensor) -> int:
    """Of how many experts a layer of our `model` reads the weights in a canvas pass over one row: the fewest of any layer.

    Args:
        input_ids (`int64 (1, P)`): a prompt that is not as long as the canvas.
    """
    hit, length = [], model.config.canvas_length

    def note(router: nn.Module, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
        _, _, chosen = output
        if len(chosen) == length:  # a canvas; the prompt has another length
            hit.append(chosen.unique().numel())

    hooks = [layer.router.register_forward_hook(note) for layer in model.model.decoder.layers]
    model.generate(input_ids, max_new_tokens=length, disable_compile=True, **fixed_steps(2, endless=True))
    for hook in hooks:
        hook.remove()
    return min(hit)
