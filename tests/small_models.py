"""Small models and prompts of the generation and training tests.

Odd sizes on purpose (a vocabulary of 100, a canvas of 10, a window of 8), so that no two dimensions agree by accident.
"""

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM

CANVAS, VOCAB, WINDOW, IMAGE, PAD = 10, 100, 8, 99, 0
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 8, "patch_size": 2, "pooling_kernel_size": 2, "position_embedding_size": 32, "standardize": True,
}  # fmt: skip


def small_config(canvas_length: int = CANVAS, **text) -> DiffusionGemmaConfig:
    """Three layers of both types. Weights are wide (0.3), so that logits differ enough for rows to stop at different steps."""
    fields = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_global_key_value_heads": 1,
        "head_dim": 8, "global_head_dim": 16, "intermediate_size": 48, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 24, "sliding_window": WINDOW, "max_position_embeddings": 512, "pad_token_id": PAD,
        "use_bidirectional_attention": "vision", "initializer_range": 0.3, **text,
    }  # fmt: skip
    return DiffusionGemmaConfig(
        text_config=fields, vision_config=VISION, canvas_length=canvas_length, initializer_range=0.3,
        image_token_id=IMAGE, boi_token_id=97, eoi_token_id=98,
    )  # fmt: skip


def small_model(seed: int = 0, canvas_length: int = CANVAS, **text) -> DiffusionGemmaForMaskedBlockLM:
    torch.manual_seed(seed)
    return DiffusionGemmaForMaskedBlockLM(small_config(canvas_length, **text)).eval()


def small_pair(seed: int = 0, **text) -> tuple[DiffusionGemmaForBlockDiffusion, DiffusionGemmaForMaskedBlockLM]:
    """transformers' model and ours with equal weights; every `layer_scalar` differs, between layers and between passes."""
    ours = small_model(seed, **text)
    for buffer in (b for name, b in ours.named_buffers() if name.endswith("layer_scalar")):
        buffer.uniform_(0.7, 1.3)
    # Not a copy of the config, which would say how ours computes experts: the oracle chooses for itself.
    oracle = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(ours.config.to_dict())).eval()
    weights = ours.state_dict()
    missing = oracle.load_state_dict(weights, strict=False)
    if missing.unexpected_keys:
        raise ValueError(f"transformers' model has no {missing.unexpected_keys}; expected the same names")
    oracle.tie_weights()
    for config in (oracle.generation_config, ours.generation_config):
        config.update(pad_token_id=PAD, eos_token_id=None)  # ours takes the model config's, transformers' takes none
    return oracle, ours


def prompts(batch_size: int, length: int, seed: int = 0, padded: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts without special ids, and their mask; the first row has `padded` tokens of padding on its left."""
    ids = torch.randint(8, 90, (batch_size, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[0, :padded], mask[0, :padded] = PAD, 0
    return ids, mask


__all__ = ["CANVAS", "IMAGE", "PAD", "VOCAB", "WINDOW", "prompts", "small_config", "small_model", "small_pair"]
