"""What every test runs under."""

import os

import pytest
from hypothesis import settings

# The same examples every time, and no clock: how fast a shared machine is proves nothing.
settings.register_profile("gfcompile", derandomize=True, deadline=None)
settings.load_profile("gfcompile")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of this test run, shared by its workers: the user's is neither read nor filled."""
    base = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each worker a folder of its own under the run's.
    run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["GFCOMPILE_CACHE"] = str(run / "gfcompile-cache")
