"""What can go wrong with a bank of adapters. Every message names the bank's method, what it was given and expected."""


class BankError(Exception):
    """A bank cannot do what it was asked; it is as it was before the call."""


class UnknownAdapter(BankError, KeyError):
    """A name that no adapter was loaded under."""

    __str__ = Exception.__str__  # KeyError shows its message in quotes


class BankFull(BankError, RuntimeError):
    """More adapters are needed on the device at once than there are slots for."""


class BadCheckpoint(BankError, ValueError):
    """A checkpoint that cannot be served, and why."""


class NotFinite(BankError, ArithmeticError):
    """An adapter whose logits are not numbers: its weights, or their scale, overflow the model's dtype."""


class QueueFull(BankError):
    """As many requests wait as may wait; try again later."""
