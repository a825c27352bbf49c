"""transformers' Auto classes know the model after ``import loglinear``, in either order, and nobody pays before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.tasks.lm.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer(["alpha beta gamma " * 20], 280)
    config = LogLinearConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, mamba_head_dim=8, mamba_state_size=8
    )
    LogLinearForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LOAD = "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"


@pytest.mark.parametrize(
    "code",
    [
        f"import sys, loglinear; from transformers import AutoModelForCausalLM; {LOAD}",
        f"import sys, transformers, loglinear; from transformers import AutoModelForCausalLM; {LOAD}",
        f"import sys; from transformers import AutoModelForCausalLM; import loglinear; {LOAD}",
        "import sys, loglinear; from transformers import AutoConfig\n"
        "print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__.replace('Config', 'ForCausalLM'))",
        "import sys, loglinear; from transformers.generation import GenerationMixin; import transformers\n"
        f"AutoModelForCausalLM = transformers.AutoModelForCausalLM; {LOAD}",
        "import sys, loglinear; from transformers import pipeline\n"
        "write = pipeline('text-generation', sys.argv[1], max_new_tokens=2)\n"
        # The second half is what `transformers serve` does.
        "write('alpha'); print(getattr(__import__('transformers'), type(write.model).__name__).__name__)",
    ],
    ids=[
        "loglinear first",
        "transformers first",
        "class first",
        "configuration",
        "generation first",
        "pipeline and serve",
    ],
)
def test_a_checkpoint_loads(python, code, checkpoint):
    assert python(code, checkpoint).endswith("LogLinearForCausalLM")


def test_importing_loglinear_stays_light():
    code = "import sys, loglinear; print(sorted({'transformers', 'triton', 'loglinear.models'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


def test_importing_transformers_stays_light(python):
    code = "import sys, loglinear, transformers; print(sorted({'loglinear.models', 'torch.optim.adam'} & set(sys.modules)))"
    assert "loglinear.models" not in python(code)


def test_the_import_system_is_left_as_it_was(python):
    code = """
import importlib, importlib.util, inspect, pickle, sys
import loglinear
spec = importlib.util.find_spec("transformers")
assert spec.name == "transformers" and "transformers" not in sys.modules
assert importlib.util.find_spec("transformers.no_such_module") is None
try:
    import transformers.no_such_module
except ModuleNotFoundError as error:
    assert error.name == "transformers.no_such_module"
else:
    raise AssertionError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto import configuration_auto
assert [type(finder).__name__ for finder in sys.meta_path].count("AutoClassesFinder") == 0
for module in (sys.modules["transformers"], configuration_auto):
    assert "exec_module" not in vars(module.__spec__.loader)
assert "class AutoConfig" in inspect.getsource(configuration_auto)
assert pickle.loads(pickle.dumps(AutoModelForCausalLM)) is AutoModelForCausalLM
pickle.loads(pickle.dumps(configuration_auto.__spec__.loader))
importlib.reload(loglinear)
importlib.reload(configuration_auto)
print("same")
"""
    assert python(code) == "same"


def test_without_transformers_nothing_happens(python):
    code = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
import loglinear
for use in ("import transformers", "from loglinear import LogLinearConfig", "import loglinear.models"):
    try:
        exec(use)
    except ModuleNotFoundError as error:
        print(error.name, error)
"""
    lines = python(code).splitlines()
    assert lines == [
        "transformers No module named 'transformers'",
        "transformers loglinear.LogLinearConfig needs transformers, which is not installed: pip install 'loglinear[models]'",
        "transformers loglinear.models needs transformers, which is not installed: pip install 'loglinear[models]'",
    ]


def test_an_error_of_ours_does_not_end_the_import_of_transformers(python):
    code = """
import sys, warnings
import loglinear
sys.modules["loglinear.models"] = None  # its import fails
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from transformers import AutoModelForCausalLM
print([str(warning.message) for warning in caught if "loglinear" in str(warning.message)])
"""
    assert "transformers will not know models of loglinear: ModuleNotFoundError" in python(code)
