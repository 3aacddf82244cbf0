import pyro
import pytest


@pytest.fixture(autouse=True)
def empty_param_store():
    """Pyro's parameter store is global to the process: no test sees what another left."""
    pyro.clear_param_store()
