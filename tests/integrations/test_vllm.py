"""The vLLM plugin against ``generate``, on the CPU: ``make test-vllm`` makes the environment and runs this file."""

from __future__ import annotations

import gc
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import urlopen

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

import loglinear

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")

from vllm import LLM, EngineArgs, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMValidationError

from loglinear import DecodingState
from loglinear.integrations.vllm import layouts_of
from loglinear.layers import MIXERS
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.models.levels import level_scales
from loglinear.models.packed import page_bytes

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of other packages

# One layer of each kind, which makes pages of several sizes.
LOG_LINEAR = [name for name, kind in MIXERS.items() if kind.recurrent and kind.twin]
LINEAR = [kind.twin for kind in MIXERS.values() if kind.twin]
HYBRID = ["log_linear_mamba2", "attention", "log_linear_kda", "log_linear_gated_deltanet"]
LENGTHS = [1, 2, 3, 15, 16, 31, 63, 64, 65, 100, 127, 128, 129, 200, 350, 700]
ROOM = 1024  # max_model_len
SIZES = dict(
    **dict(vocab_size=256, hidden_size=48, intermediate_size=64, max_position_embeddings=ROOM, initializer_range=0.2),
    **dict(mamba_head_dim=16, mamba_state_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=32),
    **dict(delta_num_heads=2, kda_num_heads=2, gla_num_heads=2, retnet_num_heads=2, lightning_num_heads=2),
)


def prompts(lengths: list[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 256, (n,), generator=generator).tolist() for n in lengths]


