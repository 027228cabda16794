"""Choice of backend, and the checks that all operations share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from adversarial import needs_triton

from proxsparse_triton.errors import BackendError, ConfigError, ShapeError
from proxsparse_triton.ops import dispatch
from proxsparse_triton.ops.dispatch import check_floating, check_like, check_strength, choose_backend, flat, have_triton, kernels_compile

CUDA = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda"))


@pytest.fixture(autouse=True)
def new_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "kernels_compile", lambda device: True)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system without it; tests/test_init.py starts Python where it cannot be found."""
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cpu_tensors_take_the_reference(dtype: torch.dtype) -> None:
    assert choose_backend("f", torch.zeros(4, dtype=dtype), None) == "reference"


@needs_triton
def test_cuda_tensors_take_triton_unless_fp64() -> None:
    assert choose_backend("f", CUDA, None) == "triton"
    assert choose_backend("f", SimpleNamespace(is_cuda=True, dtype=torch.float64), None) == "reference"
    assert choose_backend("f", CUDA, "triton") == "triton"
    assert choose_backend("f", CUDA, "reference") == "reference"


def test_cuda_tensors_fall_back_without_triton(no_triton: None) -> None:
    assert not have_triton()
    assert choose_backend("f", CUDA, None) == "reference"


def test_the_choice_is_traced_by_torch_compile() -> None:
    """On CUDA tensors the choice asks whether Triton is installed; Dynamo would refuse to trace the search itself."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1 if have_triton() else x, fullgraph=True, backend="aot_eager")
    assert compiled(torch.zeros(1)).item() == have_triton()


def test_triton_asked_for_and_missing(no_triton: None) -> None:
    with pytest.raises(BackendError, match=r"f: expected Triton for backend='triton', found none\. Install triton"):
        choose_backend("f", CUDA, "triton")


@needs_triton
def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("f", torch.zeros(4), "triton") == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendError, match=r"f: expected a CUDA tensor for backend='triton', got cpu\..*TRITON_INTERPRET=1"):
        choose_backend("f", torch.zeros(4), "triton")


@needs_triton
def test_triton_does_not_take_fp64() -> None:
    with pytest.raises(BackendError, match="f: expected fp32, fp16 or bf16 for backend='triton', got float64"):
        choose_backend("f", torch.zeros(4, dtype=torch.float64), "triton")


@pytest.mark.parametrize("backend", ["cuda", "", "Triton"])
def test_unknown_backend(backend: str) -> None:
    with pytest.raises(ConfigError, match=f"f: expected backend 'triton' or 'reference', got '{backend}'"):
        choose_backend("f", torch.zeros(4), backend)


@pytest.mark.parametrize("value", [1.0, [1.0], None, "z"])
def test_check_floating_refuses_what_is_no_tensor(value: object) -> None:
    with pytest.raises(TypeError, match=f"f: expected a tensor for z, got {type(value).__name__}"):
        check_floating("f", "z", value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_check_floating_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"f: expected float32, float16, bfloat16 or float64 for z, got {dtype}"):
        check_floating("f", "z", torch.zeros(4, dtype=dtype))


@pytest.mark.parametrize("value", [0, 0.0, 1, 2.5])
def test_check_strength_accepts(value: float) -> None:
    check_strength("f", "lam", value)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), -float("inf"), "1", None, torch.tensor(1.0)])
def test_check_strength_refuses(value: object) -> None:
    with pytest.raises(ConfigError, match="f: expected a finite lam >= 0, got"):
        check_strength("f", "lam", value)


@pytest.mark.parametrize("value", [0, 0.0, -1.0])
def test_check_strength_positive(value: float) -> None:
    with pytest.raises(ConfigError, match="f: expected a finite eps > 0, got"):
        check_strength("f", "eps", value, positive=True)


def test_check_like() -> None:
    z = torch.zeros(2, 4)
    check_like("f", "out", z, (2, 4), torch.device("cpu"))
    with pytest.raises(ShapeError, match=r"f: expected out of shape \(2, 8\), got \(2, 4\)"):
        check_like("f", "out", z, (2, 8), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"f: expected out on meta, got cpu. Move it with .to\('meta'\)"):
        check_like("f", "out", z, (2, 4), torch.device("meta"))


def test_flat_copies_what_the_kernels_cannot_address() -> None:
    x = torch.arange(9, dtype=torch.bfloat16)
    assert flat(x) is x
    for view in (x[1:], x.view(3, 3).t()):
        copy = flat(view)
        assert copy is not view
        assert torch.equal(copy, view)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 4 == 0


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_kernels_need_ampere(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert kernels_compile.__wrapped__(torch.device("cuda")) is expected


def test_an_old_card_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "kernels_compile", lambda device: False)
    assert choose_backend("f", CUDA, None) == "reference"
    with pytest.raises(BackendError, match="Ampere"):
        choose_backend("f", CUDA, "triton")
