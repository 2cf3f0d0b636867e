"""Builders of the tests: tiny configurations, and the same random weights in transformers' model (the oracle) and in ours.

Sizes are odd on purpose, and no weight keeps the value it is initialised with: norm weights, router scales and the two
passes' layer scalars are all random, so that mixing any two of them up shows.
"""

import functools
import importlib.util
import shutil

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache, StaticCache

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM

VOCAB, WINDOW, CANVAS, IMAGE, PAD = 101, 8, 10, 97, 0
TOLERANCE = 1e-4  # float32 rounding through four layers; a wrong mask moves logits by 0.1 or more
needs_flex_attention = pytest.mark.skipif(
    not shutil.which("g++") or torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="flex_attention on a CPU is compiled: needs a C++ compiler and AVX2",
)
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
CPU_HAS_SCALED_PRODUCT = torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU")
needs_scaled_product = pytest.mark.skipif(
    not CPU_HAS_SCALED_PRODUCT, reason="torch 2.11 has scaled products on GPUs alone, where the package asks for them"
)
LAYERS = ("sliding_attention", "full_attention", "sliding_attention", "full_attention")
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": len(LAYERS), "layer_types": list(LAYERS),
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1, "head_dim": 8,
    "global_head_dim": 16, "intermediate_size": 36, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24,
    "sliding_window": WINDOW, "max_position_embeddings": 4096, "use_bidirectional_attention": "vision",
    "initializer_range": 0.3, "pad_token_id": PAD, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
VISION = {
    "model_type": "gemma4_vision", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 20, "patch_size": 2, "pooling_kernel_size": 2,
    "position_embedding_size": 16, "standardize": True, "use_clipped_linears": False, "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
}  # fmt: skip


def tiny_config(canvas_length=CANVAS, **text):
    return DiffusionGemmaConfig(
        text_config={**TEXT, **text}, vision_config=dict(VISION), image_token_id=IMAGE, boi_token_id=98, eoi_token_id=99,
        initializer_range=0.3, canvas_length=canvas_length, tie_word_embeddings=True,
    )  # fmt: skip


