"""Prompt tuning: its config and what it does to a model."""
