"""Construction of judges from strings, as the command line and experiment configs name them."""

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast, overload

from snpatch.errors import SnpatchError
from snpatch.judges.protocol import Judge
from snpatch.judges.refusal import REFUSAL_JUDGE, RefusalWords

if TYPE_CHECKING:
    from snpatch.judges.score_model import ScoreModel


@overload
def open_judge(spec: str, *, format: str, **arguments) -> "ScoreModel": ...
@overload
def open_judge(spec: str, **arguments) -> Judge: ...
def open_judge(spec: str, **arguments) -> Judge:
    """Return the judge that a string names.

    Args:
        spec: "refusal" (RefusalWords), "module:function" (a Python callable by its import path), or a model's folder or
            hub name (ScoreModel).
        arguments: Arguments of ScoreModel.

    Returns:
        The judge; a ScoreModel must be closed after use.

    Raises:
        SnpatchError: The function cannot be imported, the model cannot be loaded, or another judge got arguments.
    """
    if is_model_judge(spec):
        from snpatch.judges.score_model import ScoreModel

        return ScoreModel(spec, **arguments)
    if arguments:
        names = ", ".join(sorted(arguments))
        raise SnpatchError(f"judge {spec}: expected no {names}, which only model judges accept")
    return RefusalWords() if spec == REFUSAL_JUDGE else _import_function(spec, *spec.split(":"))


def is_model_judge(spec: str) -> bool:
    """Return whether a string names a model, for which `open_judge` accepts ScoreModel's arguments."""
    return spec != REFUSAL_JUDGE and not is_function_judge(spec)


def is_function_judge(spec: str) -> bool:
    """Return whether a string names a Python function, whose module `open_judge` imports."""
    return re.fullmatch(r"[\w.]+:\w+", spec) is not None and not Path(spec).exists()


def _import_function(spec: str, module: str, name: str) -> Judge:
    try:
        judge = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SnpatchError(f"judge {spec}: cannot import it: {error}. Add its folder to PYTHONPATH.") from error
    if not callable(judge):
        raise SnpatchError(f"judge {spec}: expected a callable (prompts, completions) -> scores, got {judge!r}")
    return cast(Judge, judge)
