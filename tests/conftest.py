"""Hypothesis profiles and what all tests share."""

import os

import pytest
from hypothesis import HealthCheck, settings

for name, examples, fixed in (("default", 50, True), ("thorough", 2000, False)):
    settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        derandomize=fixed,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the wide sweeps unless the thorough profile or ``-m`` asks for them."""
    if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" or config.getoption("-m"):
        return
    wide = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=wide)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
