"""The head in pieces of tokens: cross-entropies and soft embeddings without the logits of all tokens at once.

With 262,144 ids the logits of a token are a megabyte in float32, and the gradient of a cross-entropy holds several such tensors. So tokens
go through the head some at a time, and with gradients through it once more on the way back (`torch.utils.checkpoint`), which costs one more
product with the head and keeps nothing vocabulary-sized. The head is called as a module: what is attached to it counts. Pieces change sums
of gradients in their last bits alone; where all tokens fit one piece nothing is done twice.
"""

import torch
from torch.utils.checkpoint import checkpoint

from .ranks import largest

NUMBERS = 2**26  # logits at a time: 268 MB in float32, 256 tokens at 262,144 ids


def turns(model, tokens: int, groups: list, device: torch.device) -> int:
    """Into how many pieces so many tokens go: as many on every rank of `groups`, which gather the head together (`gathering_groups`)."""
    size = max(1, NUMBERS // model.config.text_config.vocab_size)
    return largest(max(1, -(-tokens // size)), groups, device)


def _losses(model, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model.compute_logits(hidden_states), targets, reduction="none")


def token_losses(model, hidden_states: torch.Tensor, targets: torch.Tensor, groups: list) -> torch.Tensor:
    """-log p(target) of each token, float32 `(N,)`, nats. Args: `hidden_states` `(N, D)`, `targets` int64 `(N,)`."""
    count = turns(model, len(targets), groups, targets.device)
    if count == 1:
        return _losses(model, hidden_states, targets)
    pairs = zip(hidden_states.tensor_split(count), targets.tensor_split(count), strict=True)
    return torch.cat([checkpoint(_losses, model, some, their, use_reentrant=False) for some, their in pairs])


@torch.no_grad()
def expected_embeddings(model, hidden_states: torch.Tensor, groups: list) -> torch.Tensor:
    """The soft embedding under each token's distribution, `(B, L, D)`, without gradient. Args: `hidden_states` `(B, L, D)`."""
    count = turns(model, hidden_states[..., 0].numel(), groups, hidden_states.device)
    if count == 1:
        return model.soft_embed(model.compute_logits(hidden_states))
    found = [model.soft_embed(model.compute_logits(some)) for some in hidden_states.flatten(0, 1)[None].tensor_split(count, dim=1)]
    return torch.cat(found, dim=1).view(*hidden_states.shape[:2], -1)


__all__ = ["expected_embeddings", "token_losses", "turns"]
