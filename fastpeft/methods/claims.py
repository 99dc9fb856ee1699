"""What an adapter trains of the model's own, so that no two that act together train one weight."""

from collections.abc import Mapping

Claims = frozenset[str]  # names of the model's own weights; "path." is everything inside the module at this path


def refuse_shared(op: str, claims: Mapping[str, Claims]) -> None:
    """Raise if two of these train one weight, or one trains what the other has replaced by a copy.

    Args:
        op: the function to name in errors.
        claims: by what is to be called in the error.
    """
    names = list(claims)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            weight = _shared(claims[one], claims[other])
            if weight is not None:
                raise ValueError(f"{op}: {one} and {other} both train {weight}, expected one of them")


def _shared(one: Claims, other: Claims) -> str | None:
    for mine, theirs in ((one, other), (other, one)):
        insides = tuple(claim for claim in mine if claim.endswith("."))
        found = sorted(claim for claim in theirs if claim in mine or (insides and claim.startswith(insides)))
        if found:
            return found[0].removesuffix(".")
    return None
