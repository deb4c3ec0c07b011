"""Which kernel runs, and what is said when it cannot. None of this needs Triton."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import crosstrim
from crosstrim.errors import ConfigError, InputError, MissingExtraError
from crosstrim.method.kernels.saliency import kernel_for

TRITON = "crosstrim.method.kernels.saliency_triton"


@pytest.fixture
def pick(monkeypatch):
    """Names the kernel for queries that have a device, a dtype and a head size, but no memory."""

    def function(choice=None, device="cuda", dtype=torch.float32, size=128, triton=True, interpreted=False):
        monkeypatch.delenv("CROSSTRIM_KERNEL", raising=False)
        if choice is not None:
            monkeypatch.setenv("CROSSTRIM_KERNEL", choice)
        kernel = SimpleNamespace(__module__=TRITON)
        stand_in = SimpleNamespace(attention_received=kernel, INTERPRETED=interpreted) if triton else None
        monkeypatch.setitem(sys.modules, TRITON, stand_in)  # None is how Python marks what cannot be imported
        monkeypatch.delattr("crosstrim.method.kernels.saliency_triton", raising=False)
        with FakeTensorMode():
            queries = torch.empty(1, 2, 3, size, device=device, dtype=dtype)
        return kernel_for(queries).__module__.rsplit("_", 1)[1]

    return function


def test_auto_takes_torch_until_the_other_was_measured(pick):
    assert pick() == pick("auto") == pick("") == "torch"
    assert pick(device="cpu", interpreted=True) == pick(dtype=torch.bfloat16) == pick(triton=False) == "torch"


def test_the_choice_is_obeyed(pick):
    assert pick("torch") == "torch"
    assert pick("triton") == pick("triton", device="cpu", interpreted=True) == "triton"
    assert pick("triton", dtype=torch.bfloat16) == pick("triton", dtype=torch.float16) == "triton"
    assert pick("triton", size=20) == "triton"


@pytest.mark.parametrize(
    ("situation", "error", "wording"),
    [
        ({"choice": "cuda"}, ConfigError, "CROSSTRIM_KERNEL is 'cuda'; it must be auto, torch or triton"),
        ({"triton": False}, MissingExtraError, r"pip install 'crosstrim\[kernels\]', or set CROSSTRIM_KERNEL=auto"),
        ({"device": "cpu"}, ConfigError, "these are on cpu; set CROSSTRIM_KERNEL=auto, or TRITON_INTERPRET=1 before"),
        ({"dtype": torch.float64}, InputError, "got torch.float64 and 128; set CROSSTRIM_KERNEL=auto"),
        ({"size": 129}, InputError, "heads of up to 128 numbers, got torch.float32 and 129"),
    ],
)
def test_what_cannot_run_is_refused(pick, situation, error, wording):
    with pytest.raises(error, match=wording):
        pick(**{"choice": "triton"} | situation)


def test_the_variable_is_read_at_each_call(monkeypatch):
    inputs = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 5, 4), torch.ones(1, 3, 5, dtype=torch.bool)
    monkeypatch.setenv("CROSSTRIM_KERNEL", "torch")
    assert crosstrim.saliency(*inputs).sum() == pytest.approx(6)
    monkeypatch.setenv("CROSSTRIM_KERNEL", "fast")
    with pytest.raises(ConfigError, match="'fast'"):
        crosstrim.saliency(*inputs)
