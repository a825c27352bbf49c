"""Every test starts from the same seed, on one thread, and hypothesis draws the same examples each time."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(1)  # tests run side by side; one core each


def pytest_collection_modifyitems(items):
    """Long tests first: no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
