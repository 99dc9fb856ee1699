"""The extension of ``csrc/host/`` in Python, for where it is not built: the same names, the same results and launches.

File by file it says what those say. Where those loop over what they were told, a function is written out here, once, as
source (``source.py``): a program's steps, a layer's guards, and what recognises a call without making its key.
"""

from .front import Bound, Front
from .guards import Guards
from .planned import Plan, Planned
from .program import Program, Ref

__all__ = ["Bound", "Front", "Guards", "Plan", "Planned", "Program", "Ref"]
