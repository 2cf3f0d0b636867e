"""What the model is built of: layers, attention, experts, and the masks and caches that they take. They know neither files of
weights nor losses, nor the model."""
