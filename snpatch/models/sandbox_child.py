"""The program of the sandbox's process: it answers requests, one JSON line each, until its parent ends.

Why it imports nothing of snpatch and little else at first: it starts in 0.1 s. A request that takes longer than its
`seconds` of CPU time is ended by the kernel, together with the process.
"""

import json
import os
import re
import resource
import select
import signal
import sys

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
    """Return what a task raises. Imports what it needs, so that this does not count as its time."""
    if task is match:
        return FAILURES
    import transformers.utils.chat_template_utils  # noqa: F401
    from jinja2 import TemplateError

    return (*FAILURES, TemplateError)


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
