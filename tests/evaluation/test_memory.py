"""Out of memory in all its forms, and nothing else, becomes a ResourceError."""

from __future__ import annotations

import pytest
import torch

from proxsparse_triton.errors import ResourceError
from proxsparse_triton.evaluation.memory import explain_out_of_memory, is_out_of_memory

OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_every_form_is_explained(error: BaseException) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(ResourceError) as caught, explain_out_of_memory("f", "8 windows", "Lower --batch-size."):
        raise error
    assert str(caught.value) == "f: expected memory for 8 windows, got out of memory. Lower --batch-size."
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("out of memory"), KeyError("memory")])
def test_other_errors_pass(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, explain_out_of_memory("f", "8 windows", "Lower --batch-size."):
        raise error
    assert caught.value is error


def test_what_the_cpu_allocator_really_says() -> None:
    with pytest.raises(ResourceError), explain_out_of_memory("f", "an exabyte", "Ask for less."):
        torch.empty(2**60, dtype=torch.uint8)
