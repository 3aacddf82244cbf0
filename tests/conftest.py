import os

import pyro
import pytest
import torch

# read by CUDA's libraries at their first call
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
HAS_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def gpu_if_marked(request, monkeypatch):
    """Only tests that are marked so run on a GPU: the others expect the numbers of a CPU."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif not HAS_GPU:
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def empty_param_store():
    """Pyro's parameter store is global to the process: no test sees what another left."""
    pyro.clear_param_store()
