"""The Flax decoder against the PyTorch one: checkpoints both ways, logits, decoding and packed documents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from loglinear.jax.attention import SoftmaxAttention
from loglinear.jax.generation import Choice
from loglinear.jax.layers import Past
from loglinear.jax.models import LogLinearConfig, LogLinearForCausalLM, weight_decay_mask
from loglinear.models import LogLinearConfig as TorchConfig
from loglinear.models import LogLinearForCausalLM as TorchModel
from oracle import error

pytestmark = pytest.mark.default_packages
# Every mixer that has code of its own, one of them linear; log_linear_retnet is in the model that generates.
RECURRENT = ["log_linear_mamba2", "log_linear_gated_deltanet", "log_linear_kda", "log_linear_gla", "lightning"]
NAMES = [*RECURRENT, "attention"]
SIZES = {
    **{"mixer": NAMES, "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": len(NAMES), "intermediate_size": 48},
    **{
        "max_position_embeddings": 128,
        "mamba_head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_state_size": 8,
        "mamba_num_groups": 2,
    },
    **{"kda_num_heads": 4, "kda_num_key_heads": 2, "kda_key_dim": 8, "kda_value_dim": 4, "kda_decay_rank": 5},
    **{"gla_num_heads": 4, "gla_num_kv_heads": 2, "gla_key_dim": 4, "gla_value_dim": 8, "gla_decay_rank": 3},
    **{"gla_conv_size": 3, "retnet_num_heads": 4, "retnet_key_dim": 8, "retnet_value_dim": 4, "lightning_num_heads": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
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


def test_logits_and_decoding(pair):
    """A prompt whose second row has padding on the left, then a token at a time."""
    theirs, model, _ = pair
    x, mask = ids(72), torch.ones(2, 72, dtype=torch.long)
    mask[1, :3] = 0
    with torch.no_grad():
        want = theirs(x, attention_mask=mask, use_cache=False).logits
    tokens = jnp.asarray(x.numpy())
    prompt = jax.jit(lambda x, m: model(x, model.empty_states(2, 128), output_states=True, attention_mask=m))
    logits, states = prompt(tokens[:, :66], jnp.asarray(mask[:, :66].numpy()))
    assert logits.dtype == jnp.float32
    assert error(as_torch(logits), want[:, :66]) <= 1e-5
    assert not logits[1, :3].any()
    assert [state.memory.position.tolist() for state in states] == [[66, 63]] * len(NAMES)

    def step(states, token):
        logits, states = model(token[:, None], states, output_states=True)
        return states, logits[:, 0]

    _, stepped = jax.jit(lambda states, xs: jax.lax.scan(step, states, xs))(states, tokens[:, 66:].T)
    assert error(as_torch(stepped), want[:, 66:].transpose(0, 1)) <= 1e-5


def test_generate_and_packed_documents_are_those_of_the_pytorch_model(tmp_path):
    """Greedy, with padding on the left, and rows that end."""
    torch.manual_seed(0)
    sizes = {"mixer": ["log_linear_retnet", "attention"], "num_hidden_layers": 2, "eos_token_id": 7, "pad_token_id": 0}
    sizes["retnet_conv_size"] = 3
    theirs = TorchModel(TorchConfig(**SIZES | sizes)).eval()
    theirs.save_pretrained(tmp_path)
    model, x, mask = LogLinearForCausalLM.from_pretrained(tmp_path), ids(6, 3), torch.ones(3, 6, dtype=torch.long)
    mask[1, :4] = 0
    want = theirs.generate(x, attention_mask=mask, max_new_tokens=12, do_sample=False)
    ends = {"eos_token_id": want[0, 8].item()}  # the first row ends at its third token
    want = theirs.generate(x, attention_mask=mask, max_new_tokens=12, do_sample=False, **ends)
    have = model.generate(jnp.asarray(x.numpy()), 12, attention_mask=jnp.asarray(mask.numpy()), **ends)
    assert have.tolist() == want.tolist()
    assert have[0, 9:].tolist() == [0] * (have.shape[1] - 9)
    x = ids(72)
    with torch.no_grad():
        documents = torch.cat([theirs(x[:, :30], use_cache=False).logits, theirs(x[:, 30:], use_cache=False).logits], 1)
    numbers = jnp.where(jnp.arange(72) < 30, 7, 3) + jnp.zeros((2, 1), jnp.int32)
    packed, _ = jax.jit(lambda x, n: model(x, segment_ids=n, max_segments=4))(jnp.asarray(x.numpy()), numbers)
    assert error(as_torch(packed), documents) <= 1e-5


def test_sampled_tokens():
    """Frequencies of 20,000 draws are the softmax of what top_k and top_p leave."""
    logits = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
    for changes, want in (
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"do_sample": False}, [1, 0, 0, 0]),
    ):
        choice = Choice(True, 1.0, None, None, (), 0)._replace(**changes)
        drawn = choice.of(jnp.broadcast_to(logits, (20_000, 4)), jax.random.key(0))
        assert np.abs(np.bincount(drawn, minlength=4) / 20_000 - want).max() < 0.012, changes


def test_room_for_keys_and_values():
    """Tokens past it are an error, or NaN inside of ``jit``; with more room they go on."""
    layer, x = SoftmaxAttention(8, 2, 4, rngs=nnx.Rngs(0), std=1.0), jax.random.normal(jax.random.key(0), (2, 5, 8))
    call = jax.jit(lambda x, state: layer(x, Past(state, output=True)))
    (whole, _), (_, state) = call(x, None), call(x[:, :3], None)
    with pytest.raises(ValueError, match=r"state must have room for 5 tokens \(with_room makes it\): got 3"):
        layer(x[:, 3:], Past(state))
    assert jnp.isnan(call(x[:, 3:], state)[0]).all()
    room = dataclasses.replace(state, memory=state.memory.with_room(5))
    assert jnp.abs(call(x[:, 3:], room)[0] - whole[:, 3:]).max() < 1e-5


def test_bad_prompts_are_refused(pair):
    _, model, _ = pair
    x = jnp.zeros((2, 4), jnp.int32)
    for arguments, message in (
        ({"do_sample": True}, "key must be given where do_sample is true: got None"),
        ({"attention_mask": jnp.asarray([[1] * 4, [0] * 4])}, "attention_mask must have a token in every row"),
        ({"temperature": 0.0}, "temperature must be positive: got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1: got 1.5"),
        ({"top_k": 0}, "top_k must be at least 1: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(x, 2, **arguments)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[B, T\] = \[2, 4\], .*: got \[2, 3\]"):
        model(x, attention_mask=jnp.ones((2, 3)))


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
    with pytest.raises(ValueError, match=r"mixer must be one of .*: got 'softmax'"):
        LogLinearConfig(mixer="softmax")
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
