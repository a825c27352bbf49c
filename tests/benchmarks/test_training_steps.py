"""benchmarks/training.py at a tiny size: rows, the check, peers, model FLOPs, and which part a kernel of a trace belongs to."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import loglinear.layers.mixer
from loglinear import fenwick, log_linear_attention, log_linear_delta_rule

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES = ["--hidden-size", "64", "--layers", "2", "--attention-layers", "3", "--vocab-size", "50"]
FLASH, CUDNN = "transformer, flash attention 2", "transformer, cudnn"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def command(tmp_path, monkeypatch):
    """``command(*options)`` runs the benchmark in this process, with its rows in ``tmp_path``, and returns the new ones."""
    import training

    path = tmp_path / "training.jsonl"

    def run(*options):
        before = len(path.read_text().splitlines()) if path.exists() else 0
        fixed = ["training.py", *SIZES, "--device", "cpu", "--eager", "--tokens", "256", "--results", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*fixed, *options])
        training.main()
        return [json.loads(line) for line in path.read_text().splitlines()[before:]] if path.exists() else []

    return run


def model_of(mixer, **options):
    from training_models import Column, Size, build

    return build(Size(64, 2, 2, 50, 256).config(mixer, **options), Column(mixer), "cpu")


def test_rows(command, capsys):
    rows = command("--models", "log_linear_mamba2", FLASH, CUDNN, "--lengths", "128", "512", "--steps", "3")
    assert [(row["model"], row["B"], row["T"]) for row in rows] == [
        ("log_linear_mamba2", 2, 128), ("log_linear_mamba2", 1, 512), (FLASH, 2, 128), (FLASH, 1, 512),
    ]  # fmt: skip
    assert [row["layers"] for row in rows] == [2, 2, 3, 3]
    for row in rows:
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["B"] * row["T"] / row["ms"])
        assert 0 < row["error_against_float64"] < 0.25
        assert row["first_loss"] < 6
        assert not row["checkpointing"]
    assert f"{CUDNN:30s}  nothing timed" in capsys.readouterr().out


def test_checkpoints_may_be_kept_in_the_hosts_memory_and_change_no_loss(command, monkeypatch):
    import training

    moved = []
    to_host = torch.autograd.graph.save_on_cpu

    def spy(**options):
        moved.append(options)
        return to_host(**options)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", spy)
    monkeypatch.setattr(training, "check", lambda *_: 0.0)
    losses = []
    for options in ([], ["--longest", "--offload"]):
        torch.manual_seed(0)
        (row,) = command("--models", "mamba2", "--lengths", "128", "--steps", "1", *options)
        assert (row["longest"], row["checkpointing"], row["offload"]) == (bool(options),) * 3
        losses.append(row["first_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert moved


def test_out_of_memory_is_tried_again_with_checkpoints_and_ends_no_run(command, monkeypatch, capsys):
    import training

    measure = training.measure

    def full(trainer, length, checkpointing, args):
        if length == 256 or not checkpointing:
            raise torch.OutOfMemoryError("no more")
        return measure(trainer, length, checkpointing, args)

    monkeypatch.setattr(training, "measure", full)
    monkeypatch.setattr(training, "check", lambda *_: 0.0)
    rows = command("--models", "mamba2", "--lengths", "256", "128", "--steps", "2")
    assert [(row["T"], row["checkpointing"]) for row in rows] == [(128, True)]
    assert "not timed: OutOfMemoryError: no more" in capsys.readouterr().out


def test_nothing_is_timed_when_a_gradient_is_wrong(command, monkeypatch, capsys):
    mix = loglinear.layers.mixer.mix

    def forgetful(inputs, *rest):
        decay = 1.0 if inputs["v"].dtype == torch.float64 else 1.5
        return mix({**inputs, "g": decay * inputs["g"]}, *rest)

    monkeypatch.setattr(loglinear.layers.mixer, "mix", forgetful)
    assert command("--models", "mamba2", "--lengths", "128", "--steps", "2") == []
    assert "nothing timed: ArithmeticError: the gradient of" in capsys.readouterr().out


def scalar_stand_in():
    """Mamba-2's scan with the signature of its kernels, by our op."""

    def scan(x, dt, A, B, C, D, dt_bias):
        step = F.softplus(dt + dt_bias)
        return log_linear_attention(C, B, x * step[..., None], A * step, level_scales=None)[0] + x * D[:, None]

    def forward(x, dt, A, B, C, chunk_size, D, dt_bias, dt_softplus):
        assert dt_softplus
        return scan(x, dt, A, B, C, D, dt_bias), None, None

    def backward(dout, x, dt, A, B, C, out, chunk_size, D, dt_bias, dt_softplus):
        assert dt_softplus
        torch.testing.assert_close(out, scan(x, dt, A, B, C, D, dt_bias))
        dx, ddt, dA, dB, dC, dD, dbias = torch.func.vjp(scan, x, dt, A, B, C, D, dt_bias)[1](dout)
        return dx, ddt, dA, dB, dC, dD, None, dbias, None

    return SimpleNamespace(_mamba_chunk_scan_combined_fwd=forward, _mamba_chunk_scan_combined_bwd=backward)


