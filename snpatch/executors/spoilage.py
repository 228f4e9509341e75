"""Spoilage: whether a text with non-finite values means that its engine must be restarted.

A patched text may overflow. If an unpatched one does, either the engine was spoiled, or the model cannot
compute the text in its dtype. A restart tells them apart, so each text causes one at most.
"""

from dataclasses import dataclass, field

from snpatch.errors import OverflowedError, SpoiledEngineError


@dataclass(eq=False)
class Spoilage:
    """Record of an engine's overflows. It outlives restarts."""

    _texts: set[str] = field(default_factory=set)  # unpatched texts that overflowed
    _is_inherent: bool = False  # whether one of them did so on a restarted engine, too

    def judge(self, error: OverflowedError) -> OverflowedError:
        """Return the error to report: a SpoiledEngineError if the engine must be restarted, else the given one."""
        if error.unpatched is None:
            self._texts.clear()  # it may have spoiled the engine since
            self._is_inherent = False
            return error
        if self._is_inherent or error.unpatched in self._texts:
            self._is_inherent = True
            return OverflowedError(
                f"{error}; the model itself overflows on this prompt, as a restarted engine does so, too: use bfloat16 "
                "or float32",
                unpatched=error.unpatched,
            )
        self._texts.add(error.unpatched)
        return SpoiledEngineError(
            f"the engine is spoiled: {error}. It is restarted; send the request again", unpatched=error.unpatched
        )
