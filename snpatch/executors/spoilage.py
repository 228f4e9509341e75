"""Spoilage: the decision whether a completion with non-finite values requires a restart of its engine.

A patched completion may overflow. If an unpatched one does, either the engine is spoiled, or the model cannot compute
the completion in its dtype. A restart shows which, so each prompt causes at most one.
"""

from dataclasses import dataclass, field

from snpatch.errors import OverflowedError, SpoiledEngineError


@dataclass(eq=False)
class Spoilage:
    """Record of an engine's overflows, kept across restarts."""

    _texts: set[str] = field(default_factory=set)  # hashes of unpatched requests that overflowed
    _is_inherent: bool = False  # one of them also overflowed on a restarted engine

    def judge(self, error: OverflowedError) -> OverflowedError:
        """Return the error to report.

        It is a SpoiledEngineError if the engine must be restarted, else the given error.
        """
        if error.unpatched is None:
            self._texts.clear()  # it may have spoiled the engine
            self._is_inherent = False
            return error
        if self._is_inherent or error.unpatched in self._texts:
            self._is_inherent = True
            return OverflowedError(
                f"{error}; the model itself overflows on this prompt, also on a restarted engine. Use bfloat16 "
                "or float32",
                unpatched=error.unpatched,
            )
        self._texts.add(error.unpatched)
        return SpoiledEngineError(
            f"the engine is spoiled: {error}. It is restarted; send the request again", unpatched=error.unpatched
        )
