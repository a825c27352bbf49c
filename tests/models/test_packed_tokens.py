"""Models that an engine has taken over, on an engine of a few lines: requests side by side have the logits of each alone."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, Mamba2Config, Mamba2ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

import loglinear
from loglinear.layers.pages import Batch, mix
from loglinear.models import LogLinearConfig, LogLinearForCausalLM, packed
from loglinear.models.levels import level_scales
from loglinear.models.packed import PackedDecoder, load, page_bytes, page_layouts, take_over

pytestmark = pytest.mark.filterwarnings("ignore:The fast path is not available")

ROOM = 128
CALLS = [
    (70, 1),
    (1, 66),
    (1, 1),
    (3, 1),
]  # tokens of two requests; one token is a step, unless the request starts with it
PAGES = (2, 0)


class Layer(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, *inputs):
        return self.run(*inputs)


class LittleEngine:
    """Two requests: pages of each mixer, keys and values in lists. ``order``: the requests of a call, those that step first."""

    def __init__(self, layouts):
        self.layouts, self.seen, self.order, self.counts, self.batch = layouts, [0, 0], [], [], None

    def begin(self, counts):
        steps = [i for i in (0, 1) if counts[i] == 1 and self.seen[i]]
        others = [i for i in (0, 1) if i not in steps]
        self.order, self.counts = steps + others, [counts[i] for i in steps + others]
        rows, pages = (torch.tensor([PAGES[i] for i in part]).long() for part in (steps, others))
        offsets = torch.tensor([0, *(counts[i] for i in others)]).cumsum(0)
        fresh = torch.tensor([not self.seen[i] for i in others]).bool()
        self.batch = Batch(rows, pages, fresh, offsets, offsets)
        return [range(self.seen[i], self.seen[i] + counts[i]) for i in self.order]

    def end(self):
        for i, count in zip(self.order, self.counts):
            self.seen[i] += count

    def mixer(self, path, mixer):
        state = self.layouts[path].view(torch.zeros(3, page_bytes(self.layouts), dtype=torch.int8))
        return Layer(lambda hidden: mix(mixer, hidden, state, self.batch))

    def attention(self, path, heads, kv_heads, width, scale):
        past = [(), ()]

        def attend(*qkv):
            made = []
            parts = [x.unflatten(1, (-1, width)).transpose(0, 1).split(self.counts, dim=1) for x in qkv]
            for i, q, *new in zip(self.order, *parts):
                past[i] = tuple(torch.cat(pair, dim=1) for pair in zip(past[i], new)) or tuple(new)
                k, v = (x.repeat_interleave(heads // kv_heads, dim=0) for x in past[i])
                seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
                mixed = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
                made.append(mixed.transpose(0, 1).flatten(1))
            return torch.cat(made)

        return Layer(attend)


def ours():
    mixers = ["log_linear_mamba2", "attention", "log_linear_gated_deltanet"]
    heads = dict(mamba_head_dim=8, mamba_state_size=8, delta_num_heads=2, num_attention_heads=2, num_key_value_heads=1)
    sizes = dict(vocab_size=32, hidden_size=24, intermediate_size=32, head_dim=16, max_position_embeddings=ROOM)
    return LogLinearForCausalLM(LogLinearConfig(mixer=mixers, num_hidden_layers=3, **heads, **sizes))


def mamba2():
    sizes = dict(num_hidden_layers=1, num_heads=2, head_dim=16, state_size=8, n_groups=1, vocab_size=32, hidden_size=16)
    return lifted(Mamba2ForCausalLM(Mamba2Config(**sizes)))


def qwen3_next():
    linear = dict(linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    experts = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    sizes = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=32, vocab_size=32)
    sizes |= dict(hidden_size=24, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    return lifted(Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, **linear, **experts, max_position_embeddings=ROOM)))


def lifted(model):
    """With levels that count."""
    loglinear.lift(model)
    for scale in level_scales(model).values():
        nn.init.normal_(scale.L)
        nn.init.normal_(scale.dl_proj.weight, std=0.3)
    return model


@pytest.mark.parametrize("make", [ours, mamba2, qwen3_next])
@torch.no_grad()
def test_requests_side_by_side_have_the_logits_of_each_alone(make):
    model = make().eval()
    texts = [torch.randint(32, (1, sum(call[i] for call in CALLS))) for i in range(2)]
    want = [model(text, use_cache=False).logits[0] for text in texts]
    engine = LittleEngine(page_layouts(model.config, torch.float32, ROOM, torch.float32))
    take_over(model, engine)
    decoder, got = PackedDecoder(model), [[], []]
    for counts in CALLS:
        places = engine.begin(counts)
        ids = torch.cat([texts[i][0, list(place)] for i, place in zip(engine.order, places)])
        positions = torch.tensor([place for part in places for place in part])
        logits = model.get_output_embeddings()(decoder(ids, positions))
        for i, part in zip(engine.order, logits.split(engine.counts)):
            got[i].append(part)
        engine.end()
    for parts, alone in zip(got, want):
        torch.testing.assert_close(torch.cat(parts), alone, rtol=1e-4, atol=1e-4)


def test_options_of_the_engine_count_for_a_model_of_ours(tmp_path):
    """A lifted model needs the config of its folder: that of the engine may lack the levels."""
    for make, counts in ((ours, True), (mamba2, False)):
        make().save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        config.bos_token_id = 7
        model = load(str(tmp_path), config, torch.bfloat16, revision=None)
        assert (model.dtype, model.training) == (torch.bfloat16, False)
        assert (model.config.bos_token_id == 7) is counts


def test_a_base_without_levels_and_other_attention_are_refused():
    sizes = (torch.float32, ROOM, torch.float32)
    with pytest.raises(ValueError, match="must have loglinear_levels, as a lifted model saves it: got None"):
        page_layouts(Mamba2Config(num_hidden_layers=1), *sizes)
    config = qwen3_next().config
    with (
        mock.patch.object(packed, "FOREIGN_ATTENTION", ()),
        pytest.raises(ValueError, match=r"softmax attention must be one of \[\] on an engine: got Qwen3NextAttention"),
    ):
        page_layouts(config, *sizes)
