"""Checkpoints' files: PEFT's, AdapterHub's and our own; read, written, inspected and converted."""
