"""Run regular expressions and chat templates of downloaded folders in a process with a deadline and little memory.

Why a process: such a text is a program. No library bounds the time and memory of Python's regular expressions and of
Jinja's templates, and a thread that runs one cannot be ended.
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

from snpatch.errors import SnpatchError

MATCH_SECONDS = 2.0  # CPU time of all matching for one field
RENDER_SECONDS = 5.0  # CPU time of one chat
MAX_TEXT = 10_000_000  # characters of one rendered chat
CHILD = Path(__file__).with_name("sandbox_child.py")


def match(patterns: Sequence[str], names: Sequence[str], subject: str) -> list[int | None]:
    """Return for each name the index of the first pattern that fits it as a whole.

    Args:
        patterns: regular expressions of `re`.
        names: what is matched.
        subject: names file, field and patterns in errors.

    Raises:
        SnpatchError: a pattern is none, or matching takes longer than MATCH_SECONDS.
    """
    request = {"task": "match", "patterns": list(patterns), "names": list(names), "seconds": MATCH_SECONDS}
    return _sandbox.ask(request, subject)


def render(template: str, chat: Sequence[Mapping], variables: Mapping, options: Mapping, subject: str) -> str:
    """Return a chat as a Jinja template writes it, as transformers' `apply_chat_template` does.

    Args:
        template: its source.
        chat: messages.
        variables: what it may name besides, the tokenizer's special tokens.
        options: `add_generation_prompt` and `continue_final_message`.
        subject: names the template in errors.

    Raises:
        SnpatchError: the template fails, takes longer than RENDER_SECONDS, or writes more than MAX_TEXT.
    """
    request = {"task": "render", "template": template, "chat": list(chat), "variables": dict(variables)}
    return _sandbox.ask({**request, "options": dict(options), "most": MAX_TEXT, "seconds": RENDER_SECONDS}, subject)


class _Sandbox:
    """The process, which is started when it is needed, and again after it was ended."""

    def __init__(self) -> None:
        self._lock, self._process = threading.Lock(), None

    def ask(self, request: Mapping, subject: str) -> object:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._started()
            try:
                line = _answer(self._process, request)
            except BaseException:  # Ctrl-C: a later question must not read this answer
                self.close()
                raise
            if not line:
                code = self._process.wait()
                if code == -signal.SIGPROF:
                    raise SnpatchError(f"{subject}: expected an end within {request['seconds']} s, got none")
                raise SnpatchError(f"{subject}: it ended the process that ran it (exit code {code})")
        answer = json.loads(line)
        if "error" in answer:
            raise SnpatchError(f"{subject}: {answer['error']}")
        return answer["value"]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @staticmethod
    def _started() -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([sys.executable, "-P", CHILD], **pipes, text=True, start_new_session=True)


def _answer(process: subprocess.Popen, request: Mapping) -> str:
    """Return the process's line for a request; empty if the process has ended."""
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    return process.stdout.readline()


def _begin() -> None:
    """Make a sandbox of this process's own: a forked one must not read the answers of the other."""
    global _sandbox
    _sandbox = _Sandbox()


_begin()
os.register_at_fork(after_in_child=_begin)
atexit.register(lambda: _sandbox.close())
