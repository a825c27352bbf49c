"""Parameter counts at the paper's size, on the meta device: the limits of the design, and the published sizes."""

import pytest

from loglinear.layers.table import LIFTED
from loglinear.models.sizes import count_parameters, paper_config, parameter_table

MILLIONS = {"mamba2": (802, 825), "gated_deltanet": (793, 796)}  # published


@pytest.mark.parametrize("linear", LIFTED)
def test_log_linear_adds_few_parameters(linear):
    base, more = (count_parameters(paper_config(name)) for name in (linear, f"log_linear_{linear}"))
    assert 0 < more - base < (0.03 if linear == "mamba2" else 0.01) * base
    if linear in MILLIONS:
        assert (round(base / 1e6), round(more / 1e6)) == MILLIONS[linear]


def test_table_states_what_models_count():
    table = parameter_table()
    base, more = (count_parameters(paper_config(name)) for name in ("mamba2", "log_linear_mamba2"))
    assert f"| Log-Linear Mamba-2 | {more:,} | {more - base:,} (2.90%) |" in table
    heads, levels, hidden, layers = 48, 15, 1536, 21
    assert more - base == layers * heads * levels * (hidden + 1)
