"""Many adapters on one model in one batch: a bank of slots, and a batcher that requests join and leave."""

from .bank.bank import AdapterBank
from .bank.lease import Lease
from .engine.batcher import Batcher
from .engine.request import Request
from .engine.settings import SamplingParams
from .errors import BadCheckpoint, BankError, BankFull, NotFinite, QueueFull, UnknownAdapter

__all__ = [
    "AdapterBank",
    "BadCheckpoint",
    "BankError",
    "BankFull",
    "Batcher",
    "Lease",
    "NotFinite",
    "QueueFull",
    "Request",
    "SamplingParams",
    "UnknownAdapter",
]
