"""The extension of ``csrc/host/`` in Python, for where it is not built: the same names, the same results and launches.

File by file it says what those say. A call that is planned costs here about twice what it costs there, and a third of
what it costs without plans.
"""

from .guards import Guards
from .planned import Plan, Planned
from .program import Program, Ref

__all__ = ["Guards", "Plan", "Planned", "Program", "Ref"]
