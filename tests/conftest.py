"""Every test starts from the same seed, on one thread, and hypothesis draws the same examples each time."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(1)  # tests run side by side; one core each


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
