"""The parts of a training step's time: each kernel of a profiled step is counted to one part.

The same rules hold for compiled and eager steps, forward and backward, and for all models. A kernel belongs to the operator
that launched it, if this operator is an op of sequence mixing, a convolution, a norm, the loss, a matrix product or a part of
the optimiser; in the operator of a whole mixer its name decides. The sizes of a product say which weight it belongs to. A
kernel that the compiler has fused has no operator of its own, and its place decides:

* loss: between the first and the last product with the vocabulary, which stand in the middle of a step;
* norms: its name says so, whatever else is fused into it (the residual sum, a gate, a cast);
* mlp: the nearest products before and after it are both of the MLP (the activation);
* other: the rest, that is gates, λ, skips, casts of weights, sums, the embedding.
"""

from __future__ import annotations

import json
import re
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loglinear.layers.linear import joined
from training_models import OPTIMISER, matrices

PARTS = ("op", "projections", "convolution", "norms", "mlp", "loss", "optimiser", "other")
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
OPERATORS = {
    "op": re.compile(r"(loglinear::attention|benchmarks::(ssd|gated_delta)|Kernels|aten::_scaled_dot_product)"),
    "convolution": re.compile(r"(loglinear::convolution|Convolution(Backward)?$)"),
    "norms": re.compile(r"(loglinear::)?(gated_norm|unit_length)"),
    "mixing": re.compile(r"(loglinear::)?mamba2"),  # whose kernels say by name what they belong to
    "loss": re.compile(r"loglinear::linear_cross_entropy"),
}
MIXING = {  # kernels of the operator of a whole mixer; the others are the op's
    "convolution": re.compile(r"^convolution_"),
    "norms": re.compile(r"^gated_norm_"),
    "other": re.compile(r"^(steps|level_scales)_|at::native"),
}
PRODUCT = re.compile(r"aten::(add|badd)?b?mm_?$")
NORMS = re.compile(r"rms_norm|layer_norm|rsqrt|gamma_?beta", re.IGNORECASE)


@dataclass
class Kernel:
    """One kernel: when it ran (µs), its name, the part that its operator gives it, and the sizes if it is a matrix product."""

    start: float
    duration: float
    name: str
    part: str = ""
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Weights:
    """Input and output width of every matrix, by part."""

    pairs: dict[str, set[tuple[int, int]]]

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        pairs: dict[str, set[tuple[int, int]]] = {"loss": set(), "mlp": set(), "projections": set()}
        layers = matrices(model)
        for name, module in layers.items():
            part = "loss" if name == "lm_head" else "mlp" if ".mlp." in name else "projections"
            pairs[part].add((module.in_features, module.out_features))
            if name.endswith("level_scale.dl_proj"):  # in training one product with the input projection
                beside = layers[name.replace("level_scale.dl_proj", "in_proj")].out_features
                pairs[part].add((module.in_features, joined(beside, module.out_features)[1]))
        return cls(pairs)

    def part(self, sizes: tuple[int, ...]) -> str:
        """The part whose weight a product of ``sizes`` (m, k, n) is of. One of the three is the number of tokens."""
        for multiple in (1, 8, 64):  # as they are, or padded by the compiler or by our layers
            for part, pairs in self.pairs.items():
                if any(_contains(sizes, pair, multiple) for pair in pairs):
                    return part
        return "other"


def _contains(sizes: tuple[int, ...], pair: tuple[int, int], multiple: int) -> bool:
    """Whether both widths are among the sizes, as they are or padded to a multiple."""
    rest = list(sizes)
    for width in pair:
        found = next((size for size in rest if size in (width, _rounded(width, multiple))), None)
        if found is None:
            return False
        rest.remove(found)
    return True


