"""The table of mixers: what configs, lifts and documents read from it."""

import inspect
from pathlib import Path

import pytest

from loglinear.layers.table import LIFTED
from loglinear.models import MIXERS, LogLinearConfig

DOCS = Path(__file__).parents[2] / "docs"
DECODER = {  # fields that no mixer reads
    *("mixer", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"),
    *("residual_in_fp32", "rms_norm_eps", "initializer_range", "level_scale_std", "decoding_entry_dtype", "use_cache"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "keys_to_ignore_at_inference"),
}


def test_every_field_belongs_to_the_decoder_or_to_a_mixer():
    fields = {field for kind in MIXERS.values() for field in kind.arguments.values()}
    assert fields - {"num_levels"} == set(LogLinearConfig.__annotations__) - DECODER


@pytest.mark.parametrize("name", MIXERS)
def test_a_kind_fills_every_argument_of_its_class_or_leaves_its_default(name):
    kind = MIXERS[name]
    known = inspect.signature(kind.layer).parameters
    given = {"hidden_size", *kind.arguments, *kind.fixed}
    assert given <= set(known)
    assert not [one for one, p in known.items() if p.default is inspect.Parameter.empty and one not in given]


def test_twins_differ_in_lambda_alone(config_of):
    assert {name.removeprefix("log_linear_"): name for name in MIXERS if name.startswith("log_linear_")} == LIFTED
    for linear, log_linear in LIFTED.items():
        one, other = (dict(MIXERS[name].build(config_of(name)).named_parameters()) for name in (linear, log_linear))
        assert {name: x.shape for name, x in other.items() if not name.startswith("level_scale.")} == {
            name: x.shape for name, x in one.items()
        }
        assert "level_scale.L" in other


@pytest.mark.parametrize("page", ["models.md", "start/which_mixer.md"])
def test_documents_have_a_line_for_every_mixer(page):
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    assert [name for name in MIXERS if not any(line.startswith(f"| `{name}` |") for line in lines)] == []
