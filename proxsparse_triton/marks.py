"""What tells that a file is of this tool, where its name alone does not: `pst report` replaces only such, `--overwrite` too."""

from __future__ import annotations

TOOL = "proxsparse-triton"
PAGE_MARK = f"<!-- written by pst report ({TOOL}); this line lets it be replaced -->"
PICTURE_MARK = f"pst report ({TOOL})"
HEAD_BYTES = 2000  # a mark stands within
