"""The language of docstrings, comments, messages, help texts and guides: no banned word, no banned opening."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BANNED = re.compile(
    r"\b(told|tells|anew|mend(?:ed|s)?|hangs? on|beside|strangers?|is no more|so many"
    r"|lies|stands|whoever|wherein|perhaps)\b",
    re.IGNORECASE,
)
OPENING = re.compile(r"(What|Whether|Who|Which|Of)\b")
MAX_SUMMARY = 100  # characters of the first line of a function's docstring
MESSAGE_CALLS = re.compile(r"(\w*Error|print|warn|warning|info|Option|Argument|cli_field|field|note|notes)$")


def iter_prose(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line, kind, text) of a file's prose; kind: docstring, summary, comment, message or markdown."""
    source = path.read_text()
    if path.suffix == ".md":
        blocks = re.sub(r"```.*?```", lambda m: "\n" * m[0].count("\n"), source, flags=re.S)
        for number, line in enumerate(blocks.splitlines(), 1):
            yield number, "markdown", re.sub(r"`[^`]*`", "", line)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], "comment", token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if docstring := ast.get_docstring(node):
                yield node.body[0].lineno, "docstring", docstring
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield node.body[0].lineno, "summary", docstring.splitlines()[0]
        elif isinstance(node, ast.Call) and MESSAGE_CALLS.match(
            getattr(node.func, "attr", getattr(node.func, "id", ""))
        ):
            for value in [*node.args, *(keyword.value for keyword in node.keywords)]:
                for part in ast.walk(value):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.lineno, "message", part.value


def violations(path: Path) -> list[str]:
    messages = []
    for line, kind, text in iter_prose(path):
        if kind != "summary":
            messages += [f"{path}:{line}: {kind} has the banned word {m[0]!r}" for m in BANNED.finditer(text)]
        if kind == "docstring" and (opening := OPENING.match(text)):
            messages.append(f"{path}:{line}: docstring begins with {opening[0]!r}")
        if kind == "summary" and len(text) > MAX_SUMMARY and "tests" not in path.parts:
            messages.append(f"{path}:{line}: the docstring's first line has {len(text)} characters")
    return messages


def prose_files() -> Iterator[Path]:
    for folder in ("snpatch", "tests", "bench", "kernels", ".ci"):
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md"))
    yield from (*ROOT.glob("*.md"), ROOT / "setup.py")


def test_prose_has_no_banned_word_or_opening():
    messages = [line for path in prose_files() if path != Path(__file__) for line in violations(path)]
    assert not messages, "\n".join(messages)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('"""Whether it runs."""', 1),
        ('"""Return the file, as told."""', 1),
        ("x = 1  # lies here", 1),
        ('raise ValueError(f"{x} stands")', 1),
        ('words = "she told me"', 0),
        (f'def f():\n    """{"x" * 100}"""', 0),
        (f'def f():\n    """{"x" * 101}"""', 1),
    ],
)
def test_style_check_finds_banned_prose(tmp_path, source, count):
    (tmp_path / "a.py").write_text(source)
    assert len(violations(tmp_path / "a.py")) == count
