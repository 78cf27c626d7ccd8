"""Makes the examples importable, which are scripts and no package, and the files they read."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Keep the small trainings on one core: threads that wait for a busy one cost tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of IDX files whose ten classes a small network can't confuse."""
    from idx_files import band_images, write_folder

    return write_folder(tmp_path_factory.mktemp("bands"), band_images(20), band_images(50))
