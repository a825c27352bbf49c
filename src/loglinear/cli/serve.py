"""``transformers serve`` on checkpoints of this library: OpenAI-style requests, streamed.

    python -m loglinear.cli.serve out/run --port 8000        # with --compile, answers decode in CUDA graphs

Special about this file: all it adds to ``transformers serve`` is the model class, which the server looks up by name among
transformers' own. Several requests may be open at a time; they are computed one after another. Needs
``pip install '.[serve]'``.
"""

from __future__ import annotations

import os
import sys

from loglinear.cli.checkpoint import check_checkpoints
from loglinear.models import LogLinearForCausalLM


def main() -> None:
    """``transformers serve`` with its own options, from the command line."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # checkpoints are folders
    check_checkpoints(sys.argv[1:])
    import typer
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    model_manager.transformers.LogLinearForCausalLM = LogLinearForCausalLM  # type: ignore[attr-defined]
    typer.run(Serve)


if __name__ == "__main__":
    main()