def generated(model: LogLinearForCausalLM, texts: list[list[int]], new: int) -> list[list[int]]:
    """The answers of ``generate``, greedily, of a batch with padding on the left."""
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    answers = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return answers[:, width:].tolist()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved(mixer)``: a folder with a model, and its answers of 12 tokens to the prompts."""
    made = {}

    def of(mixer):
        key = str(mixer)
        if key not in made:
            layers = len(mixer) if isinstance(mixer, list) else 2
            torch.manual_seed(0)
            model = LogLinearForCausalLM(LogLinearConfig(mixer=mixer, num_hidden_layers=layers, **SIZES)).eval()
            folder = tmp_path_factory.mktemp("model")
            model.save_pretrained(folder)
            made[key] = folder, generated(model, prompts(), 12)
        return made[key]

    return of


@contextmanager
def engine(folder, **options) -> Iterator[LLM]:
    settings = dict(dtype="float32", max_model_len=ROOM, max_num_seqs=16, max_num_batched_tokens=64, seed=0)
    settings |= dict(enforce_eager=True, enable_prefix_caching=False, skip_tokenizer_init=True)
    llm = LLM(model=str(folder), **{**settings, **options})
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(new: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)


def answers(llm: LLM, texts: list[list[int]], new: int = 12) -> list[list[int]]:
    done = llm.generate([{"prompt_token_ids": text} for text in texts], greedy(new), use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in done]


def request(llm: LLM, name: str, text: list[int], new: int = 12) -> None:
    llm.llm_engine.add_request(name, {"prompt_token_ids": text}, greedy(new))


def steps(llm: LLM, count: int, done: dict[str, list[int]]) -> None:
    """So many steps of the engine, or as many as there is work for; ``done`` takes the answers that are complete."""
    for _ in range(count):
        if not llm.llm_engine.has_unfinished_requests():
            return
        for one in llm.llm_engine.step():
            if one.finished:
                done[one.request_id.split("-")[0]] = list(one.outputs[0].token_ids)


@pytest.mark.parametrize("mixer", [LOG_LINEAR, LINEAR, "attention"])
def test_sixteen_requests_have_the_tokens_of_generate(saved, mixer):
    """16 at once, which come in as the budget of 64 tokens lets them and leave one by one."""
    folder, want = saved(mixer)
    with engine(folder) as llm:
        assert answers(llm, prompts()) == want


@pytest.mark.parametrize("budget", [16, 64, 65, 512])
def test_a_hybrid_at_any_split_of_its_prompts(saved, budget):
    folder, want = saved(HYBRID)
    with engine(folder, max_num_batched_tokens=budget) as llm:
        assert answers(llm, prompts()) == want


def test_requests_that_join_are_preempted_and_are_aborted(saved):
    """All running requests lose their pages and begin again; one ends in mid-answer, and another gets its pages."""
    folder, want = saved(HYBRID)
    texts, done = prompts(), {}
    with engine(folder, max_num_seqs=4) as llm:
        for i in (15, 3, 8):
            request(llm, str(i), texts[i])
        steps(llm, 14, done)
        request(llm, "2", texts[2])
        steps(llm, 2, done)
        assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        steps(llm, 14, done)
        llm.llm_engine.abort_request(["15"])
        for i in (14, 5):
            request(llm, str(i), texts[i])
        steps(llm, 1000, done)
    assert done == {str(i): want[i] for i in (3, 8, 2, 14, 5)}


@pytest.mark.parametrize("mixer", [LOG_LINEAR, HYBRID], ids=["log-linear", "hybrid"])
def test_a_prefix_is_read_once(saved, mixer):
    """vLLM copies pages at the ends of its blocks. A text that begins as another does goes on from such a page."""
    folder, want = saved(mixer)
    text = prompts()[-1]
    with engine(folder, enable_prefix_caching=True, max_num_batched_tokens=512) as llm:
        assert answers(llm, prompts()) == want
        again = llm.generate([{"prompt_token_ids": text}], greedy(12), use_tqdm=False)[0]
    assert again.num_cached_tokens > 0
    assert list(again.outputs[0].token_ids) == want[-1]


def test_compiled(saved):
    folder, want = saved(HYBRID)
    with engine(folder, enforce_eager=False) as llm:
        assert answers(llm, prompts()) == want


def test_the_server(saved, tmp_path):
    """vLLM's server over loopback, asked by OpenAI's client: whole and streamed answers, health and metrics.

    The command ``vllm`` of vllm-cpu 0.32.0 asks for the version of a package called vllm, and ends; its module is run instead.
    """
    import openai

    folder, want = saved(HYBRID)
    save_tokenizer(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", port]
    command += ["--dtype", "float32", "--enforce-eager", "--served-model-name", "run", "--host", "127.0.0.1"]
    asked = dict(model="run", prompt=prompts()[8], max_tokens=12, temperature=0, extra_body={"ignore_eos": True})
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as server,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(f"{address}/health", server, tmp_path / "log")
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            whole = client.completions.create(**asked).choices[0].text
            parts = [part.choices[0].text for part in client.completions.create(**asked, stream=True) if part.choices]
            metrics = urlopen(f"{address}/metrics").read().decode()
        finally:
            server.terminate()
    assert whole.split() == [f"w{i}" for i in want[8]]
    assert len(parts) > 2
    assert "".join(parts) == whole
    assert re.search(r"^vllm:generation_tokens_total\{.*\} 24\.0$", metrics, re.M)


def save_tokenizer(folder) -> None:
    """A tokenizer beside a model: the word of token 7 is w7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SIZES["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def wait_for(address: str, server: subprocess.Popen, log) -> None:
    """Until the server answers at ``address``. Raises AssertionError with the log if it ends before."""
    while True:
        try:
            return urlopen(address).close()
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)


def test_a_request_without_room(saved):
    folder, _ = saved("attention")
    with (
        engine(folder) as llm,
        pytest.raises(VLLMValidationError, match=f"length is {ROOM} tokens.* at least {ROOM + 1} "),
    ):
        answers(llm, [[1] * (ROOM + 1)])


