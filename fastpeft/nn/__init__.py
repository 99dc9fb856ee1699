"""Thin modules: parameters, initialisation, state dict. Their forward is one call into ops."""

from .sharing import Branch, SharedInput, share_inputs, unshare_inputs

__all__ = ["Branch", "SharedInput", "share_inputs", "unshare_inputs"]
