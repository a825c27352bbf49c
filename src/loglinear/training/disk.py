"""A full disk: every library's report of it becomes one OSError that names the folder."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raise a failed write below ``folder`` as an OSError that names ``folder``."""
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise OSError(f"output: a file in {folder} could not be written: {reason}") from error


def _reason(error: Exception) -> str | None:
    """Why a file could not be written; None if the error is another one, or names its file itself."""
    if isinstance(error, OSError):
        return None if error.filename is not None or isinstance(error, ConnectionError) else error.strerror
    # safetensors and tokenizers, with exceptions of their own.
    match = re.search(r"(?:.*: )?(.+) \(os error \d+\)", str(error))
    if match:
        return match[1]
    # torch.save does not know why, and has other words for each way to fail.
    frames = traceback.extract_tb(error.__traceback__)
    saving = any(frame.name == "save" and Path(frame.filename).name == "serialization.py" for frame in frames)
    said = str(error).partition("\n")[0]
    return f"the disk may be full (torch.save: {said})" if saving else None
