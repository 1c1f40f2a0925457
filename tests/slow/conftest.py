"""What the slow tests share."""

import pytest
from witness import write_data


@pytest.fixture(scope="session")
def witness_data(tmp_path_factory):
    """The folder that a `witness.Run` reads."""
    folder = tmp_path_factory.mktemp("witness") / "data"
    write_data(folder)
    return folder
