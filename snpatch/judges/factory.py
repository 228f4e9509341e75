"""Judges by a text that names them, as the command line and experiment configs do."""

import importlib
import re
from pathlib import Path

from snpatch.errors import SnpatchError
from snpatch.judges.protocol import Judge
from snpatch.judges.refusal import RefusalWords

REFUSAL = "refusal"  # the judge of refusal words


def open_judge(spec: str, **arguments) -> Judge:
    """The judge that a text names: "refusal" (RefusalWords), "module:function" (a Python callable by its import
    path), or the folder or hub name of a model. arguments: ScoreModel's, which is to be closed after use."""
    if is_model_judge(spec):
        from snpatch.judges.score_model import ScoreModel

        return ScoreModel(spec, **arguments)
    if arguments:
        raise SnpatchError(f"judge {spec}: {', '.join(sorted(arguments))} is for a model")
    return RefusalWords() if spec == REFUSAL else _imported(spec, *spec.split(":"))


def is_model_judge(spec: str) -> bool:
    """Whether a text names a model, so that `open_judge` takes ScoreModel's arguments with it."""
    return spec != REFUSAL and not is_function_judge(spec)


def is_function_judge(spec: str) -> bool:
    """Return whether a text names a Python function, whose module `open_judge` imports."""
    return re.fullmatch(r"[\w.]+:\w+", spec) is not None and not Path(spec).exists()


def _imported(spec: str, module: str, name: str) -> Judge:
    try:
        judge = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SnpatchError(f"judge {spec}: cannot be imported: {error} (is it on PYTHONPATH?)") from error
    if not callable(judge):
        raise SnpatchError(f"judge {spec}: wanted a callable (prompts, completions) -> scores, got {judge!r}")
    return judge
