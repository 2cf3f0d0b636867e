"""A prediction without the logits of every position at once, (C, V): a walk over the vocabulary in pieces, its kernel, and the
filters that it can do. It does not know where the hidden states come from, nor what is done with the prediction."""
