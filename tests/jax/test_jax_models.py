"""The Flax decoder against the PyTorch one: checkpoints both ways, logits, decoding and packed documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from loglinear.jax.models import LogLinearConfig, LogLinearForCausalLM, weight_decay_mask
from loglinear.models import LogLinearConfig as TorchConfig
from loglinear.models import LogLinearForCausalLM as TorchModel
from oracle import error

pytestmark = pytest.mark.default_packages
NAMES = ["log_linear_mamba2", "log_linear_gated_deltanet", "mamba2", "gated_deltanet"]
SIZES = {
    **{"mixer": NAMES, "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48},
    **{
        "max_position_embeddings": 128,
        "mamba_head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_state_size": 8,
        "mamba_num_groups": 2,
    },
    **{
        "delta_num_heads": 4,
        "delta_num_key_heads": 2,
        "delta_key_dim": 8,
        "delta_value_dim": 4,
        "initializer_range": 0.3,
    },
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A PyTorch model whose parameters are all random, and the Flax model of its checkpoint."""
    torch.manual_seed(0)
    theirs = TorchModel(TorchConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(folder)
    return theirs, LogLinearForCausalLM.from_pretrained(folder), folder


def ids(T, rows=2):
    return torch.randint(50, (rows, T), generator=torch.Generator().manual_seed(1))


def as_torch(x):
    return torch.from_numpy(np.array(x))


def test_logits_decoding_and_documents(pair):
    theirs, model, _ = pair
    x = ids(72)
    with torch.no_grad():
        want = theirs(x, use_cache=False).logits
        documents = torch.cat([theirs(x[:, :30], use_cache=False).logits, theirs(x[:, 30:], use_cache=False).logits], 1)
    tokens = jnp.asarray(x.numpy())
    logits, states = jax.jit(lambda x: model(x, model.empty_states(2, 128), output_states=True))(tokens[:, :62])
    assert logits.dtype == jnp.float32
    assert error(as_torch(logits), want[:, :62]) <= 1e-5

    def step(states, token):
        logits, states = model(token[:, None], states, output_states=True)
        return states, logits[:, 0]

    _, stepped = jax.jit(lambda states, xs: jax.lax.scan(step, states, xs))(states, tokens[:, 62:].T)
    assert error(as_torch(stepped), want[:, 62:].transpose(0, 1)) <= 1e-5
    numbers = jnp.where(jnp.arange(72) < 30, 7, 3) + jnp.zeros((2, 1), jnp.int32)
    packed, _ = jax.jit(lambda x, n: model(x, segment_ids=n, max_segments=4))(tokens, numbers)
    assert error(as_torch(packed), documents) <= 1e-5


def test_what_was_loaded_is_written_back(pair, tmp_path):
    theirs, model, _ = pair
    model.save_pretrained(tmp_path)
    again = TorchModel.from_pretrained(tmp_path)
    assert again.config.to_dict() | {"_name_or_path": ""} == theirs.config.to_dict() | {"_name_or_path": ""}
    for (name, have), want in zip(again.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(have, want), name


def test_a_checkpoint_that_does_not_fit_is_refused(pair, tmp_path):
    _, _, folder = pair
    with pytest.raises(ValueError, match="mamba_norm_groups must be 1 in JAX: got 2"):
        LogLinearConfig.from_dict(SIZES | {"mamba_norm_groups": 2})
    with pytest.raises(ValueError, match=r"mixer must be one of .*: got 'attention'"):
        LogLinearConfig(mixer="attention")
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    text = (folder / "config.json").read_text().replace('"intermediate_size": 48', '"intermediate_size": 0')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"tensors of the model and no others: model.layers.0.mlp"):
        LogLinearForCausalLM.from_pretrained(tmp_path)


def test_what_decays(pair):
    mask = {
        jax.tree_util.keystr(path): x
        for path, x in jax.tree.leaves_with_path(weight_decay_mask(nnx.state(pair[1], nnx.Param)))
    }
    decaying = {name for name, x in mask.items() if x}
    assert sum("'weight'" in name for name in decaying) == len(decaying) > 20
    assert not any("norm" in name for name in decaying)
