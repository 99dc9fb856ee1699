"""LoRA: its config, what it does to a model, what it keeps and the names of its parameters in a checkpoint."""