def _rounded(width: int, multiple: int) -> int:
    """Up to a multiple."""
    return -(-width // multiple) * multiple


def profile(step: Callable[[], object]) -> dict:
    """The trace of one step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))


def milliseconds_by_part(trace: dict, weights: Weights) -> dict[str, float]:
    """Milliseconds of kernels by part, which add up to the time in which any ran; under "products" those of matrix products
    once more. Where kernels of two streams overlap, the time is that of the first.
    """
    kernels = sorted(launched(trace["traceEvents"]), key=lambda kernel: kernel.start)
    for kernel in kernels:
        if kernel.sizes and not kernel.part:
            kernel.part = weights.part(kernel.sizes)
    _place(kernels)
    times = dict.fromkeys((*PARTS, "products"), 0.0)
    busy_until = 0.0
    for kernel in kernels:
        end = kernel.start + kernel.duration
        own = max(end - max(kernel.start, busy_until), 0.0) / 1e3
        busy_until = max(busy_until, end)
        times[kernel.part] += own
        times["products"] += own if kernel.sizes and kernel.part != "op" else 0.0
    return times


def launched(events: list[dict]) -> list[Kernel]:
    """The kernels of a trace, each with the operator in whose time it was launched."""
    events = [event for event in events if event.get("ph") == "X"]
    operators, products = defaultdict(list), defaultdict(list)  # by thread
    launches: dict[int, tuple[float, int]] = {}
    for event in events:
        category, name = event.get("cat"), event["name"]
        if category in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]:
            launches[event["args"]["correlation"]] = event["ts"], event["tid"]
        kind = OPTIMISER if (category, name) == ("user_annotation", OPTIMISER) else ""
        if category == "cpu_op":
            kind = next((kind for kind, pattern in OPERATORS.items() if pattern.match(name)), "")
            if PRODUCT.match(name):
                products[event["tid"]].append((event["ts"], event["ts"] + event["dur"], _product_sizes(event)))
        if kind:
            operators[event["tid"]].append((event["ts"], event["ts"] + event["dur"], kind))
    operators, products = ({thread: _outermost(x) for thread, x in found.items()} for found in (operators, products))
    kernels = []
    for event in events:
        if event.get("cat") in KERNELS:
            kernel = Kernel(event["ts"], event["dur"], event["name"])
            time, thread = launches.get(event["args"].get("correlation"), (0.0, -1))
            kernel.part = _during(operators.get(thread, []), time) or ""
            if kernel.part == "mixing":
                kernel.part = next((part for part, names in MIXING.items() if names.search(kernel.name)), "op")
            kernel.sizes = _during(products.get(thread, []), time) or ()
            kernels.append(kernel)
    return kernels


def _during(ranges: list[tuple], time: float) -> Any:
    """The third part of the range (start, end, what) that holds ``time``, from a list in order; None without such a range."""
    i = bisect_right(ranges, time, key=lambda item: item[0]) - 1
    return ranges[i][2] if i >= 0 and time <= ranges[i][1] else None


def _outermost(ranges: list[tuple]) -> list[tuple]:
    """The ranges that lie inside no other range, in order."""
    kept: list[tuple] = []
    for item in sorted(ranges, key=lambda item: (item[0], -item[1])):
        if not kept or item[0] >= kept[-1][1]:
            kept.append(item)
    return kept


def _product_sizes(event: dict) -> tuple[int, ...]:
    """(m, k, n) of a matrix product, from the last two dimensions of its operands."""
    first = 1 if "add" in event["name"] else 0  # addmm and baddbmm begin with what they add to
    left, right = event["args"]["Input Dims"][first : first + 2]
    return left[-2], left[-1], right[-1]


def _place(kernels: list[Kernel]) -> None:
    """Give a part to the kernels, in the order they ran, that their operator has not given one."""
    loss = [i for i, kernel in enumerate(kernels) if kernel.sizes and kernel.part == "loss"]
    products = [(i, kernel.part) for i, kernel in enumerate(kernels) if kernel.sizes]
    for i, kernel in enumerate(kernels):
        if kernel.part:
            continue
        after = bisect_right(products, i, key=lambda item: item[0])
        around = {part for _, part in products[max(after - 1, 0) : after + 1]}
        if loss and loss[0] < i < loss[-1]:
            kernel.part = "loss"
        elif NORMS.search(kernel.name):
            kernel.part = "norms"
        else:
            kernel.part = "mlp" if around == {"mlp"} else "other"
