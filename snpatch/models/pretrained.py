"""Loading of Hugging Face folders and hub models, with one-line errors for missing and damaged files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snpatch.errors import SnpatchError, first_line
from snpatch.models.hub import resolve_revision

RUST_PANIC = "PanicException"  # raised by Rust libraries; it is not an Exception
UNKNOWN_CHARACTER = "a \uf8ff"  # in no vocabulary
UPGRADE = "if it is of a newer {0} than the installed one, pip install -U {0}"
REMEDIES = {  # loader -> what to do if it cannot read a file
    "AutoConfig": f"Check its config.json; {UPGRADE.format('transformers')}.",
    "AutoTokenizer": f"Check its tokenizer.json and tokenizer_config.json; {UPGRADE.format('tokenizers')}.",
    "PeftModel": "Check its adapter_config.json and its tensors; if they are of a newer PEFT, pip install -U peft.",
    "AutoModel": "Check that its weights and its config.json are of one model, and complete.",
}


def load_pretrained(loader, model: str | Path, **arguments):
    """Return `loader.from_pretrained(model, **arguments)`.

    Args:
        loader: A transformers Auto class.
        model: Folder, hub name, or hub name@revision.
        arguments: Further arguments of `from_pretrained`.

    Raises:
        SnpatchError: There is no such folder or hub model, or its files are damaged.
    """
    if not Path(model).is_dir() and (Path(model).is_absolute() or str(model).startswith(".")):
        raise SnpatchError(f"{model}: no such folder (expected a Hugging Face model)")
    folder = resolve_revision(model)
    with wrap_loader_errors(model, loader.__name__):
        loaded = loader.from_pretrained(folder, **arguments)
        if loader.__name__ == "AutoTokenizer":
            _check_tokenizer(loaded)
        return loaded


def _check_tokenizer(tokenizer) -> None:
    """Raise the errors that a tokenizer with wrong files would raise at the first prompt."""
    if isinstance(tokenizer.model_max_length, bool) or not isinstance(tokenizer.model_max_length, int | float):
        raise ValueError(f"model_max_length: expected a number, got {tokenizer.model_max_length!r}")
    tokenizer(UNKNOWN_CHARACTER)


@contextmanager
def wrap_loader_errors(model: str | Path, loader: str) -> Iterator[None]:
    """Turn any exception of a loader into a one-line SnpatchError.

    For damaged files, tokenizers raises Exception.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == RUST_PANIC
        if isinstance(error, SnpatchError) or not (isinstance(error, Exception) or is_panic):
            raise
        remedy = "" if isinstance(error, OSError) else f". {REMEDIES.get(loader, REMEDIES['AutoModel'])}"
        raise SnpatchError(f"cannot load {model} ({loader}): {first_line(error).rstrip('.')}{remedy}") from error
