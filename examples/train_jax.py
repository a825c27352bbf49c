"""Train a small Log-Linear Mamba-2 in JAX on bytes of the standard library's sources: `pip install 'loglinear[jax]'`.

python examples/train_jax.py --steps 200
"""

import argparse
import os
import sysconfig
from importlib.metadata import version
from pathlib import Path

# Before JAX is imported: on a CPU, gradients of several rows crash this version where it fuses products with YNNPACK.
if version("jaxlib") == "0.10.2":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_experimental_ynn_fusion_type="

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from loglinear.jax.models import LogLinearConfig, LogLinearForCausalLM, weight_decay_mask

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--mixer", default="log_linear_mamba2", help="or log_linear_gated_deltanet, mamba2, gated_deltanet")
args = parser.parse_args()

files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
sizes = {"hidden_size": 128, "num_hidden_layers": 2, "mamba_state_size": 32, "mamba_head_dim": 32, "delta_num_heads": 4}
config = LogLinearConfig(mixer=args.mixer, vocab_size=256, max_position_embeddings=args.length, **sizes)
model = LogLinearForCausalLM(config, rngs=nnx.Rngs(0))
schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, max(args.steps, 21))
rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1, mask=weight_decay_mask))
optimizer = nnx.Optimizer(model, rule, wrt=nnx.Param)


@nnx.jit
def train(model: LogLinearForCausalLM, optimizer: nnx.Optimizer, ids: jax.Array) -> jax.Array:
    def loss_of(model: LogLinearForCausalLM) -> jax.Array:
        logits, _ = model(ids[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


random = np.random.default_rng(0)
for step in range(args.steps):
    starts = random.integers(len(text) - args.length - 1, size=4)
    ids = jnp.asarray(np.stack([text[start : start + args.length + 1] for start in starts]), jnp.int32)
    loss = train(model, optimizer, ids)
    if step % 10 == 0 or step == args.steps - 1:
        print(f"step {step} loss {loss:.4f}", flush=True)
