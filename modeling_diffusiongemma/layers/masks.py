r"""What may attend to what: one rule for the prompt pass and for the canvas pass, and the forms in which attention takes it.

A pass sees the slots of the cache followed by its own new tokens. Slot j of a layer that stores K of the L tokens seen
so far holds token j + max(L - K, 0). Token t is visible to a query when it is real and

- prompt pass, query at i:  t <= i, and on sliding layers t > i - sliding_window; or both lie in the same image;
- canvas pass, any query:   t < n, and on sliding layers t > n - sliding_window, where n is the row's prompt length
  (the canvas begins there); and every token of the canvas.

With sliding_window = 3, tokens 2 and 3 being an image (x: visible in every layer, o: in full-attention layers alone):

    prompt pass, 6 tokens      canvas pass, 3 tokens behind them
    i\t 0 1 2 3 4 5            i\t 0 1 2 3 4 5 6 7 8
     0  x                       6  o o o o x x x x x
     1  x x                     7  o o o o x x x x x
     2  x x x x                 8  o o o o x x x x x
     3  o x x x
     4  o o x x x
     5  o o o x x x

In training all canvases of a row lie side by side: each has an n of its own and sees itself and none of the others. In packed rows, which
hold several conversations, a token is visible to tokens of its conversation alone.

"Strictly earlier" in the canvas rule is the invariant of training: `t <= n` would show the canvas its own first clean
token (guarded by tests/test_loss.py::test_canvas_sees_nothing_clean_from_itself_on).
Where a batch is padded, a window counts only real tokens, so that a row sees what it would see alone.
The rule holds for every cache of transformers: dynamic sliding layers keep the last sliding_window - 1 tokens, static
ones the last sliding_window (one more than may be seen), and a `DynamicCache()` built without a config keeps all.
"""

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


def slot_tokens(slots: int, seen: int, new: int, device: torch.device) -> torch.Tensor:
    """Index of the token in each slot and of each new token, int64 `(slots + new,)`; a slot not yet filled gets -1."""
    token = torch.arange(slots, device=device) + max(seen - slots, 0)
    return torch.cat((token.masked_fill(token >= seen, -1), torch.arange(seen, seen + new, device=device)))


