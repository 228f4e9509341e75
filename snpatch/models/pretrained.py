"""Loading Hugging Face folders and hub models, with one-line errors for what is not there or broken."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snpatch.errors import SnpatchError, first_line
from snpatch.models.fingerprint import local_snapshot

PANIC = "PanicException"  # of Rust's libraries, which is no Exception
UNKNOWN = "a \uf8ff"  # no vocabulary has this character
NEWER = "if it is of a newer {0} than the installed one, pip install -U {0}"
REMEDIES = {  # loader -> what to do about what it cannot read
    "AutoConfig": f"Check its config.json; {NEWER.format('transformers')}.",
    "AutoTokenizer": f"Check its tokenizer.json and tokenizer_config.json; {NEWER.format('tokenizers')}.",
    "PeftModel": "Check its adapter_config.json and its tensors; if they are of a newer PEFT, pip install -U peft.",
    "AutoModel": "Check that its weights and its config.json are of one model, and whole.",
}


def load_pretrained(loader, model: str | Path, **arguments):
    """`loader.from_pretrained(model, ...)` of a transformers Auto class."""
    if not Path(model).is_dir() and (Path(model).is_absolute() or str(model).startswith(".")):
        raise SnpatchError(f"{model}: no such folder (wanted a Hugging Face model)")
    folder = local_snapshot(model)
    with wrap_loader_errors(model, loader.__name__):
        loaded = loader.from_pretrained(folder, **arguments)
        if loader.__name__ == "AutoTokenizer":
            _check_tokenizer(loaded)
        return loaded


def _check_tokenizer(tokenizer) -> None:
    """Raise what a tokenizer with wrong files raises at the first text: for its length, or an unknown character."""
    if isinstance(tokenizer.model_max_length, bool) or not isinstance(tokenizer.model_max_length, int | float):
        raise ValueError(f"model_max_length: expected a number, got {tokenizer.model_max_length!r}")
    tokenizer(UNKNOWN)


@contextmanager
def wrap_loader_errors(model: str | Path, loader: str) -> Iterator[None]:
    """Turn whatever a loader raises into one line: of damaged files tokenizers raises Exception itself."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, SnpatchError) or not (isinstance(error, Exception) or type(error).__name__ == PANIC):
            raise
        remedy = "" if isinstance(error, OSError) else f". {REMEDIES.get(loader, REMEDIES['AutoModel'])}"
        raise SnpatchError(f"cannot load {model} ({loader}): {first_line(error).rstrip('.')}{remedy}") from error
