"""Log-linear models on vLLM: ``vllm serve RUN``, once ``pip install 'loglinear[vllm]'`` has run.

vLLM finds ``register`` by its entry point ``vllm.general_plugins`` in each of its processes. This package is all that touches
vLLM's interfaces. ``layers/pages.py`` knows how the states of many requests lie in memory, ``engine.py`` gives vLLM the
model, and ``lifted.py`` lifted models of transformers; ``folder.py`` says which option these need.
"""

from __future__ import annotations

from vllm.version import __version__

SUPPORTED = "0.32"  # these interfaces of vLLM change between releases
if __version__.split("+")[0].split(".")[:2] != SUPPORTED.split("."):
    raise ImportError(f"loglinear.integrations.vllm supports vLLM {SUPPORTED}: got vLLM {__version__}")


BACKEND = "LOG_LINEAR"


def register() -> None:
    """Make the model known to transformers and vLLM, which may call this several times. A served model is imported later.

    The processes of a server name the backend to each other, and some of them never import the model.
    """
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    import loglinear.models  # noqa: F401 - AutoConfig knows the configuration from here on
    from loglinear.integrations.vllm import folder  # noqa: F401 - vLLM knows the folders of lifted models

    if BACKEND not in MambaAttentionBackendEnum.__members__:
        register_backend(BACKEND, "loglinear.integrations.vllm.engine.LogLinearBackend", is_mamba=True)
    ModelRegistry.register_model("LogLinearForCausalLM", "loglinear.integrations.vllm.engine:LogLinearForCausalLM")
    ModelRegistry.register_model("LiftedForCausalLM", "loglinear.integrations.vllm.lifted:LiftedForCausalLM")
