"""Bottleneck adapters: their config, where they go in a model, what stands there and what they do to the model."""
