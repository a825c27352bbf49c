"""DECODING in a CUDA graph: one replay per token instead of the thousands of launches that the layers of a model need.

No step runs only to warm up. The first token runs eagerly on a side stream, which compiles kernels and fills torch's
workspaces. The second token is recorded and replayed, and every further token is replayed. The graph reads and writes
buffers that never move: the static cache, the ids, the logits. Off CUDA, and for widths that the step kernels do not take,
the model is called eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from loglinear.layers import MixerState, RecurrentMixerState
from loglinear.models.cache import MixerCacheLayer, check_past, mixer_layers
from loglinear.models.outputs import FIELD, CausalOutput, one_cache
from loglinear.ops import DecodingState
from loglinear.ops.dispatch import step as has_kernel


def on_side_stream(work: Callable[[], Tensor], device: torch.device) -> Tensor:
    """``work()`` on another stream; the current stream waits for it. A capture needs such a run before it."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = work()
        torch.cuda.current_stream().wait_stream(side)
    return result


def record(work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """A function that replays ``work`` (recording runs its Python code but nothing on the device), and its fixed result."""
    graph, own = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # torch's default one is on the first graph's device
    # thread_local: other threads (a server's, a data loader's) may go on allocating meanwhile.
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):
        result = work()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, result


class DecodingGraph:
    """The one-token forward pass of a causal language model over one static cache.

    Args:
        model: ``LogLinearForCausalLM`` in evaluation mode, on one device. Its parameters must stay where they are.
        cache: ``StaticCache(config=model.config, max_cache_len=...)`` that has read a prompt.

        >>> cache = StaticCache(config=model.config, max_cache_len=1_000_000)
        >>> logits = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        >>> step = DecodingGraph(model, cache)
        >>> for _ in range(100):
        ...     logits = step(logits.argmax(-1, keepdim=True))

    Raises:
        ValueError: the cache is not static, or records its past.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache) -> None:
        if not cache.is_compileable:
            raise ValueError(
                f"cache must be a StaticCache, whose buffers stay where they are, and must not record its past: got {cache!r}"
            )
        self.model, self.cache = model, cache
        self.ids: Tensor | None = None  # [B, 1], where the graph reads
        self.logits: Tensor | None = None  # [B, vocab_size], where it writes
        self.replay: Callable[[], None] | None = None
        self.states: list[MixerState | None] = []  # whose buffers the recording knows

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits ``[B, vocab_size]`` after one more token of every row, ids ``[B, 1]``. The next call may overwrite them.

        Raises:
            ValueError: ids of another shape, an empty cache, or one that is full.
        """
        layers = mixer_layers(self.cache)
        if input_ids.dim() != 2 or input_ids.shape[1] != 1:
            raise ValueError(f"input_ids must have shape [B, 1]: got {list(input_ids.shape)}")
        if any(layer.state is None for layer in layers):
            raise ValueError("cache must have read a prompt: got an empty one")
        for layer in layers:
            layer.reserve(1)  # may put a state into new buffers
        states = [layer.state for layer in layers]
        captured = all(captured_by_graphs(state, self.model.dtype) for state in states)
        if not captured or any(layer.record_past for layer in layers):
            return self._forward(input_ids)
        if self.ids is None or self.ids.shape != input_ids.shape or not same_objects(states, self.states):
            return self._warm_up(input_ids, layers)
        ids = self.ids.copy_(input_ids)
        if self.replay is None:
            self.replay, self.logits = record(lambda: self._forward(ids), ids.device)  # counts the column
        else:
            for layer in layers:
                layer.length += 1
        self.replay()
        assert self.logits is not None
        return self.logits

    def _warm_up(self, input_ids: Tensor, layers: list[MixerCacheLayer]) -> Tensor:
        """The eager pass, for the first token and for whatever has new buffers."""
        self.replay, self.logits = None, None
        self.ids = input_ids.clone()
        before = [layer.state for layer in layers]
        logits = on_side_stream(lambda: self._forward(input_ids), input_ids.device)
        # An ordinary state (of a prompt under autograd) has taken another path: then the next token warms up too.
        self.states = before if same_objects(before, [layer.state for layer in layers]) else []
        return logits

    def _forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, cache=self.cache, use_cache=True).logits[:, -1]


def captured_by_graphs(state: MixerState | None, dtype: torch.dtype) -> bool:
    """Whether a step of a model of ``dtype`` from this state may be recorded: on CUDA, if it waits for nothing.

    Log-linear states need the step kernels, hence their widths and a state in the model's dtype. Under autocast nothing is
    recorded: it frees its casts of the weights when it ends, and a replay would go on reading them.
    """
    if state is None or state.position.device.type != "cuda" or torch.is_autocast_enabled("cuda"):
        return False
    memory = state.memory if isinstance(state, RecurrentMixerState) else None
    if not isinstance(memory, DecodingState):
        return True
    return memory.open_k.dtype == dtype and has_kernel(memory.open_k, memory.open_v, memory.chunk_size)


def same_objects(one: list[Any], other: list[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other))


class GraphedCall:
    """Stands in for the model where ``generate`` decodes: single unpadded tokens go through a ``DecodingGraph``."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.graph: DecodingGraph | None = None

    def __call__(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalOutput:
        """As the model's own; where the graph serves, only ``logits [B, 1, vocab_size]`` and the cache are filled in."""
        cache = one_cache(cache, past_key_values)
        if input_ids is None or cache is None or not self._serves(input_ids, cache, kwargs):
            return self._eager(input_ids, cache, attention_mask, kwargs)
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):  # waits, as generate does every token
            return self._eager(input_ids, cache, attention_mask, kwargs)
        if self.graph is None or self.graph.cache is not cache:
            self.graph = DecodingGraph(self.model, cache)
            if attention_mask is not None:  # later ones only grow
                check_past(cache, attention_mask, 1)
        return CausalOutput(logits=self.graph(input_ids).unsqueeze(1), **{FIELD: cache})  # type: ignore[arg-type]

    def _serves(self, input_ids: Tensor, cache: Cache, kwargs: dict[str, Any]) -> bool:
        asked = [kwargs.get(name) for name in ("output_hidden_states", "output_attentions")]
        config: Any = self.model.config
        plain = not any(asked) and not config.output_hidden_states and not torch.is_grad_enabled()
        devices = set(getattr(self.model, "hf_device_map", {}).values())
        return (
            plain
            and len(devices) <= 1
            and input_ids.shape[1] == 1
            and cache.is_compileable
            and cache.get_seq_length() > 0
        )

    def _eager(
        self, input_ids: Tensor | None, cache: Cache | None, attention_mask: Tensor | None, kwargs: dict[str, Any]
    ) -> CausalOutput:
        return self.model(input_ids=input_ids, cache=cache, attention_mask=attention_mask, **kwargs)
