"""Look a name up in a table, with an error that helps."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry of `table` called `name`; otherwise a ValueError that gives the nearest valid names."""
    if name in table:
        return table[name]
    raise unknown_name(name, table, what)


def unknown_name(name: str, valid: Iterable[str], what: str) -> ValueError:
    """The error for a name that no table has: the nearest valid names first, then all of them."""
    names = sorted(valid)
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
    return ValueError(f"unknown {what} '{name}'{hint} Known: {', '.join(names)}")


def check_keywords(known: Iterable[str], given: Iterable[str], what: str) -> None:
    """Raise the error of `unknown_name` for a keyword that is none of those known."""
    names = list(known)
    for name in given:
        if name not in names:
            raise unknown_name(name, names, what)
