"""What a compiled kernel takes of the card."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path


def usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory (REG, STACK, LOCAL) of a thread, as Triton's own cuobjdump reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
