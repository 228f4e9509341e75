"""Loading Hugging Face folders and hub models, with one-line errors for what is not there or broken."""

from pathlib import Path

from snpatch.errors import SnpatchError, first_line
from snpatch.models.digest import pinned

NEWER = "if it is of a newer {0} than the installed one, pip install -U {0}"
REMEDIES = {  # loader -> what to do about what it cannot read
    "AutoConfig": f"Check its config.json; {NEWER.format('transformers')}.",
    "AutoTokenizer": f"Check its tokenizer.json and tokenizer_config.json; {NEWER.format('tokenizers')}.",
    "AutoModel": "Check that its weights and its config.json are of one model, and whole.",
}


def load_pretrained(loader, model: str | Path, **arguments):
    """`loader.from_pretrained(model, ...)` of a transformers Auto class."""
    if not Path(model).is_dir() and (Path(model).is_absolute() or str(model).startswith(".")):
        raise SnpatchError(f"{model}: no such folder (wanted a Hugging Face model)")
    folder = pinned(model)
    try:
        return loader.from_pretrained(folder, **arguments)
    except SnpatchError:
        raise
    except Exception as error:  # of a damaged file tokenizers raises Exception itself, transformers whatever it meets
        remedy = "" if isinstance(error, OSError) else f". {REMEDIES.get(loader.__name__, REMEDIES['AutoModel'])}"
        raise SnpatchError(f"cannot load {model} ({loader.__name__}): {first_line(error)}{remedy}") from error
