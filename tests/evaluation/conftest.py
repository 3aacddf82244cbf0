import pytest
import torch


@pytest.fixture(scope="module")
def double_precision():
    """Float64 by default, also for programs that have no parameters to tell."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
