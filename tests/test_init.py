"""Importing the package costs nothing and needs nothing."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import proxsparse_triton


def run_python(script: str) -> str:
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


BLOCKED = """
    import sys, time
    for name in ("triton", "datasets", "transformers"):
        sys.modules[name] = None  # importing it now raises ImportError
"""


def test_import_needs_no_heavy_library_and_no_time() -> None:
    output = run_python(
        BLOCKED
        + """
    before = time.perf_counter()
    import proxsparse_triton
    dir(proxsparse_triton)
    print(time.perf_counter() - before, "torch" in sys.modules)
    """
    )
    seconds, torch_imported = output.split()
    assert float(seconds) < 1
    assert torch_imported == "False"


def test_operations_run_without_triton_datasets_and_transformers() -> None:
    output = run_python(
        BLOCKED
        + """
    import torch
    import proxsparse_triton as pst
    from proxsparse_triton.errors import BackendError

    z = torch.tensor([[3.0, -2.0, 1.0, 0.5]])
    print(pst.prox_24(z, 10.0).tolist(), pst.mask_24(z.abs()).tolist(), pst.frozen_penalty(z, z, 1.0, 1.0).item())
    try:
        pst.prox_24(z, 1.0, backend="triton")
    except BackendError as error:
        print(error)
    """
    )
    first, second = output.splitlines()
    assert first == "[[3.0, -2.0, 0.0, 0.0]] [[True, True, False, False]] 0.0"
    assert second.startswith("prox_24: expected Triton for backend='triton', found none. Install triton")


def test_operations_import_no_kernel_until_one_runs() -> None:
    assert run_python("import sys, proxsparse_triton.ops; print('proxsparse_triton.kernels' in sys.modules)").strip() == "False"


def test_every_public_name_exists() -> None:
    for name in proxsparse_triton.__all__:
        assert callable(getattr(proxsparse_triton, name))
        assert name in dir(proxsparse_triton)
    with pytest.raises(AttributeError, match="module 'proxsparse_triton' has no attribute 'prox_25'"):
        _ = proxsparse_triton.prox_25
