from __future__ import annotations

import pytest
import torch

from crosstrim.models import compat
from tests.support import tiny
from tests.support.gpu import DEVICE, REHEARSAL


def pytest_collection_modifyitems(items):
    if not REHEARSAL and not torch.cuda.is_available():
        for item in items:
            if "tests/gpu" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def model(dtype):
    built = tiny.build(dtype=dtype).to(DEVICE)
    compat.apply(built)
    return built


@pytest.fixture(autouse=True)
def _float32_is_float32():
    """The oracle's products are those of the model, so neither may be cut to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
