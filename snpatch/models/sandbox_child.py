"""Program of the sandbox process: responds to requests, one JSON line each, until its parent ends.

Why it imports nothing of snpatch, and only the rendering module of transformers: it starts in a fraction of a second,
where the packages take many times that. The kernel kills the process if a request takes more CPU time than `seconds`.
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
from io import BufferedReader
from pathlib import Path
from types import ModuleType
from typing import cast

MEMORY_BYTES = 2**31  # address space
POLL_SECONDS = 2.0
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, RuntimeError, SyntaxError,
    TypeError, ValueError, re.error,
)  # fmt: skip


def main() -> None:
    """Run requests from stdin until the parent ends."""
    _limit_memory()
    parent = os.getppid()
    while _wait_for_request(parent):
        sys.stdout.write(json.dumps(respond(json.loads(sys.stdin.readline()))) + "\n")
        sys.stdout.flush()


def respond(request: dict) -> dict:
    """Return the value of a request's task, or its error as one line."""
    task, seconds = TASKS[request.pop("task")], request.pop("seconds")
    failures = _prepare(task)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process, even inside a long C call
    try:
        return {"value": task(**request)}
    except failures as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:1000]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def match(patterns: list[str], names: list[str]) -> list[int | None]:
    """Return for each name the index of the first pattern that matches it as a whole."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return [next((i for i, pattern in enumerate(compiled) if pattern.fullmatch(name)), None) for name in names]


def render(template: str, chat: list[dict], variables: dict, options: dict, max_chars: int) -> str:
    """Return a chat rendered by the template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    [text], _ = render_jinja_template([chat], chat_template=template, **options, **variables)
    if len(text) > max_chars:
        raise ValueError(f"expected at most {max_chars} characters of one chat, got {len(text)}")
    return text


def find_variables(template: str) -> list[str]:
    """Return the variables that a template reads and does not set itself."""
    from jinja2.meta import find_undeclared_variables
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return sorted(find_undeclared_variables(_compile_jinja_template(template).environment.parse(template)))


TASKS = {"match": match, "render": render, "find_variables": find_variables}


def _prepare(task) -> tuple[type[BaseException], ...]:
    """Import what a task needs; return the exceptions that the task raises.

    The imports then do not count as the task's time.
    """
    if task is match:
        return FAILURES
    from jinja2 import TemplateError

    if "transformers" not in sys.modules:
        _stub_transformers()
    import transformers.utils.chat_template_utils  # noqa: F401

    return (*FAILURES, TemplateError)


def _stub_transformers() -> None:
    """Replace the packages around transformers' `chat_template_utils` by empty ones."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    [folder] = spec.submodule_search_locations
    for name, path in (("transformers", folder), ("transformers.utils", str(Path(folder, "utils")))):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [path]
    names = {"is_jinja_available": True, "is_torch_available": False, "is_vision_available": False}
    imports = sys.modules["transformers.utils.import_utils"] = ModuleType("transformers.utils.import_utils")
    imports.__dict__.update({name: lambda value=value: value for name, value in names.items()})
    logs = sys.modules["transformers.utils.logging"] = ModuleType("transformers.utils.logging")
    logs.__dict__["get_logger"] = logging.getLogger


def _limit_memory() -> None:
    """Limit this process to MEMORY_BYTES of addresses and no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _wait_for_request(parent: int) -> bool:
    """Wait for a request; return False once the parent has ended."""
    while not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        if os.getppid() != parent:
            return False
    return bool(cast(BufferedReader, sys.stdin.buffer).peek(1))


if __name__ == "__main__":
    main()
