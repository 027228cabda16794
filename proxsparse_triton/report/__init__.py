"""Finished runs as one HTML page: reads run folders only, and draws without any library."""

from __future__ import annotations

from .page import Report, write_report

__all__ = ["Report", "write_report"]
