"""``loglinear serve``: ``transformers serve`` on checkpoints of this library, OpenAI-style requests, streamed.

    loglinear serve out/run --port 8000        # with --compile, answers decode in CUDA graphs

Several requests may be open at a time; they are computed one after another. Needs ``pip install 'loglinear[serve]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from loglinear.cli.errors import UsageError
from loglinear.cli.offline import OFFLINE, offline


def serve(argv: Sequence[str], prog: str) -> None:
    """``transformers serve`` with its own options, and ``--offline``."""
    words = offline(argv)
    for needed in ("typer", "fastapi", "uvicorn", "openai"):
        import_module(needed)
    import typer
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import ModelManager

    import loglinear.models  # noqa: F401 - transformers knows the model from here on
    from loglinear.cli.checkpoint import check_checkpoints

    check_checkpoints(words)
    if not hasattr(ModelManager, "list_models"):
        ModelManager.get_gen_models = list_models(ModelManager.get_gen_models)  # type: ignore[method-assign]
    app = typer.Typer(add_completion=False)
    app.command(epilog=f"--offline: {OFFLINE}")(Serve)
    wrong_options: Any = typer.BadParameter.__base__  # click's UsageError; typer brings its own click, or not
    try:
        app(args=words, prog_name=prog, standalone_mode=False)
    except wrong_options as error:
        raise UsageError(error.format_message()) from error
    except typer.Abort:
        raise KeyboardInterrupt from None


def list_models(cached: Any) -> Any:
    """The answer of ``/v1/models``, as from transformers 5.24 on: the served model, or the models in the hub's cache."""

    def listed(manager: Any, cache_dir: str | None = None) -> list[dict]:
        from huggingface_hub import CacheNotFound

        if manager.force_model is not None:
            return [{"owned_by": "local", "id": manager.force_model, "object": "model", "created": 0}]
        try:
            return cached(cache_dir)
        except CacheNotFound:  # nothing was downloaded yet
            return []

    return listed
