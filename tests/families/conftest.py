from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-models", action="store_true", help="Write the tables of docs/models.md from what was found.")