@torch.no_grad()
def shake(model, seed=1):
    """Gives every vector of weights and every buffer that is saved a random value of its own."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        if tensor.dim() == 1:
            tensor.copy_(1 + 0.3 * torch.randn(tensor.shape, generator=generator))
    for name, buffer in model.named_buffers():
        if name.endswith(("layer_scalar", "std_scale")):
            buffer.copy_(0.6 + 0.8 * torch.rand(buffer.shape, generator=generator))
        elif name.endswith("std_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    table = model.get_submodule("model.encoder.vision_tower.patch_embedder").position_embedding_table
    table.copy_(torch.randn(table.shape, generator=generator))
    return model


def build_oracle(attention="sdpa", seed=0, **text):
    torch.manual_seed(seed)
    model = shake(DiffusionGemmaForBlockDiffusion(tiny_config(**text)).eval())
    model.set_attn_implementation(attention)
    return model


def same_weights(oracle, attention="sdpa", experts=None):
    """Ours with the oracle's weights; every key of ours must be among the oracle's."""
    model = DiffusionGemmaForMaskedBlockLM(type(oracle.config).from_dict(oracle.config.to_dict())).eval()
    weights = oracle.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    model.set_attn_implementation(attention)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model


@functools.cache
def pair(attention="sdpa"):
    """The oracle and ours with the same weights. Shared between tests: not to be changed."""
    oracle = build_oracle(attention)
    return oracle, same_weights(oracle, attention)


def ours(attention="sdpa"):
    return pair(attention)[1]


def tokens(batch_size, length, seed=0):
    """Random ids, without padding, end-of-sequence and image tokens."""
    return torch.randint(3, IMAGE, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def rows_of(lengths):
    return [tokens(1, length, seed)[0] for seed, length in enumerate(lengths)]


def pad_rows(rows, side, multiple=1):
    """Pads rows of different lengths; returns ids and the mask, both int64 `(B, longest)`."""
    longest = -(-max(len(row) for row in rows) // multiple) * multiple
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros((len(rows), longest), dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def close(got, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def caches(model, length=64):
    """One of every kind: name and cache."""
    config = model.config.text_config
    static = StaticCache(config, max_cache_len=length)
    return {"windowed": DynamicCache(config=config), "keep_all": DynamicCache(), "static": static}


def alone(model, rows, canvas):
    """Each row by itself, without padding, `(B, C, V)`."""
    return torch.cat([model(row[None], decoder_input_ids=canvas[i : i + 1]).logits for i, row in enumerate(rows)])


def canvas_loss(model, ids, canvas, labels, **inputs):
    return cross_entropy(model(ids, decoder_input_ids=canvas, **inputs).logits.flatten(0, 1), labels.flatten())


@torch.enable_grad()
def gradients(model, loss):
    model.zero_grad()
    loss(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)}


def patches(columns, rows, seed=0, total=16):
    """One image of `columns * rows` patches padded to `total`: pixel values (1, total, 12), coordinates (1, total, 2).

    It becomes `columns * rows / 4` soft tokens.
    """
    pixels = torch.rand(1, total, 3 * VISION["patch_size"] ** 2, generator=torch.Generator().manual_seed(seed))
    places = torch.full((1, total, 2), -1)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
    places[0, : columns * rows] = grid
    pixels[0, columns * rows :] = 0
    return pixels, places


def image_inputs(kind):
    """ids `(B, P)`, attention mask, and images. 4x4 patches are 4 tokens, 4x2 are 2, 6x6 are 9: longer than the window."""
    text = rows_of((12, 9))
    rows = {
        "small": [torch.cat((text[0][:3], torch.tensor([98] + [IMAGE] * 4 + [99]), text[0][3:]))],
        "wider_than_the_window": [torch.cat((text[0][:5], torch.tensor([IMAGE] * 9), text[0][5:]))],
        "two_in_a_row": [torch.cat((text[0][:2], torch.tensor([98, *[IMAGE] * 4, 99, 98, *[IMAGE] * 2, 99]), text[0][2:6]))],
        "two_that_touch": [torch.cat((text[0][:2], torch.tensor([IMAGE] * 6), text[0][2:]))],
        "one_row_of_two": [torch.cat((text[0][:2], torch.tensor([IMAGE] * 4), text[0][2:])), tokens(1, 16, 5)[0]],
        "one_row_of_two_padded": [torch.cat((text[0][:4], torch.tensor([IMAGE] * 4))), tokens(1, 6, 5)[0]],
    }[kind]
    if kind == "wider_than_the_window":
        images = [patches(6, 6, total=36)]
    else:
        images = [patches(4, 4), patches(4, 2, seed=1)] if kind.startswith("two") else [patches(4, 4)]
    pixels, places = (torch.cat(parts) for parts in zip(*images, strict=True))
    return *pad_rows(rows, "left"), {"pixel_values": pixels, "image_position_ids": places}


IMAGE_KINDS = ("small", "wider_than_the_window", "two_in_a_row", "two_that_touch", "one_row_of_two", "one_row_of_two_padded")


def oracle_generate_path(oracle, input_ids, canvas, attention_mask=None, cache=None, mm_token_type_ids=None, logits=None, **images):
    """Prompt pass and canvas pass as the oracle's `generate` runs them, with the masks it makes; returns both and the cache.

    Its plain `forward` throws the image-aware mask of the prompt pass away, a known defect.
    """
    cache = DynamicCache(config=oracle.config.text_config) if cache is None else cache
    seen = cache.get_seq_length()
    if attention_mask is None:
        attention_mask = torch.ones(input_ids.shape[0], seen + input_ids.shape[1], dtype=torch.int64)
    position_ids = torch.arange(seen, seen + input_ids.shape[1])[None]
    masks = oracle.model.encoder.create_masks_for_generate(
        config=oracle.config, inputs_embeds=torch.empty(*input_ids.shape, 0, dtype=oracle.dtype), attention_mask=attention_mask,
        past_key_values=cache, position_ids=position_ids, mm_token_type_ids=mm_token_type_ids,
    )  # fmt: skip
    prompt = oracle.model.encoder(input_ids=input_ids, attention_mask=masks, position_ids=position_ids, past_key_values=cache, **images)
    whole = torch.cat((attention_mask, torch.ones_like(canvas)), dim=1)
    denoised = oracle(past_key_values=cache, decoder_input_ids=canvas, decoder_attention_mask=whole, self_conditioning_logits=logits)
    return prompt, denoised, cache
