"""Many adapters on one model in one batch: a bank of slots, and a batcher that requests join and leave."""

from .bank import AdapterBank
from .batcher import Batcher
from .errors import BadCheckpoint, BankError, BankFull, QueueFull, UnknownAdapter
from .lease import Lease
from .request import Request

__all__ = [
    "AdapterBank",
    "BadCheckpoint",
    "BankError",
    "BankFull",
    "Batcher",
    "Lease",
    "QueueFull",
    "Request",
    "UnknownAdapter",
]
