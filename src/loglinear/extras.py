"""EXTRAS: one line for a package that is missing, with the pip command that brings it."""

from __future__ import annotations

# Top-level names of what we import, by the smallest extra that brings them.
EXTRA = {
    **dict.fromkeys(("accelerate", "numpy", "safetensors", "tokenizers", "transformers"), "models"),
    **dict.fromkeys(("datasets", "matplotlib", "psutil", "rich", "tensorboard", "tyro", "yaml"), "cli"),
    **dict.fromkeys(("fastapi", "openai", "pydantic", "typer", "uvicorn"), "serve"),
    **dict.fromkeys(("flax", "jax", "optax"), "jax"),
    "lm_eval": "eval",
}


def explained(error: ModuleNotFoundError, needed_by: str, extra: str | None = None) -> ModuleNotFoundError:
    """The error to raise for ``error``: it names what is missing, who needs it, and the extra to install.

    ``extra`` is the one that ``needed_by`` needs, which may be larger than that of the missing package. An error about any
    other module comes back as it is.
    """
    package = (error.name or "").partition(".")[0]
    if package not in EXTRA:
        return error
    command = f"pip install 'loglinear[{extra or EXTRA[package]}]'"
    return ModuleNotFoundError(f"{needed_by} needs {package}, which is not installed: {command}", name=error.name)
