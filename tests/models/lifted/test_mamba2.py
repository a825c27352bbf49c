"""The Mamba-2 mixers of transformers, lifted: the same logits and gradients before training, and a named error for the rest."""

import copy
import sys

import pytest
import torch
from torch import nn

import loglinear
from loglinear.layers import LevelScale
from loglinear.models.lifted.mamba2 import LiftedMamba2

# Each with a field that a field of our mixer has to answer for.
CASES = {
    "mamba2": {},
    "mamba2, one group": {"n_groups": 1},
    "mamba2, one head each": {"n_groups": 8, "use_bias": True},
    "mamba2, time steps": {"time_step_limit": (0.2, 0.6), "use_conv_bias": False},
    "bamba": {},
    "bamba, biases": {"mamba_proj_bias": True},
    "granite": {},
    "nemotron": {"time_step_min": 0.2},
    "zamba2": {"time_step_min": 0.2},
    "falcon": {},
    "falcon, gate and norm": {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
    "falcon, norm and gate": {"mamba_rms_norm": True, "mamba_norm_before_gate": True, "projectors_bias": True},
}
FAMILIES = [name for name in CASES if "," not in name]


@pytest.fixture
def family(make_family):
    return lambda case, **more: make_family(case.split(",")[0], **(CASES[case] | more))


def mixers(model):
    return [module for module in model.modules() if isinstance(module, LiftedMamba2)]


def logits(model, ids, mask=None):
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def close(one, other, tolerance):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.detach().abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_stay_what_they_are(family, ids, case):
    """float32, measured 2e-6. Around the chunk, beyond the levels, and with padding, which gives what an unpadded row gives."""
    model, tokens = family(case), ids(2, 130)
    lengths = (2 if "norm" in case else 1, 63, 64, 65, 130)  # transformers 5.17: Falcon-H1's norm of one token is wrong
    wants = [logits(model, tokens[:, :length]) for length in lengths]
    row = logits(model, tokens[:1, 37:])
    loglinear.lift(model)
    for length, want in zip(lengths, wants):
        close(logits(model, tokens[:, :length]), want, 1e-5)
    mask = torch.ones_like(tokens)
    mask[0, :37] = 0
    padded = logits(model, tokens, mask)
    close(padded[:1, 37:], row, 1e-5)
    close(padded[1:], wants[-1][1:], 1e-5)


class DoubleTorch:
    """The namespace ``torch``, whose float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_outputs_in_float64(family, case, monkeypatch):
    """Every one of these mixers computes its scan and its norm in float32 by name. Here the name means float64."""
    model, hidden = family(case).double(), torch.randn(2, 67, 32, dtype=torch.float64)
    lifted = copy.deepcopy(model)
    paths = loglinear.lift(lifted).lifted
    originals = [model.get_submodule(path) for path in paths]
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for part in (part for original in originals for part in (original, original.norm)):
        if type(part).__module__.startswith("transformers."):
            monkeypatch.setattr(sys.modules[type(part).__module__], "torch", DoubleTorch())
    for path, original in zip(paths, originals):
        close(lifted.get_submodule(path)(hidden), original(hidden), 1e-10)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "field", "value"),
    [
        ("nemotron", "norm.groups", 1),
        ("mamba2", "norm.eps", 1e-2),
        ("mamba2, time steps", "dt_limit", (0.0, torch.inf)),
        ("nemotron", "dt_limit", (0.0, torch.inf)),
        ("zamba2", "dt_limit", (0.0, torch.inf)),
        ("falcon", "in_multiplier", 1.0),
        ("falcon", "mup_vector", torch.ones(160)),
        ("falcon, norm and gate", "norm.gate_first", True),
        ("falcon, norm and gate", "norm.groups", 1),
    ],
)
def test_fields_show_in_the_logits(family, ids, case, field, value):
    """What the tests above would see if a field were left out."""
    model, tokens = family(case), ids(1, 40)
    loglinear.lift(model)
    want = logits(model, tokens)
    owner, name = mixers(model)[0], field
    if "." in field:
        owner, name = owner.norm, field.split(".")[1]
    setattr(owner, name, value)
    assert (logits(model, tokens) - want).abs().max() > 1e-3 * want.abs().max()


@pytest.mark.parametrize("case", FAMILIES)
def test_training(family, ids, case):
    """Gradients of the original's parameters stay what they are, those of λ are not zero, and ten steps change the model."""
    torch.manual_seed(0)
    model, tokens = family(case), ids(2, 70)
    untrained = copy.deepcopy(model)
    model.train()
    wanted = torch.autograd.grad(logits(model, tokens).square().mean(), list(model.parameters()), allow_unused=True)
    parameters = dict(model.named_parameters())
    loglinear.lift(model)
    assert model.training
    assert all(module.training for module in model.modules())
    logits(model, tokens).square().mean().backward()
    after = dict(model.named_parameters())
    for (name, parameter), want in zip(parameters.items(), wanted, strict=True):
        assert after[name] is parameter
        if want is not None:
            close(parameter.grad, want, 1e-4)
    scales = [module for module in model.modules() if isinstance(module, LevelScale)]
    assert all((scale.dl_proj.weight.grad != 0).any() for scale in scales)
    optimizer = torch.optim.SGD([p for scale in scales for p in scale.parameters()], lr=0.1)
    for step in range(10):
        optimizer.zero_grad()
        logits(model, tokens).square().mean().backward()
        assert all((scale.L.grad != 0).any() == (step > 0) for scale in scales)  # λ moves with the projection first
        optimizer.step()
    change = (logits(model.eval(), tokens) - logits(untrained, tokens)).abs().max()
    assert change > 1e-3


@pytest.mark.parametrize("case", FAMILIES)
def test_names_and_tensors_stay(family, case):
    model = family(case)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    objects = {id(parameter) for parameter in model.parameters()}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    report = loglinear.lift(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    added = [name for name in after if name not in before]
    assert {name.split(".level_scale.")[1] for name in added} == {"L", "dl_proj.weight"}
    assert {name.split(".level_scale.")[0] for name in added} == set(report.lifted)
    assert report.added == sum(after[name].numel() for name in added)
    assert objects <= {id(parameter) for parameter in model.parameters()}
    assert linears <= {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert len(report.lifted) == len(mixers(model)) == (1 if case in ("bamba", "granite", "nemotron") else 2)


@torch.no_grad()
def test_time_steps_are_clamped_in_every_call(family, ids, cache_name):
    """transformers clamps them in prefill and training alone: its own single tokens are 3% off here."""
    model, tokens = family("mamba2, time steps"), ids(1, 20)
    want = logits(model, tokens)

    name = cache_name(model)

    def token_by_token():
        cache, out = None, []
        for token in tokens.split(1, dim=1):
            step = model(token, use_cache=True, **({} if cache is None else {name: cache}))
            cache, out = getattr(step, name), [*out, step.logits]
        return torch.cat(out, 1)

    assert (token_by_token() - want).abs().max() > 1e-2 * want.abs().max()
    loglinear.lift(model)
    close(token_by_token(), want, 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_behind_padding(make_family, ids, name):
    """Token for token, over the end of a chunk. The time steps of the originals stay inside their limits here."""
    model, prompt = make_family(name, pad_token_id=0, bos_token_id=1, eos_token_id=2), ids(2, 61)
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    want = model.generate(prompt, **options)
    loglinear.lift(model)
    assert torch.equal(model.generate(prompt, **options), want)


@torch.no_grad()
def test_packed_documents(family, ids):
    """By their numbers, which transformers' plain code leaves to its kernels, or by their offsets."""
    model, tokens = family("mamba2").backbone, ids(1, 90)  # the head hands nothing on
    loglinear.lift(model)
    want = torch.cat([model(part).last_hidden_state for part in (tokens[:, :33], tokens[:, 33:])], dim=1)
    number = (torch.arange(90) >= 33).int().unsqueeze(0)
    offsets = torch.tensor([0, 33, 90], dtype=torch.int32)
    for packing in ({"seq_idx": number}, {"cu_seq_lens_q": offsets, "max_length_q": 57}):
        close(model(tokens, use_cache=False, **packing).last_hidden_state, want, 1e-5)


def test_arguments_that_a_mixer_does_not_know(family, ids):
    model = family("bamba")
    loglinear.lift(model)
    with pytest.raises(TypeError, match="forward does not know these arguments: colour"):
        mixers(model)[0](torch.zeros(1, 3, 32), colour="red")
    assert mixers(model)[0](torch.zeros(1, 3, 32), use_cache=False).shape == (1, 3, 32)


def test_levels_follow_the_config(family):
    """64 positions are 7 levels; Mamba-2's config has no longest context."""
    for case, levels in {"bamba": 7, "mamba2": 15}.items():
        model = family(case)
        assert loglinear.lift(model).num_levels == levels
        assert all(mixer.level_scale.L.shape == (8, levels) for mixer in mixers(model))
    model = family("mamba2")
    assert loglinear.lift(model, num_levels=4).num_levels == mixers(model)[0].level_scale.L.shape[1] == 4


def test_a_copy_and_the_hooks_of_the_original(family, ids):
    model, tokens, seen = family("mamba2"), ids(1, 9), []
    handle = model.backbone.layers[1].mixer.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    loglinear.lift(model)
    model.backbone.layers[0].mixer.requires_grad_(False)
    want = logits(model, tokens)
    assert seen == [LiftedMamba2]
    handle.remove()
    twin = copy.deepcopy(model).to(torch.bfloat16)
    assert (
        twin.backbone.layers[0].mixer.conv1d.weight.data_ptr()
        != model.backbone.layers[0].mixer.conv1d.weight.data_ptr()
    )
    close(logits(twin, tokens).float(), want, 0.1)
    assert len(seen) == 1


def test_a_mixer_at_two_places(family, ids):
    model, tokens = family("mamba2"), ids(1, 9)
    layers = model.backbone.layers
    layers[1].mixer = layers[0].mixer
    want = logits(model, tokens)
    report = loglinear.lift(model)
    assert len(report.lifted) == 2
    assert layers[0].mixer is layers[1].mixer
    assert report.added == sum(x.numel() for x in layers[0].mixer.level_scale.parameters())
    close(logits(model, tokens), want, 1e-5)


@torch.no_grad()
def test_padding_in_one_graph(family, ids):
    model, tokens = family("mamba2", num_hidden_layers=1), ids(2, 30)
    loglinear.lift(model)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    want = logits(model, tokens, mask)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(logits(compiled, tokens, mask)[:, 9:], want[:, 9:], 1e-5)


# transformers 5.23 prefers activation_checkpointing_enable, which 5.17 does not have.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointing(family, ids):
    model, tokens = family("mamba2").train(), ids(2, 70)
    loglinear.lift(model)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    gradients = []
    for enable in (lambda: None, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        logits(model, tokens, mask).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for want, got in zip(*gradients, strict=True):
        close(got, want, 1e-4)


class OtherNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))


class Mamba2Mixer(nn.Module):
    """Code of somebody else, with a known name."""


class SomeMambaMixer(nn.Module):
    pass


def spoil_activation(mixer):
    mixer.activation = "gelu"


def spoil_norm(mixer):
    mixer.norm = OtherNorm()


def spoil_convolution(mixer):
    mixer.conv1d = nn.Conv1d(96, 96, 4, groups=96, dilation=2)


def spoil_parameter(mixer):
    mixer.extra = nn.Parameter(torch.ones(1))


def spoil_forward(mixer):
    mixer.forward = mixer.forward


def spoil_limit(mixer):
    mixer.time_step_limit = (0.5, 0.1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_activation, "activation of the convolution must be 'silu': got 'gelu'"),
        (spoil_norm, "norm must be a gated RMSNorm with a weight, or Identity: got OtherNorm"),
        (spoil_convolution, "conv1d must be depthwise, of stride and dilation 1: got Conv1d"),
        (spoil_parameter, r"parameters and submodules must be among \[.*\]: got extra too"),
        (spoil_forward, "forward must be that of its class"),
        (spoil_limit, r"dt_limit must be .*: got \(0.5, 0.1\)"),
    ],
)
def test_an_unsupported_property_is_named(family, ids, spoil, message):
    """The last layer's, so that a lift that changed layer after layer would have begun."""
    model = family("mamba2")
    spoil(model.backbone.layers[1].mixer)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"^backbone.layers.1.mixer \(Mamba2Mixer\) cannot be lifted: {message}"):
        loglinear.lift(model)
    assert [type(module) for module in model.modules()] == before
    assert not hasattr(model.config, "loglinear_levels")


def test_an_unknown_mixer_is_named(family):
    for stranger, message in {
        Mamba2Mixer: "its class must be that of transformers",
        SomeMambaMixer: "linear mixer must be one of .*: got SomeMambaMixer",
    }.items():
        model = family("mamba2")
        model.backbone.layers[1].mixer = stranger()
        with pytest.raises(
            ValueError, match=rf"^backbone.layers.1.mixer \({stranger.__name__}\) cannot be lifted: {message}"
        ):
            loglinear.lift(model)
        assert not mixers(model)


def test_a_second_lift(family):
    model = family("mamba2")
    loglinear.lift(model)
    with pytest.raises(ValueError, match=r"got Mamba2ForCausalLM with backbone.layers.0.mixer: log-linear already"):
        loglinear.lift(model)
    with pytest.raises(ValueError, match="model must hold mixers: got a mixer itself"):
        loglinear.lift(family("mamba2").backbone.layers[0].mixer)
