"""Tables of published papers that ship with bitlaw, as points CSV files with their source in the first lines."""

from importlib.resources import files

from bitlaw.names import unknown_name

PREFIX = "published:"
_FOLDER = files("bitlaw.scaling") / "published"


def published_names() -> list[str]:
    """Names of the shipped tables: "published:var-weight-only" and so on."""
    return sorted(
        PREFIX + entry.name.removesuffix(".csv") for entry in _FOLDER.iterdir() if entry.name.endswith(".csv")
    )


def published_text(name: str) -> str:
    """The CSV of a shipped table. ValueError with the nearest names if there is none."""
    if name not in published_names():
        raise unknown_name(name, published_names(), "published table")
    return (_FOLDER / f"{name.removeprefix(PREFIX)}.csv").read_text(encoding="utf-8")


def published_source(name: str) -> str:
    """Where a table comes from, and what was left out of it: its leading comment."""
    lines = published_text(name).splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
