"""The two tiny checkpoints in the layouts of the paper's own, with tokens and the logits of the definition for them."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

CHECKPOINTS = Path(__file__).parent / "checkpoints"


@pytest.fixture(params=["h_gated_deltanet", "hattention"])
def published(request):
    """A folder: config.json, model.safetensors, expected.safetensors (input_ids, logits)."""
    return CHECKPOINTS / request.param


@pytest.fixture
def copy_of(tmp_path):
    """``copy_of(folder, config={...}, tensors=function)``: a copy with other options, and with other tensors by name."""

    def copy(folder: Path, config=None, tensors=None) -> Path:
        target = tmp_path / "changed" / folder.name
        shutil.copytree(folder, target)
        if config is not None:
            content = json.loads((target / "config.json").read_text()) | config
            (target / "config.json").write_text(json.dumps(content))
        if tensors is not None:
            found = tensors(load_file(target / "model.safetensors"))
            save_file(found, target / "model.safetensors", metadata={"format": "pt"})
        return target

    return copy
