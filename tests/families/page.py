"""The tables of docs/models.md: what a run of the tests found, written and read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from proxsparse_triton.models.share import Share, percent

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
Row = tuple[str, ...]


@dataclass
class Found:
    """By name: the runs that were made, shares, why a family is not packed or not pruned at all ("" where it is)."""

    runs: dict[str, tuple[Path, Path]] = field(default_factory=dict)
    shares: dict[str, Share] = field(default_factory=dict)
    packed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    published: dict[str, Share] = field(default_factory=dict)

    def tables(self) -> dict[str, tuple[Row, dict[str, Row]]]:
        """Mark -> titles, and the rows of those that were tried in every part."""
        families = {
            name: (percent(share.fraction), left_dense(share), "no: " + self.packed[name] if self.packed[name] else "yes")
            for name, share in self.shares.items()
            if name in self.packed
        }
        published = {name: (percent(share.fraction), left_dense(share)) for name, share in self.published.items()}
        return {
            "families": (("family", "pruned", "largest part left dense", "packed"), families),
            "published": (("model", "pruned", "largest part left dense"), published),
            "refused": (("family", "why"), {name: (why,) for name, why in self.refused.items()}),
        }

    def rows(self) -> dict[str, Row]:
        return {name: row for _, rows in self.tables().values() for name, row in rows.items()}


def left_dense(share: Share) -> str:
    if not share.dense:
        return ""
    part = share.dense[0]
    name = str(part).replace(part.name, f"`{part.name}`")
    return f"{name}, {percent(part.weights / share.total)}"


def reason(error: Exception) -> str:
    """What an error of the package says it got."""
    found = re.search(r"got (?P<what>.*?)\.(?: |$)", str(error), re.DOTALL)
    return found["what"] if found else str(error)


def read() -> dict[str, Row]:
    """The rows of all tables with a mark."""
    rows = {}
    for table in re.findall(r"(?<=-->\n)(?:\|.*\n)+", PAGE.read_text(encoding="utf-8")):
        for line in table.splitlines()[2:]:  # below titles and rule
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows[name] = tuple(cells)
    return rows


def write(found: Found) -> None:
    """Puts each table behind its mark, in place of the one that stands there."""
    text = PAGE.read_text(encoding="utf-8")
    for mark, (titles, rows) in found.tables().items():
        lines = [_line(titles), "|" + "---|" * len(titles), *(_line((name, *row)) for name, row in rows.items())]
        table = "\n".join(lines) + "\n"
        text, count = re.subn(rf"(<!-- {mark} -->\n)(?:\|.*\n)*", lambda match, table=table: match[1] + table, text)
        assert count == 1, f"{PAGE} has no mark {mark}"
    PAGE.write_text(text, encoding="utf-8")


def _line(cells: Row) -> str:
    return "| " + " | ".join(cells) + " |"
