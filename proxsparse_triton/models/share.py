"""How much of a decoder is 2:4, counted in weights: a mixture of experts has many layers outside of its experts, and few weights.

The decoder's weights are those of the 2-D and 3-D parameters inside its blocks, each parameter once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

ENOUGH = 0.5  # below this a run is told to be the smaller part
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
# Decoder blocks are numbered: model.layers.0.mlp..., h.0.attn...
NUMBERED = re.compile(r"(?:^|(?P<list>.*?)\.)\d+\.")
OTHER_TOWERS = re.compile(r"vision|visual|image|audio|speech", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """What stays dense under one name. name: of the modules that hold it, numbers as *. weights: of all of them. reason: of most."""

    name: str
    weights: int
    reason: str

    def __str__(self) -> str:
        fused = self.reason.startswith("fused experts")  # of a module that may be called otherwise
        return f"experts ({self.name})" if fused or self.name.endswith("experts") else self.name


@dataclass(frozen=True)
class Share:
    """pruned, total: the decoder's weights that are 2:4, and all of them. dense: the parts left dense, the largest first."""

    pruned: int
    total: int
    dense: tuple[Part, ...] = ()

    @property
    def fraction(self) -> float:
        return self.pruned / max(self.total, 1)

    def __str__(self) -> str:
        return f"{percent(self.fraction)} of the decoder's weights"

    @property
    def warning(self) -> str:
        """One line where less than half is 2:4, with the largest part left dense; else empty."""
        if self.fraction >= ENOUGH:
            return ""
        said = f"Warning: only {self} are 2:4."
        if not self.dense:
            return said
        part = self.dense[0]
        why = f" ({part.reason})" if part.reason else ""
        return f"{said} The largest part left dense: {part}, {percent(part.weights / max(self.total, 1))} of the decoder's weights{why}."

    def as_json(self) -> dict[str, Any]:
        """What a manifest and --json have under `decoder`."""
        parts = [{"part": part.name, "weights": part.weights, "reason": part.reason} for part in self.dense]
        return {"weights": self.total, "pruned": self.pruned, "share": self.fraction, "left_dense": parts}


NOTHING = Share(0, 0)


def share_of(weights: Mapping[str, int], pruned: Collection[str], reasons: Mapping[str, str] | None = None, otherwise: str = "") -> Share:
    """Args: weights: parameter -> its number of weights, all of one decoder. pruned: those that are 2:4; others than in `weights` do not
    count. reasons: why a parameter is not among them; where it has none: `otherwise`."""
    chosen = set(pruned)
    parts: dict[str, dict[str, int]] = {}
    for name, count in weights.items():
        if name not in chosen:
            counts, reason = parts.setdefault(part_name(name), {}), (reasons or {}).get(name, otherwise)
            counts[reason] = counts.get(reason, 0) + count
    dense = [Part(name, sum(counts.values()), max(counts, key=lambda reason: counts[reason])) for name, counts in parts.items()]
    dense.sort(key=lambda part: -part.weights)
    return Share(sum(count for name, count in weights.items() if name in chosen), sum(weights.values()), tuple(dense))


def part_name(parameter: str) -> str:
    """`model.layers.3.mlp.experts.0.up_proj.weight` -> `model.layers.*.mlp.experts`: the module, all experts together."""
    parts = parameter.split(".")[:-1] or [parameter]
    experts = next((at for at, part in enumerate(parts) if part.endswith("experts")), len(parts))
    return NUMBER.sub("*", ".".join(parts[: experts + 1]))


def weights_in_files(shapes: Mapping[str, tuple[int, ...]], pruned: Collection[str] = ()) -> dict[str, int]:
    """The decoder's weights by their keys in weight files, as far as names and shapes tell them: those of the numbered list that holds
    most of the pruned ones, or else most weights.

    Experts are one matrix each in the files of many models, and one parameter in memory: their weights are as many.
    """
    lists: dict[str, dict[str, int]] = {}
    for key, shape in shapes.items():
        found = NUMBERED.match(key)
        if found and len(shape) in (2, 3):
            lists.setdefault(found["list"] or "", {})[key] = math.prod(shape)
    chosen = set(pruned)

    def rank(name: str) -> tuple[int, bool, int]:
        inside = lists[name]
        return sum(count for key, count in inside.items() if key in chosen), not OTHER_TOWERS.search(name), sum(inside.values())

    return lists[max(lists, key=rank)] if lists else {}


def read_share(entry: object) -> Share | None:
    """`Share.as_json` read back; None where there is none, or it makes no sense."""
    if not isinstance(entry, Mapping) or not _count(entry.get("weights")) or not _count(entry.get("pruned")):
        return None
    listed = entry.get("left_dense")
    dense = [
        Part(_line(part.get("part")), part["weights"], _line(part.get("reason")))
        for part in (listed if isinstance(listed, list) else [])
        if isinstance(part, Mapping) and _count(part.get("weights"))
    ]
    return Share(entry["pruned"], entry["weights"], tuple(dense)) if entry["pruned"] <= entry["weights"] else None


def _line(value: object) -> str:
    """Somebody else's words on one line of a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in str(value))[:200]


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def percent(share: float) -> str:
    """0.0317 -> 3.1 %; 100 % only where it is all, 0 % only where it is nothing."""
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    return "under 0.1 %" if share < 0.001 else f"{math.floor(1000 * share) / 10:.1f} %"