def delta_stand_in():
    """The gated delta rule with the signatures of flash-linear-attention 0.2.2, by our op."""

    def norm(x):
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    def rule(q, k, v, g, beta):
        return log_linear_delta_rule(q, k, v, g, beta, level_scales=None)[0]

    def forward(q, k, v, g, beta, scale, initial_state, output_final_state):
        assert (scale, initial_state, output_final_state) == (1.0, None, False)
        inverse = q.new_ones(*g.shape, 64)
        return g.cumsum(1), rule(q, k, v, g, beta), inverse, 2 * inverse, None

    def backward(q, k, v, sums, beta, Aw, Au, scale, initial_state, do, dht):
        assert (scale, initial_state, dht) == (1.0, None, None)
        torch.testing.assert_close(2 * Aw, Au)
        g = torch.diff(sums, dim=1, prepend=torch.zeros_like(sums[:, :1]))
        dq, dk, dv, dg, dbeta = torch.func.vjp(rule, q, k, v, g, beta)[1](do)
        return dq, dk, dv, dbeta, dg, None

    return SimpleNamespace(
        chunk_gated_delta_rule_fwd=forward,
        chunk_gated_delta_rule_bwd=backward,
        l2norm_fwd=norm,
        l2norm_bwd=lambda x, dy: torch.func.vjp(norm, x)[1](dy)[0],
    )


