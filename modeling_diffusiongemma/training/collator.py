"""From (prompt, response) pairs to the inputs of the training loss, for `transformers.Trainer` or a plain DataLoader."""

from collections.abc import Mapping, Sequence

import torch

from .loss import IGNORED


class TrainingBatch(dict):
    """What the collator makes: a dict that the model gets whole. `transformers.Trainer` takes the labels out for losses of its own, and
    would compare those of whole examples with the logits of one random canvas."""

    def pop(self, key: str, *default):
        """As of a dict; ValueError for the labels."""
        if key == "labels":
            why = "the model draws the canvas its loss is of, and needs the labels for it (in a loop of your own: `dict(batch)`)"
            takers = "as Trainer does for `label_smoothing_factor` and `compute_loss_func`"
            raise ValueError(f"`labels` are taken out of the batch, {takers}; expected neither: {why}")
        return super().pop(key, *default)


class BlockDiffusionCollator:
    """Turns examples into right-padded `input_ids`, `attention_mask` and `labels`.

    Args:
        tokenizer (*optional*): a tokenizer with a chat template; needed for examples given as text.
        pad_token_id (`int`, *optional*): default: the tokenizer's.
        pad_to_multiple_of (`int`): lengths are rounded up to it, which keeps the number of distinct shapes small.
    """

    def __init__(self, tokenizer=None, pad_token_id: int | None = None, pad_to_multiple_of: int = 1):
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id if pad_token_id is not None else getattr(tokenizer, "pad_token_id", None)
        if self.pad_token_id is None:
            raise ValueError("`pad_token_id` is None and there is no tokenizer that has one; expected a token id")
        if pad_to_multiple_of < 1:
            raise ValueError(f"`pad_to_multiple_of` is {pad_to_multiple_of}; expected a positive integer")
        self.pad_to_multiple_of = pad_to_multiple_of

    def encode(self, prompt: str | Sequence[int], response: str | Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids of prompt and response. Text becomes a chat of one turn each; the response ends with the end of its turn."""
        if isinstance(prompt, str) != isinstance(response, str):
            raise ValueError("prompt and response are of different kinds; expected both as text or both as token ids")
        if not isinstance(prompt, str):
            return list(prompt), list(response)
        if self.tokenizer is None:
            raise ValueError("the example is text and `tokenizer` is None; expected a tokenizer with a chat template")
        turns = [{"role": "user", "content": prompt}]
        head = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        turns.append({"role": "assistant", "content": response})
        whole = self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        inside = [place for place, flag in enumerate(whole["assistant_masks"]) if flag]
        return head, whole["input_ids"][inside[0] : inside[-1] + 1]

    def __call__(self, examples: Sequence[tuple | Mapping]) -> TrainingBatch:
        """Args: pairs, or mappings with the keys `prompt` and `response`. Returns int64 tensors `(B, longest example)`."""
        if not examples:
            raise ValueError("`examples` is empty; expected at least one pair of prompt and response")
        pairs = []
        for place, example in enumerate(examples):
            if isinstance(example, Mapping):
                if missing := {"prompt", "response"} - set(example):
                    keys = "the keys 'prompt' and 'response', which Trainer drops unless `remove_unused_columns` is False"
                    raise ValueError(f"example {place} has no {sorted(missing)}; expected {keys}")
                example = example["prompt"], example["response"]
            prompt, response = self.encode(*example)
            if not prompt or not response:
                raise ValueError(f"example {place} has {len(prompt)} prompt and {len(response)} response tokens; expected some of both")
            pairs.append((prompt, response))
        longest = max(len(prompt) + len(response) for prompt, response in pairs)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def padded(rows, value: int) -> torch.Tensor:
            return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.int64, device="cpu")

        return TrainingBatch(
            input_ids=padded([[*prompt, *response] for prompt, response in pairs], self.pad_token_id),
            attention_mask=padded([[1] * (len(prompt) + len(response)) for prompt, response in pairs], 0),
            labels=padded([[*[IGNORED] * len(prompt), *response] for prompt, response in pairs], IGNORED),
        )


__all__ = ["BlockDiffusionCollator", "TrainingBatch"]