REFUSED = {
    "--tensor-parallel-size must be 1 for log-linear models: got 2": dict(tensor_parallel_size=2),
    "--enable-lora must be False for log-linear models: got True": dict(enable_lora=True),
    "--load-format must be auto or hf or safetensors for log-linear models: got dummy": dict(load_format="dummy"),
    "--mamba-cache-dtype must be auto for log-linear models: got float16": dict(mamba_cache_dtype="float16"),
    "--mamba-ssm-cache-dtype must be auto or float32 or bfloat16 .* got float16": dict(mamba_ssm_cache_dtype="float16"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(saved, message):
    with pytest.raises(ValueError, match=message):
        layouts_of(config_of(saved(HYBRID)[0], **REFUSED[message]))


def test_vllm_refuses_pipeline_parallelism(saved):
    with pytest.raises(NotImplementedError, match="Pipeline parallelism is not supported"):
        config_of(saved(HYBRID)[0], pipeline_parallel_size=2)


def mamba2():
    sizes = dict(num_hidden_layers=2, num_heads=4, head_dim=16, state_size=16, n_groups=1)
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=64, hidden_size=32, **sizes))


def qwen3_next():
    """Two linear layers and one of softmax attention, with experts."""
    linear = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=48)
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    sizes |= dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, layer_types=kinds, max_position_embeddings=ROOM)
    return Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, **linear, **experts, pad_token_id=0, initializer_range=0.2))


@pytest.mark.parametrize("make", [mamba2, qwen3_next])
def test_a_lifted_model_of_transformers(make, tmp_path):
    """Levels that count; requests alone, then three at once; a prefix is read once; three that are preempted begin again.

    Without the option the folder is refused.
    """
    torch.manual_seed(0)
    model = make().eval()
    loglinear.lift(model)
    model.generation_config.eos_token_id = None
    for scale in level_scales(model).values():
        torch.nn.init.normal_(scale.L)
        torch.nn.init.normal_(scale.dl_proj.weight, std=0.3)
    model.save_pretrained(tmp_path)
    texts, done = [[token % 63 + 1 for token in text] for text in prompts([3, 65, 700])], {}
    want = [generated(model, [text], 9)[0] for text in texts]
    with pytest.raises(ValueError, match="a lifted model of transformers needs the option --hf-overrides"):
        config_of(tmp_path)
    overrides = {"architectures": ["LiftedForCausalLM"], "quantization_config": None}
    with engine(tmp_path, hf_overrides=overrides, enable_prefix_caching=True, max_num_batched_tokens=512) as llm:
        assert answers(llm, texts, 9) == want
        again = llm.generate([{"prompt_token_ids": texts[-1]}], greedy(9), use_tqdm=False)[0]
        for i, text in enumerate(texts):
            request(llm, str(i), text, 9)
        steps(llm, 5, done)
        assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        steps(llm, 1000, done)
    assert done == {str(i): answer for i, answer in enumerate(want)}
    assert again.num_cached_tokens > 0
    assert list(again.outputs[0].token_ids) == want[-1]


def config_of(folder, **options):
    """vLLM's configuration for a model, without an engine."""
    return EngineArgs(model=str(folder), skip_tokenizer_init=True, enforce_eager=True, **options).create_engine_config()


def test_a_page_is_as_large_as_the_state_of_generate(tmp_path):
    """The paper's 825M model: its config alone, on the meta device."""
    config = LogLinearConfig(architectures=["LogLinearForCausalLM"])
    config.save_pretrained(tmp_path)
    pages = page_bytes(layouts_of(config_of(tmp_path, dtype="bfloat16", max_model_len=16_384)))
    K, V, H = config.mamba_state_size, config.mamba_head_dim, config.mamba_num_heads
    state = DecodingState.empty(1, H, 1, K, V, 16_384, torch.bfloat16, device="meta")
    conv = 2 * (config.conv_size - 1) * (H * V + 2 * K)
    assert abs(pages / (state.nbytes + conv) - 1) < 0.02
