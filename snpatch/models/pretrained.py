"""Loading Hugging Face folders and hub models, with one-line errors for what is not there or broken."""

from pathlib import Path

from snpatch.errors import SnpatchError, first_line
from snpatch.models.digest import pinned


def load_pretrained(loader, model: str | Path, **arguments):
    """`loader.from_pretrained(model, ...)` of a transformers Auto class."""
    if not Path(model).is_dir() and (Path(model).is_absolute() or str(model).startswith(".")):
        raise SnpatchError(f"{model}: no such folder (wanted a Hugging Face model)")
    folder = pinned(model)
    try:
        return loader.from_pretrained(folder, **arguments)
    except Exception as error:  # of a damaged file tokenizers raises Exception itself, transformers whatever it meets
        raise SnpatchError(f"cannot load {model} ({loader.__name__}): {first_line(error)}") from error
