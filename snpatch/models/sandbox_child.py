"""The program of the sandbox's process: it answers requests, one JSON line each, until its parent ends.

Why it imports nothing of snpatch, and of transformers the one file that renders: it starts in a fraction of a second,
and the package takes many times that. A request that takes longer than its `seconds` of CPU time is ended by the
kernel, together with the process.
"""

import importlib.util
import json
import logging
import os
import re
import resource
import select
import signal
import sys
from pathlib import Path
from types import ModuleType

MEMORY_BYTES = 2**31  # of addresses
POLL_SECONDS = 2.0
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, RuntimeError, SyntaxError,
    TypeError, ValueError, re.error,
)  # fmt: skip


def main() -> None:
    _limit_memory()
    parent = os.getppid()
    while _is_asked(parent):
        print(json.dumps(answer(json.loads(sys.stdin.readline()))), flush=True)


def answer(request: dict) -> dict:
    """Return the value of a request's task, or its error in one line."""
    task, seconds = TASKS[request.pop("task")], request.pop("seconds")
    failures = _failures(task)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process, also inside a long call of C
    try:
        return {"value": task(**request)}
    except failures as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:1000]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def match(patterns: list[str], names: list[str]) -> list[int | None]:
    """Return for each name the index of the first pattern that fits it as a whole."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return [next((i for i, one in enumerate(compiled) if one.fullmatch(name)), None) for name in names]


def render(template: str, chat: list[dict], variables: dict, options: dict, most: int) -> str:
    """Return a chat as the template writes it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    [text], _ = render_jinja_template([chat], chat_template=template, **options, **variables)
    if len(text) > most:
        raise ValueError(f"expected at most {most} characters of one chat, got {len(text)}")
    return text


TASKS = {"match": match, "render": render}


def _failures(task) -> tuple[type[BaseException], ...]:
    """Return what a task raises. Imports what the task needs, so that this does not count as its time."""
    if task is match:
        return FAILURES
    from jinja2 import TemplateError

    if "transformers" not in sys.modules:
        _stand_in()
    import transformers.utils.chat_template_utils  # noqa: F401

    return (*FAILURES, TemplateError)


def _stand_in() -> None:
    """Put packages without content in the places of those around transformers' `chat_template_utils`."""
    [folder] = importlib.util.find_spec("transformers").submodule_search_locations
    for name, path in (("transformers", folder), ("transformers.utils", str(Path(folder, "utils")))):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [path]
    names = {"is_jinja_available": True, "is_torch_available": False, "is_vision_available": False}
    imports = sys.modules["transformers.utils.import_utils"] = ModuleType("transformers.utils.import_utils")
    imports.__dict__.update({name: lambda value=value: value for name, value in names.items()})
    sys.modules["transformers.utils.logging"] = ModuleType("transformers.utils.logging")
    sys.modules["transformers.utils.logging"].get_logger = logging.getLogger


def _limit_memory() -> None:
    """Let this process have MEMORY_BYTES and write no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _is_asked(parent: int) -> bool:
    """Wait for a request; return False once the parent has ended."""
    while not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        if os.getppid() != parent:
            return False
    return bool(sys.stdin.buffer.peek(1))


if __name__ == "__main__":
    main()
