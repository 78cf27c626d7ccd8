"""Core ML tests need coremltools; nothing here needs Apple hardware."""

import pytest
import torch

pytest.importorskip("coremltools.version", reason="the extra 'coreml' isn't installed")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
