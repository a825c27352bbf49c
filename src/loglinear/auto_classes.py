"""AUTO CLASSES: transformers knows the model after ``import loglinear``, whichever of the two is imported first.

Nothing is imported for that before it is needed: the first import that loads the Auto classes registers the model when
it is done.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import local
from types import ModuleType

PACKAGE, AUTO = "transformers", "transformers.models.auto.configuration_auto"


class AutoClassesFinder(MetaPathFinder):
    """Finds modules of transformers as the other finders do, and sees when their import is done."""

    def __init__(self, register: Callable[[], object]) -> None:
        self.register = register
        self.here = local()  # this thread's depth in imports of transformers, and whether it asks the other finders

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE or getattr(self.here, "asks", False):
            return None
        self.here.asks = True
        try:
            specs = (finder.find_spec(name, path, target) for finder in list(sys.meta_path))
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self.here.asks = False
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: object) -> None:
        execute = loader.exec_module  # type: ignore[attr-defined]

        def watched(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)  # the loader is again as it was
            self.here.depth = getattr(self.here, "depth", 0) + 1
            try:
                execute(module)
            finally:
                self.here.depth -= 1
            if self.here.depth == 0 and AUTO in sys.modules:  # no module of transformers is half imported
                self.finish()

        loader.exec_module = watched  # type: ignore[attr-defined]

    def finish(self) -> None:
        """Register the model, and look no more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            try:
                self.register()
            except Exception as error:  # a program that imports transformers may not want our models
                reason = f"{type(error).__name__}: {error}"
                warnings.warn(f"transformers will not know models of loglinear: {reason}", UserWarning, stacklevel=2)


def register_with_auto_classes(register: Callable[[], object]) -> None:
    """Call ``register``, once, as soon as the Auto classes of transformers are imported; now, if they are."""
    finder = AutoClassesFinder(register)
    sys.meta_path.insert(0, finder)
    if AUTO in sys.modules:
        finder.finish()
