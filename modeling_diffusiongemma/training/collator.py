"""From examples to the inputs of the training loss, for `transformers.Trainer` or a plain DataLoader. How a chat becomes token ids, and
which of them are its responses: `chats`."""

from collections.abc import Mapping, Sequence

import torch

from .canvases import IGNORED
from .chats import Example, read_example


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
    """Turns examples into right-padded `input_ids`, `attention_mask` and `labels`; packed, into `position_ids` too.

    An example is a pair of prompt and response, each as text or both as token ids; a mapping with `prompt` and `response`, or `completion`
    as TRL names it, or with `messages` (a chat whose assistant turns are all learned) and, where the chat has some, `tools`; and with
    `chat_template_kwargs` for itself, as TRL has it.

    Args:
        tokenizer (*optional*): a tokenizer with a chat template; needed for examples that are text.
        pad_token_id (`int`, *optional*): default: the tokenizer's.
        pad_to_multiple_of (`int`): lengths are rounded up to it, which keeps the number of distinct shapes small.
        max_length (`int`, *optional*): longer examples are refused by name: cut ones would teach endings that are none.
        packing: several examples in a row of at most `max_length` tokens, each into the first row with place for it.
        template_kwargs (*optional*): what else the chat template reads, such as `{"enable_thinking": True}`; or a `chat_template`.

    Raises:
        ValueError: settings that do not go together; examples of another kind, without a response, too long, or with what the chat template
            does not read, by their place.
    """

    def __init__(
        self, tokenizer=None, pad_token_id: int | None = None, pad_to_multiple_of: int = 1, max_length: int | None = None,
        packing: bool = False, template_kwargs: Mapping | None = None,
    ):  # fmt: skip
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id if pad_token_id is not None else getattr(tokenizer, "pad_token_id", None)
        if self.pad_token_id is None:
            raise ValueError("`pad_token_id` is None and there is no tokenizer that has one; expected a token id")
        if pad_to_multiple_of < 1:
            raise ValueError(f"`pad_to_multiple_of` is {pad_to_multiple_of}; expected a positive integer")
        if max_length is not None and max_length < 2:
            raise ValueError(f"`max_length` is {max_length}; expected at least 2 tokens, one of a prompt and one of its response")
        if packing and max_length is None:
            raise ValueError("`packing` is given without `max_length`; expected how many tokens a row may take")
        self.pad_to_multiple_of, self.max_length, self.packing = pad_to_multiple_of, max_length, packing
        self.template_kwargs = dict(template_kwargs or {})

    def read(self, example: tuple | Mapping, name: str = "the example") -> Example:
        """Token ids of one example, and which of them are targets; ValueError, beginning with `name`, where it is none."""
        read = read_example(example, self.tokenizer, self.template_kwargs, name)
        if self.max_length is not None and len(read.ids) > self.max_length:
            raise ValueError(f"{name} has {len(read.ids)} tokens; expected at most {self.max_length}, which `max_length` says")
        return read

    def __call__(self, examples: Sequence[tuple | Mapping]) -> TrainingBatch:
        """Returns int64 tensors `(B, longest row)`; B is the number of examples, or of rows that they are packed into."""
        if not examples:
            raise ValueError("`examples` is empty; expected at least one pair of prompt and response")
        rows = [[self.read(example, f"example {place}")] for place, example in enumerate(examples)]
        if self.packing:
            rows = self._packed([row[0] for row in rows])
        longest = max(sum(len(example.ids) for example in row) for row in rows)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def padded(field, fill: int) -> torch.Tensor:
            laid = [[value for example in row for value in field(example)] for row in rows]
            return torch.tensor([[*row, *[fill] * (length - len(row))] for row in laid], dtype=torch.int64, device="cpu")

        batch = TrainingBatch(
            input_ids=padded(lambda example: example.ids, self.pad_token_id),
            attention_mask=padded(lambda example: [1] * len(example.ids), 0),
            labels=padded(lambda example: [i if t else IGNORED for i, t in zip(*example, strict=True)], IGNORED),
        )
        if self.packing:
            batch["position_ids"] = padded(lambda example: range(len(example.ids)), 0)
        return batch

    def _packed(self, examples: list[Example]) -> list[list[Example]]:
        rows: list[list[Example]] = []
        for example in examples:  # as they come: sorted by length, short ones would share rows of many canvases and pad all others
            fitting = (row for row in rows if sum(len(one.ids) for one in row) + len(example.ids) <= self.max_length)
            row = next(fitting, None)
            if row is None:
                rows.append(row := [])
            row.append(example)
        return rows


__all__ = ["BlockDiffusionCollator", "TrainingBatch"]
