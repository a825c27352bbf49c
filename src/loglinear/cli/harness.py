"""EleutherAI's lm-evaluation-harness on checkpoints of this library, offline.

    python -m loglinear.cli.harness --model hf --model_args pretrained=out/run,max_length=16384 \\
        --tasks niah_single_1 --metadata '{"max_seq_lengths": [4096, 16384]}' --device cuda --batch_size 1

Special about this file: all it adds to ``lm_eval`` is the registration of the model with the Auto classes. Needs
``pip install '.[eval]'``. RULER's niah_single_1 makes its own text (a repeated sentence), keys and numbers, so it reads no
data set; niah_single_2 and niah_single_3 would fetch essays.
"""

from __future__ import annotations

import os
import sys

import loglinear.models  # noqa: F401 - registers the model with the Auto classes
from loglinear.cli.checkpoint import check_checkpoints


def main() -> None:
    """``lm_eval`` with its own options, from the command line."""
    # Nothing that this task needs is on the hub, and asking for it would wait for the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    check_checkpoints(sys.argv[1:])
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