@pytest.mark.parametrize(
    ("mixer", "peer", "module", "stand_in"),
    [
        ("mamba2", "SSDMamba2", "_ssd_module", scalar_stand_in),
        ("gated_deltanet", "FlaGatedDeltaNet", "_fla_module", delta_stand_in),
    ],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at what it traces
def test_a_peer_differs_in_the_op_alone(mixer, peer, module, stand_in, monkeypatch):
    """On a stand-in for its kernels that is our own op a peer has the gradients of our linear model, compiled too."""
    import training_peers

    monkeypatch.setattr(training_peers, module, stand_in)
    ours, theirs = model_of(mixer), model_of(mixer)
    for block in theirs.model.layers:
        block.mixer.__class__ = getattr(training_peers, peer)
    ids = torch.randint(50, (2, 70))
    want = torch.autograd.grad(ours(input_ids=ids, labels=ids).loss, list(ours.parameters()))
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()
            theirs.model.layers[0].compile(fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(theirs(input_ids=ids, labels=ids).loss, list(theirs.parameters()))
        for x, y in zip(got, want, strict=True):
            assert (x - y).norm() <= 1e-4 * y.norm()


@pytest.mark.parametrize("mixer", ["log_linear_mamba2", "gated_deltanet", "attention"])
def test_flops_of_weights_are_those_that_torch_counts(mixer):
    from training_models import matrices, mixing_flops, model_flops

    model, ids = model_of(mixer), torch.randint(50, (2, 48))
    with FlopCounterMode(display=False) as counter:
        model.model(ids).last_hidden_state.sum().backward()
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if op in (torch.ops.aten.mm,))
    weights = sum(module.weight.numel() for name, module in matrices(model).items() if name != "lm_head")
    assert counted == 6 * weights * ids.numel()
    mixing = sum(mixing_flops(block.mixer, 48) for block in model.model.layers)
    assert model_flops(model, 2, 48) == counted + 6 * 64 * 50 * ids.numel() + 3 * 2 * mixing


def test_heads_of_the_delta_rule_fill_their_tiles():
    from training_models import Size

    config = Size().config("log_linear_gated_deltanet")
    heads = config.delta_num_heads, config.delta_num_key_heads, config.delta_key_dim, config.delta_value_dim
    assert heads == (9, 9, 128, 256)


def test_flops_of_mixing_counted_by_hand():
    from training_models import entries_read, mixing_flops

    T = 200
    chunks = [t // 64 for t in range(T)]
    assert entries_read(T) == sum(len(list(fenwick.query_path(n))) for n in chunks)
    pairs = sum(t + 1 for t in range(T))
    assert mixing_flops(model_of("attention").model.layers[0].mixer, T) == 4 * 64 * pairs
    # Two heads of 64, a group of keys of 128: scores once, values for both heads, a state of each written and read.
    T = 128
    pairs = 2 * sum(t + 1 for t in range(64))
    mixer = model_of("mamba2").model.layers[0].mixer
    assert mixing_flops(mixer, T) == 2 * pairs * (128 + 2 * 64) + 2 * 2 * 128 * 64 * (T + T)
    mixer = model_of("log_linear_mamba2").model.layers[0].mixer
    assert mixing_flops(mixer, T) == 2 * pairs * (128 + 2 * 64) + 2 * 2 * 128 * 64 * (T + 64)
    # One head of keys 48 and values 96; the second chunk reads one entry, and one merge joins the two.
    linear, log_linear = (
        model_of(name).model.layers[0].mixer for name in ("gated_deltanet", "log_linear_gated_deltanet")
    )
    inside = 2 * pairs * (48 + 48 + 96 + 48 + 96)
    assert mixing_flops(linear, T) == inside + 2 * 48 * 96 * 3 * T
    assert mixing_flops(log_linear, T) == inside + 2 * 48 * (48 + 96) * (T + 48 + 64)


class Trace:
    """A trace in the profiler's format: operators on the host's clock, each with the kernels that it launches."""

    def __init__(self):
        self.events, self.clock, self.gpu = [], 0, 100_000

    def launch(self, *kernels, op=None, thread=1, category="cpu_op", dims=()):
        begin = self.clock
        for name, duration in kernels:
            self.clock += 2
            correlation = len(self.events) + 1
            runtime = {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": self.clock, "dur": 1, "tid": thread}
            ran = {"cat": "kernel", "name": name, "ts": self.gpu, "dur": 1e3 * duration, "tid": 7}
            self.events += [{"ph": "X", "args": {"correlation": correlation}, **event} for event in (runtime, ran)]
            self.gpu += 1e3 * duration
        self.clock += 2
        if op is not None:
            about = {"cat": category, "name": op, "ts": begin, "dur": self.clock - begin, "tid": thread}
            self.events.append({"ph": "X", "args": {"Input Dims": [list(shape) for shape in dims]}, **about})
        self.clock += 1

    def product(self, m, k, n, duration, **options):
        self.launch(("nvjet", duration), op="aten::mm", dims=[(m, k), (k, n), (m, n)], **options)


def test_every_kernel_belongs_to_one_part():
    from training_parts import Weights, milliseconds_by_part

    model, trace = model_of("gated_deltanet"), Trace()  # in_proj 64 to 290, out_proj 96 to 64, MLP 192
    trace.launch(("triton_poi_fused_embedding", 1))
    trace.launch(("triton_red_fused__to_copy_rms_norm", 2))
    trace.product(256, 64, 296, 4)  # padded by the compiler
    trace.launch(("convolution_kernel", 8), op="loglinear::convolution")
    trace.launch(("output_kernel", 16), ("memset", 32), op="loglinear::attention")
    trace.product(256, 96, 64, 64)
    trace.launch(("triton_poi_fused_add", 128))  # between a projection and the MLP
    trace.product(256, 64, 192, 256)
    trace.launch(("triton_poi_fused_mul_silu", 512))
    trace.product(256, 192, 64, 1024)
    trace.launch(("triton_red_fused__to_copy_rms_norm_add", 2048))
    trace.product(256, 64, 50, 4096)
    trace.launch(("softmax", 8192))
    trace.product(50, 256, 64, 16384, thread=2)  # the backward runs on a thread of its own
    trace.launch(("scale", 524288), op="loglinear::linear_cross_entropy_backward", thread=2)
    trace.launch(("delta_grads", 32768), op="KernelsBackward", thread=2)
    trace.launch(("convolution_grads_kernel", 65536), op="ConvolutionBackward", thread=2)
    trace.product(96, 256, 64, 131072, thread=2)
    trace.launch(("gated_norm_grads_kernel", 1048576), ("sum", 2097152), op="loglinear::gated_norm_backward", thread=2)
    trace.launch(("unit_grads_kernel", 4194304), op="unit_lengthBackward", thread=2)
    trace.launch(("multi_tensor_apply", 262144), op="optimiser", category="user_annotation")
    got = milliseconds_by_part({"traceEvents": trace.events}, Weights.of(model))
    want = {
        "projections": 4 + 64 + 131072,
        "convolution": 8 + 65536,
        "op": 16 + 32 + 32768,
        "norms": 2 + 2048 + 1048576 + 2097152 + 4194304,
        "mlp": 256 + 512 + 1024,
        "loss": 4096 + 8192 + 16384 + 524288,
        "optimiser": 262144,
        "other": 1 + 128,
    }
    assert got == pytest.approx(want | {"products": 4 + 64 + 131072 + 256 + 1024 + 4096 + 16384})


def test_two_projections_in_one_product_are_projections():
    from training_parts import Weights

    model = model_of("log_linear_gated_deltanet")
    levels = model.model.layers[0].mixer.level_scale.dl_proj.out_features
    columns = -(-(304 + levels) // 64) * 64  # in_proj: 290, up to a multiple of 16
    assert Weights.of(model).part((256, columns, 64)) == "projections"
    assert Weights.of(model).part((256, columns + 64, 64)) == "other"


def test_time_is_counted_once_where_streams_overlap():
    from training_parts import Weights, milliseconds_by_part

    trace = Trace()
    trace.launch(("first", 8), op="loglinear::attention")
    trace.gpu -= 5_000
    trace.launch(("beside", 4), ("inside", 1), op="loglinear::attention")
    trace.gpu -= 3_000
    trace.launch(("convolution_kernel", 5), op="loglinear::convolution")  # 3 of its 5 ms beside them
    got = milliseconds_by_part({"traceEvents": trace.events}, Weights.of(model_of("gated_deltanet")))
    assert (got["op"], got["convolution"], sum(got.values())) == pytest.approx((8, 2, 10))


def test_a_profiled_step_names_the_operators_that_parts_go_by():
    """A trace of this torch: operators on the host are each given a kernel of 1 ms, since there is no GPU."""
    from training_models import Column
    from training_parts import Weights, milliseconds_by_part, profile

    model, ids = model_of("attention"), torch.randint(50, (1, 128))
    import training

    trainer = training.Trainer(model, Column("attention"), SimpleNamespace(offload=False))
    trace = profile(lambda: trainer.step(ids))
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    leaves = re.compile(r"aten::(mm|addcdiv_|_scaled_dot_product_flash_attention_for_cpu(_backward)?)$")
    made = []
    found = sorted((event for event in events if leaves.match(event["name"])), key=lambda event: event["ts"])
    for i, event in enumerate(found):
        args = {"correlation": i}
        made.append(
            {"ph": "X", "cat": "cuda_runtime", "name": "", "ts": event["ts"], "tid": event["tid"], "args": args}
        )
        made.append({"ph": "X", "cat": "kernel", "name": "", "ts": 1e3 * i, "dur": 1e3, "args": args})
    times = milliseconds_by_part({"traceEvents": events + made}, Weights.of(model))
    # Products of two layers: four projections, three of the MLP; forward, and two in the backward. The loss may take pieces.
    assert times["products"] == times["projections"] + times["mlp"] + times["loss"]
    assert (times["op"], times["projections"], times["mlp"]) == (2 * 2, 3 * 8, 3 * 6)
    assert times["loss"] >= 3
    assert times["optimiser"] == len(list(model.parameters()))
    assert times["other"] == times["norms"] == 0
