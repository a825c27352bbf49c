"""The examples run as they stand, and their figures say what their text says."""

import importlib.util
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Loads an example by name, as a module."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("mixer", ["log_linear", "attention"])
def test_the_small_gpt_learns(example, mixer):
    options = f"--mixer {mixer} --steps 12 --context 128 --width 64 --batch 4"
    losses = example("nano_gpt").main(options.split())
    assert losses[0] == pytest.approx(5.55, abs=0.15)  # log(256): it knows nothing
    assert losses[-1] < 4.2


def test_the_small_gpt_is_causal_and_its_positions_count(example):
    """A changed token changes no earlier logits; equal tokens at different places have different logits."""
    import torch

    nano = example("nano_gpt")
    torch.manual_seed(0)
    model = nano.GPT(nano.Config(context=64, width=32)).eval()
    ids = torch.randint(0, 256, (1, 64))
    changed = ids.clone()
    changed[:, 40:] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(changed)[:, :40], model(ids)[:, :40], rtol=0, atol=1e-5)
        equal = model(torch.full((1, 64), 7))
    assert (equal[0, 5] - equal[0, 50]).abs().max() > 1e-3


def test_packed_documents_give_the_loss_and_gradients_of_single_rows(example):
    found = example("packed_training").main(["--tokens", "400", "--steps", "6"])
    assert found["packed"] == pytest.approx(found["padded"], abs=1e-5)
    assert found["error"] < 1e-5  # float32, measured 5e-8
    assert found["last"] < found["first"] - 0.5


def test_packing_without_borders_gives_another_loss(example):
    """The comparison above can fail."""
    import torch

    packed = example("packed_training")
    torch.manual_seed(0)
    config = packed.LogLinearConfig(vocab_size=256, hidden_size=32, num_hidden_layers=1, max_position_embeddings=512)
    model = packed.LogLinearForCausalLM(config).train()
    texts = [text[:100] for text in packed.take(packed.documents(), 1800)]
    batch = packed.pack(texts)
    loss, gradients = packed.gradients(model, batch)
    _, others = packed.gradients(model, {**batch, "cu_seqlens": torch.tensor([0, batch["input_ids"].numel()])})
    assert (gradients - others).norm() > 1e-3 * gradients.norm()
    assert loss == pytest.approx(packed.gradients(model, packed.pad(texts))[0], abs=1e-5)


def test_forks_and_rollbacks_equal_the_text_read_at_once(example):
    module = example("fork_and_rollback")
    differences = module.main()
    assert sorted(differences) == ["fork", "rollback", "snapshot"]
    assert max(differences.values()) < 1e-5  # float32 logits, measured 3e-7
    # The comparison can fail: one token more or less of a draft is another text.
    model, prompt = module.small_model(), module.torch.arange(90).unsqueeze(0)
    logits = model(prompt, use_cache=False).logits
    assert module.difference(logits, model, prompt[:, :-1]) > 1e-3


@pytest.mark.slow
def test_the_notebook_runs_and_draws_λ(tmp_path):
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "committed without results"
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    first, last = (float(word) for word in printed.split("loss ")[1].split(" nats")[0].split(" -> "))
    assert last < 3.5 < 5 < first
    assert "def __init__(self" in printed
    assert any("image/png" in output.get("data", {}) for output in code[-1].outputs)
