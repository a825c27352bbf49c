"""``convert`` writes what ``from_pretrained`` opens, tensor by tensor, in the dtypes of the original."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from loglinear.models import LogLinearConfig, LogLinearForCausalLM, convert

pytestmark = pytest.mark.default_packages


def test_a_converted_checkpoint_is_the_model(published, tmp_path):
    report = convert(published, tmp_path)
    model = LogLinearForCausalLM.from_pretrained(published)
    again, info = LogLinearForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert report.files == ["model.safetensors", "config.json"]
    assert report.parameters == model.num_parameters()
    assert str(report).startswith(f"{published.name} as {model.config.mixer}: ")


def test_shards(published, tmp_path):
    """No file holds more than the limit, unless a tensor alone does."""
    report = convert(published, tmp_path, max_shard_bytes=200_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert [*[path.name for path in shards], "model.safetensors.index.json", "config.json"] == report.files
    for path in shards:
        tensors = load_file(path).values()
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors) <= 200_000
    model, again = (LogLinearForCausalLM.from_pretrained(folder) for folder in (published, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_every_tensor_keeps_its_dtype(published, copy_of, tmp_path):
    """Matrices in bfloat16 and gates in float32, as training in mixed precision leaves them."""

    def change(tensors):
        return {name: x.bfloat16() if x.dim() > 1 else x for name, x in tensors.items()}

    convert(copy_of(published, tensors=change), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.layers.0.mixer.in_proj.weight"].dtype == torch.bfloat16
    assert written["model.layers.0.mixer.A_log"].dtype == torch.float32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert LogLinearForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_files_beside_the_weights_come_along(published, copy_of, tmp_path):
    source = copy_of(published)
    GenerationConfig(max_new_tokens=3).save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    report = convert(source, tmp_path / "out")
    assert report.files[1:] == ["generation_config.json", "tokenizer.json", "config.json"]
    assert LogLinearForCausalLM.from_pretrained(tmp_path / "out").generation_config.max_new_tokens == 3


def test_a_checkpoint_in_a_cache_of_the_hub(published, tmp_path):
    """The layout of huggingface_hub's cache, read without a connection, from a folder inside the repository."""
    commit = "0" * 40
    repository = tmp_path / "models--someone--models"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "gdn").symlink_to(published, target_is_directory=True)
    hub = {"subfolder": "gdn", "cache_dir": tmp_path, "local_files_only": True}
    model = LogLinearForCausalLM.from_pretrained("someone/models", **hub)
    report = convert("someone/models", tmp_path / "out", **hub)
    assert report.parameters == model.num_parameters()


def test_what_is_refused(published, tmp_path, make_model):
    convert(published, tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"output: .*out holds a model; choose another folder"):
        convert(published, tmp_path / "out")
    with pytest.raises(ValueError, match=r"checkpoint must be of a model_type in .*: got 'loglinear'"):
        convert(tmp_path / "out", tmp_path / "again")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_bytes((published / "config.json").read_bytes())
    with pytest.raises(
        FileNotFoundError, match=r"holds no model\.safetensors .*: weights are read from safetensors only"
    ):
        convert(tmp_path / "empty", tmp_path / "again")
    assert not (tmp_path / "again" / "config.json").exists()
    with pytest.raises(ValueError, match="variant must be None"):
        LogLinearForCausalLM.from_pretrained(published, variant="fp16")
    assert LogLinearConfig.from_pretrained(tmp_path / "out").mixer.startswith("log_linear_")
