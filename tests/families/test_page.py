from __future__ import annotations

from pathlib import Path

import pytest
from families import page
from families.configurations import FAMILIES, PUBLISHED, REFUSED

from proxsparse_triton.errors import ModelError
from proxsparse_triton.models.share import Part, Share


def test_the_page_names_what_is_tried() -> None:
    assert list(page.read()) == [*PUBLISHED, *FAMILIES, *REFUSED]
    assert len(FAMILIES) >= 100


def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "models.md")
    marks = "\n".join(f"<!-- {mark} -->\n\ntext\n" for mark in ("families", "published", "refused"))
    page.PAGE.write_text(f"| a | table | of words |\n\n{marks}")
    mixture = Share(1, 8, (Part("layers.*.mlp.experts", 6, "fused"),))
    found = page.Found(shares={"a": Share(4, 4), "b": mixture}, packed={"a": "", "b": "a reason"}, refused={"c": "words"})
    for _ in range(2):  # a table takes the place of the one before
        page.write(found)
        assert page.read() == {
            "a": ("100 %", "", "yes"),
            "b": ("12.5 %", "experts (`layers.*.mlp.experts`), 75.0 %", "no: a reason"),
            "c": ("words",),
        }
    found.shares["untried"] = mixture
    assert "untried" not in found.rows()


def test_reasons_are_what_was_got() -> None:
    assert page.reason(ModelError("export: expected a, got layers of b 2.5. Do c.")) == "layers of b 2.5"
    assert page.reason(ModelError("other")) == "other"
