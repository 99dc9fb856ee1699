"""Lines about many layers as few: those that differ in a number of their path alone become one."""

from collections.abc import Iterable


def folded(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(path, text) of rows, of which those with the same text and one number of the path different are one row.

    >>> folded([("layers.0.q", "fused"), ("layers.1.q", "fused"), ("layers.3.q", "fused"), ("head", "fused")])
    [('layers.0-1,3.q', 'fused'), ('head', 'fused')]
    """
    lines = [(tuple(path.split(".")), text) for path, text in rows]
    for place in range(max((len(parts) for parts, _ in lines), default=0)):
        lines = _folded_at(place, lines)
    return [(".".join(parts), text) for parts, text in lines]


def _folded_at(place: int, lines: list[tuple[tuple[str, ...], str]]) -> list[tuple[tuple[str, ...], str]]:
    numbers: dict[tuple, list[int]] = {}
    for parts, text in lines:
        numbered = len(parts) > place and parts[place].isdecimal()
        key = (parts[:place], parts[place + 1 :], text) if numbered else (parts, None, text)
        numbers.setdefault(key, []).extend([int(parts[place])] if numbered else [])
    found = []
    for (before, after, text), members in numbers.items():
        found.append((before if after is None else (*before, _ranges(members), *after), text))
    return found


def _ranges(numbers: list[int]) -> str:
    """``0-3,5`` of 0, 1, 2, 3 and 5."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)
