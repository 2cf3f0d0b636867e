"""A tiny random checkpoint that takes images, with its processor, built and saved without the network.

`Gemma4Processor` has parts for audio and video as well, and the one for video needs torchvision. `ImageProcessor` below is the
same class without these two parts, so that images are tested where torchvision is missing.
"""

import torch
from tiny import CANVAS, TEXT, VISION, shake
from transformers import AutoTokenizer, DiffusionGemmaConfig, Gemma4AudioFeatureExtractor, Gemma4Processor
from transformers.processing_utils import ProcessorMixin

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, default_checkpoint

VOCAB, PATCHES = 701, 300  # the tokenizer has 644 ids; an image has 280 patches at most
AUDIO = {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}


class ImageProcessor(Gemma4Processor):
    """`Gemma4Processor` of text and images alone."""

    def __init__(self, image_processor, tokenizer, chat_template=None, **kwargs):
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.boi_token, self.eoi_token = tokenizer.boi_token, tokenizer.eoi_token
        self.audio_token, self.boa_token, self.eoa_token = (getattr(tokenizer, name) for name in AUDIO)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def vision_model(seed: int = 0) -> DiffusionGemmaForMaskedBlockLM:
    """Random weights over the shipped tokenizer's vocabulary."""
    torch.manual_seed(seed)
    config = DiffusionGemmaConfig(
        text_config={**TEXT, "vocab_size": VOCAB}, vision_config={**VISION, "position_embedding_size": PATCHES}, image_token_id=107,
        boi_token_id=108, eoi_token_id=109, initializer_range=0.3, canvas_length=CANVAS, tie_word_embeddings=True,
    )  # fmt: skip
    return shake(DiffusionGemmaForMaskedBlockLM(config).eval())


def processor(whole: bool):
    """The shipped tokenizer with an image processor for the tiny vision tower: 70 soft tokens an image at most.

    Args:
        whole: a `Gemma4Processor` with its audio and video parts, which need torchvision.
    """
    from transformers import Gemma4ImageProcessorPil  # needs Pillow

    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint(), extra_special_tokens=AUDIO)
    images = Gemma4ImageProcessorPil(patch_size=VISION["patch_size"], pooling_kernel_size=VISION["pooling_kernel_size"], max_soft_tokens=70)
    if not whole:
        return ImageProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
    from transformers import Gemma4VideoProcessor  # needs torchvision

    return Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(padding_side="left"), image_processor=images, tokenizer=tokenizer,
        video_processor=Gemma4VideoProcessor(), chat_template=tokenizer.chat_template,
    )  # fmt: skip


__all__ = ["ImageProcessor", "processor", "vision_model"]
