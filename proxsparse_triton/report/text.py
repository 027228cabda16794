"""Figures for people."""

from __future__ import annotations

from collections.abc import Mapping


def figure(value: float | None) -> str:
    """A perplexity: three decimals, none from a thousand on."""
    if value is None:
        return "not measured"
    if abs(value) >= 1e15:
        return f"{value:.3e}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """0.9876 -> 98.8 %; never rounded up to all or down to nothing."""
    if share is None:
        return "-"
    if abs(share) > 1e6:  # no share
        return f"{share:.1e}"
    shown = f"{100 * share:.1f}"
    if shown == "100.0" and share < 1:
        return "> 99.9 %"
    if shown == "0.0" and share > 0:
        return "< 0.1 %"
    return f"{shown} %"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if abs(seconds) > 1e12:  # no time that anybody waited for
        return f"{seconds:.1e} s"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float | None) -> str:
    if count is None:
        return "-"
    if abs(count) > 1e18:
        return f"{count:.1e} bytes"
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def increase(pruned: float | None, dense: float | None) -> str:
    """Of a perplexity over the dense one: +12.3 %, or x 7.1 where it is a multiple."""
    if pruned is None or dense is None or dense <= 0:
        return "-"
    ratio = pruned / dense
    return f"x {ratio:,.1f}" if ratio >= 3 else f"{100 * (ratio - 1):+.1f} %"


def setting(value: object) -> str:
    """A value of a manifest in a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {setting(item)}" for key, item in value.items()) or "none"
    return str(value)


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