def prompt_mask(
    token: torch.Tensor, query: torch.Tensor, window: int | None, real: torch.Tensor | None, images: torch.Tensor | None,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Boolean `(B or 1, 1, Q, S)` of the prompt rule.

    Args:
        token (`int64 (S,)`): token in each key slot, from `slot_tokens`.
        query (`int64 (Q,)`): token index of each query; the queries are the last Q keys.
        window (`int`, *optional*): `sliding_window` on sliding layers.
        real (`bool (B, L + Q)`, *optional*): True at real tokens, which a window counts.
        images (`int64 (B, Q)`, *optional*): which image of its row each new token belongs to, -1 for text.
        documents (`int64 (B, L + Q)`, *optional*): which conversation of its row each token belongs to.
    """
    visible = ((token >= 0) & (token <= query[:, None]))[None]  # (1, Q, S)
    if window is not None:
        rank = _ranks(token, real)  # (B or 1, S)
        visible = visible & (rank[:, None] > rank[:, -query.shape[0] :, None] - window)
    if images is not None:
        cached = images.new_full((images.shape[0], token.shape[0] - query.shape[0]), -1)
        key_images = torch.cat((cached, images), dim=1)
        visible = visible | ((images[:, :, None] == key_images[:, None]) & (images[:, :, None] >= 0))  # (B, Q, S)
    if documents is not None:
        visible = visible & (documents[:, token.clamp(min=0)][:, None] == documents[:, query, None])
    if real is not None:
        visible = visible & real[:, token.clamp(min=0)][:, None]
        # A padding query would see nothing and softmax to NaN, which a zero weight does not erase: it sees itself.
        visible = visible | (token == query[:, None])
    return visible[:, None]


def canvas_mask(
    token: torch.Tensor, canvas_length: int, prefix: torch.Tensor, window: int | None, real: torch.Tensor | None,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Boolean `(B or 1, 1, 1, S)` of the canvas rule, the same for every query of a row; with K > 1 canvases a row `(B, 1, Q, S)`.

    Args: as in `prompt_mask`; the last `canvas_length` of `token` are the canvas, or K of them, equally long, and `prefix` (`int64
    (B or 1, K)`) is n, the index of the first token each must not see. `documents` `(B, L)`: a canvas belongs to the conversation of the
    token before its n.
    """
    visible = (token >= 0) & (token < prefix[..., None])  # (B or 1, K, S)
    if window is not None:
        start = prefix
        if real is not None:  # how many real tokens come before the canvas
            before = torch.arange(real.shape[1], device=real.device) < prefix[..., None]  # (B, K, L + C)
            start = (real.cumsum(dim=1)[:, None] * before).amax(dim=-1)
        visible = visible & (_ranks(token, real)[:, None] > start[..., None] - window)
    if documents is not None:
        here = documents[:, token.clamp(min=0, max=documents.shape[1] - 1)]
        visible = visible & (here[:, None] == documents.gather(1, prefix - 1)[..., None])
    count = prefix.shape[1]
    itself = torch.eye(count, dtype=torch.bool, device=token.device).repeat_interleave(canvas_length // count, dim=1)
    visible[..., -canvas_length:] = itself
    if real is not None:
        visible = visible & real[:, token.clamp(min=0)][:, None]
    if count > 1:
        visible = visible.repeat_interleave(canvas_length // count, dim=1)
    return visible[:, None]


def _ranks(token: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Place of each slot's token among the real tokens, `(B or 1, S)`: what a sliding window counts."""
    return token[None] if real is None else (real.cumsum(dim=1) - 1)[:, token.clamp(min=0)]


def boolean(visible: torch.Tensor, batch_size: int, queries: int, dtype: torch.dtype) -> torch.Tensor:
    """As it is: what takes this form broadcasts by itself, and one row of a canvas mask serves every query."""
    return visible


def expanded(visible: torch.Tensor, batch_size: int, queries: int, dtype: torch.dtype) -> torch.Tensor:
    """Boolean `(B, 1, Q, S)`."""
    return visible.expand(batch_size, 1, queries, visible.shape[-1])


def additive(visible: torch.Tensor, batch_size: int, queries: int, dtype: torch.dtype) -> torch.Tensor:
    """`(B, 1, Q, S)` in `dtype`: 0 where a key is visible, and the lowest number elsewhere."""
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=visible.device)
    seen = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(expanded(visible, batch_size, queries, dtype), seen, hidden)


def flex_keys(keys: int, device: torch.device) -> int:
    """How many keys flex_attention is given for so many: on a CPU up to 15 more, which nothing sees.

    torch (2.11 to 2.15) compiles it for AVX2 so that of 8, 24, 40, ... 120 keys it reads memory nobody has written; multiples of 16 are
    right (tests/test_parity.py::test_flex_attention_equals_eager).
    """
    return -(-keys // 16) * 16 if device.type == "cpu" and keys < 128 else keys


def block_mask(visible: torch.Tensor, batch_size: int, queries: int, dtype: torch.dtype) -> BlockMask:
    """flex_attention's `BlockMask`, as wide as `flex_keys` says."""
    more = flex_keys(visible.shape[-1], visible.device) - visible.shape[-1]
    visible = expanded(torch.nn.functional.pad(visible, (0, more)) if more else visible, batch_size, queries, dtype)

    def look_up(batch, head, query, key):
        return visible[batch, 0, query, key]

    return create_block_mask(look_up, batch_size, None, queries, visible.shape[-1], device=visible.device)


def image_numbers(mm_token_type_ids: torch.Tensor) -> torch.Tensor:
    """Numbers the images of each row: int64 `(B, P)`, -1 at text. Consecutive positions of type 1 or 2 are one image."""
    is_image = (mm_token_type_ids == 1) | (mm_token_type_ids == 2)
    before = torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    return torch.where(is_image, (is_image & ~before).cumsum(dim=1), -1)


__all__ = ["additive", "block_mask", "boolean", "canvas_mask", "expanded", "flex_keys", "image_numbers", "prompt_mask", "slot_tokens"]
