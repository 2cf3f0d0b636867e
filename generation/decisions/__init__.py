"""What a model says of questions whose answers are one of some options: a probability of each. Its files know the tokenizer and the
contract of a model, and nothing of how one works inside."""
