"""Many adapters on one model in one batch: a bank of slots, and a batcher that requests join and leave."""

from .bank import AdapterBank, Lease
from .errors import BadCheckpoint, BankError, BankFull, UnknownAdapter

__all__ = ["AdapterBank", "BadCheckpoint", "BankError", "BankFull", "Lease", "UnknownAdapter"]
