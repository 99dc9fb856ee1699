"""The numbers of the dropout mask, for the definition in fastpeft.reference.dropout, the kernels and who launches them.

Numbers, and how a probability becomes one. What is drawn from them is written down in each, so that no mistake in it is
shared; the tests have numbers of their own.
"""

LANES = 1 << 16  # values of a lane: probabilities are multiples of one over it

ROW_STEP = 0x9E3779B97F4A7C15  # from a row's 64-bit key to the next one's, before mixing
ROW_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
ROW_SHIFTS = 30, 27, 31

PAIR_STEP = 0x9E3779B1  # from a pair of columns to the next, before mixing
PAIR_FACTORS = 0x85EBCA6B, 0xC2B2AE35
PAIR_SHIFTS = 15, 16


def threshold(dropout: float) -> int:
    """The number of the 65,536 lane values that are dropped.

    Args:
        dropout: probability of dropping an element, in [0, 1).
    """
    return min(round(dropout * LANES), LANES - 1)


def inverse_keep(dropout: float) -> float:
    """``1 / (1 - p)``, what is kept is multiplied with, for the probability that the mask really uses.

    Args:
        dropout: probability of dropping an element, in [0, 1).
    """
    return LANES / (LANES - threshold(dropout))
