"""Sandbox process, limited in time and memory, for regular expressions and chat templates of downloaded folders.

Why a process: patterns and templates are programs. No library bounds the time and memory of Python's regular
expressions and Jinja's templates, and a thread that runs one cannot be stopped.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from snpatch.errors import SnpatchError

MATCH_SECONDS = 2.0  # CPU time of all patterns and names of one field
RENDER_SECONDS = 5.0  # CPU time of one chat
MAX_RENDERED_CHARS = 10_000_000  # of one chat
CHILD_PROGRAM = Path(__file__).with_name("sandbox_child.py")


def match(patterns: Sequence[str], names: Sequence[str], subject: str) -> list[int | None]:
    """Return for each name the index of the first pattern that matches it as a whole; None if none does.

    Args:
        patterns: Regular expressions of `re`.
        names: Strings to match.
        subject: File, field and patterns, for errors.

    Raises:
        SnpatchError: A pattern is invalid, or matching takes longer than MATCH_SECONDS.
    """
    request = {"task": "match", "patterns": list(patterns), "names": list(names), "seconds": MATCH_SECONDS}
    return _sandbox.run(request, subject)


def render(template: str, chat: Sequence[Mapping], variables: Mapping, options: Mapping, subject: str) -> str:
    """Return a chat rendered by a Jinja template, as transformers' `apply_chat_template` does.

    Args:
        template: Jinja source.
        chat: Messages.
        variables: Further variables of the template, such as the tokenizer's special tokens.
        options: `add_generation_prompt` and `continue_final_message`.
        subject: The template, for errors.

    Raises:
        SnpatchError: The template fails, takes longer than RENDER_SECONDS, or writes more than MAX_RENDERED_CHARS.
    """
    request = {"task": "render", "template": template, "chat": list(chat), "variables": dict(variables)}
    limits = {"max_chars": MAX_RENDERED_CHARS, "seconds": RENDER_SECONDS}
    return _sandbox.run({**request, "options": dict(options), **limits}, subject)


def find_variables(template: str, subject: str) -> list[str]:
    """Return the variables that a Jinja template reads and does not set itself.

    Args:
        template: Jinja source.
        subject: The template, for errors.

    Raises:
        SnpatchError: The template is invalid, or reading it takes longer than RENDER_SECONDS.
    """
    return _sandbox.run({"task": "find_variables", "template": template, "seconds": RENDER_SECONDS}, subject)


class _Sandbox:
    """The child process: started when it is needed, and again after it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def run(self, request: Mapping, subject: str) -> Any:
        """Return the result of one request; raise a SnpatchError if it fails or exceeds its limits."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            try:
                line = _exchange(self._process, request)
            except BaseException:  # Ctrl-C: the next request must not read this response
                self.close()
                raise
            if not line:
                code = self._process.wait()
                if code == -signal.SIGPROF:
                    raise SnpatchError(f"{subject}: expected an end within {request['seconds']} s, got none")
                raise SnpatchError(f"{subject}: it ended the process that ran it (exit code {code})")
        response = json.loads(line)
        if "error" in response:
            raise SnpatchError(f"{subject}: {response['error']}")
        return response["value"]

    def close(self) -> None:
        """Kill the child process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", CHILD_PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )


def _exchange(process: subprocess.Popen[str], request: Mapping) -> str:
    """Send a request and return the response line; empty if the process has ended."""
    assert process.stdin is not None  # both are pipes
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    return process.stdout.readline()


def _reset() -> None:
    """Create this process's own sandbox, because a forked process must not read its parent's responses."""
    global _sandbox
    _sandbox = _Sandbox()


_reset()
os.register_at_fork(after_in_child=_reset)
atexit.register(lambda: _sandbox.close())
