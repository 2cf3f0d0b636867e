"""A prompt as a caller has it, a text or a chat, as ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .arguments import shown


def prompt_ids(prompt: str | Sequence[Mapping[str, Any]] | None, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> torch.Tensor:
    """Int64 (1, P): a text as it stands, a chat by the tokenizer's template, or for None what begins a sequence.

    Raises:
        ValueError: no tokenizer; a prompt that is neither, or has no tokens; nothing to begin a sequence with.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"`tokenizer` is {shown(tokenizer)}; expected the model's tokenizer")
    if prompt is None:
        if tokenizer.bos_token_id is None:
            raise ValueError("`prompt` is None, and the tokenizer has no `bos_token_id` to begin with; expected a prompt")
        ids = [tokenizer.bos_token_id]
    elif isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(message, Mapping) for message in prompt):
        ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        raise ValueError(f"`prompt` is {shown(prompt)}; expected a text or a list of messages")
    if not ids:
        raise ValueError(f"`prompt` is {shown(prompt)}, which has no tokens; expected at least one")
    return torch.tensor([ids], dtype=torch.int64, device=device)


__all__ = ["prompt_ids"]
