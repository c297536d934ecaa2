"""Facts in lines, for people."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

__all__ = ["as_bytes", "print_facts"]


def print_facts(facts: Mapping[str, object]) -> None:
    """Print a line for each fact.

    Args:
        facts: values by name.
    """
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    Console(markup=False, highlight=False).print(table)


def as_bytes(number: int) -> str:
    """A size for people, such as `1.5 GiB`.

    >>> as_bytes(1000), as_bytes(3 << 29)
    ('1000 B', '1.5 GiB')

    Args:
        number: of bytes.
    """
    size, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
