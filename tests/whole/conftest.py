"""What several tests of the whole share: the built wheel."""

from pathlib import Path

import pytest
from tests.support.installation import install_built_wheel


@pytest.fixture(scope="session")
def wheel_python(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The interpreter of an environment in which the built wheel is installed, and nothing else. Built once a run."""
    folder = tmp_path_factory.getbasetemp()
    # The folders of the workers of pytest-xdist stand side by side in that of the run.
    return install_built_wheel((folder if worker_id == "master" else folder.parent) / "wheel")
