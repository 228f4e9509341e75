"""Loading of Hugging Face folders and hub models, with one-line errors for missing and damaged files."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from snpatch.errors import SnpatchError, first_line
from snpatch.models.hub import resolve_model_folder, resolve_revision
from snpatch.utils.files import check_no_lfs_pointer
from snpatch.utils.schema import parse_json

RUST_PANIC = "PanicException"  # raised by Rust libraries; it is not an Exception
UNKNOWN_CHARACTER = "a \uf8ff"  # in no vocabulary
PROBE_TEXT = "How do I a b  c\n d?"
TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
UPGRADE = "if it is of a newer {0} than the installed one, pip install -U {0}"
REMEDIES = {  # loader -> what to do if it cannot read a file
    "AutoConfig": f"Check its config.json; {UPGRADE.format('transformers')}.",
    "AutoTokenizer": f"Check its tokenizer.json and tokenizer_config.json; {UPGRADE.format('tokenizers')}.",
    "PeftModel": "Check its adapter_config.json and its tensors; if they are of a newer PEFT, pip install -U peft.",
    "AutoModel": "Check that its weights and its config.json are of one model, and complete.",
}
MERGE_REMEDY = "Merge its adapter with PEFT (merge_and_unload), and save it again."

logger = logging.getLogger(__name__)


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
            _check_tokenizer_class(loaded, model)
        return loaded


def load_network(loader, model: str | Path, **arguments):
    """Load a model by `load_pretrained`, and check that it has the checkpoint's weights.

    Args:
        loader: AutoModelForCausalLM or AutoModelForSequenceClassification.
        model: Folder, hub name, or hub name@revision.
        arguments: Further arguments of `from_pretrained`.

    Raises:
        SnpatchError: See `load_pretrained`; or the checkpoint lacks a weight, its head is not the tied embedding, or a
            causal language model has no place for a tensor. Classifiers often come with a head of their pretraining.
    """
    network, report = load_pretrained(loader, model, output_loading_info=True, **arguments)
    is_causal = loader.__name__ == "AutoModelForCausalLM"
    unexpected = report["unexpected_keys"] if is_causal else ()
    check_tensor_names(model, type(network).__name__, report["missing_keys"], unexpected)
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    if is_causal and network.config.tie_word_embeddings and head.weight is not embedding.weight:
        raise build_untied_error(model)
    return network


def check_tensor_names(model: str | Path, network: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise a SnpatchError for missing weights of a checkpoint and for tensors that its model lacks.

    Args:
        model: The checkpoint, for errors.
        network: Class of the model.
        missing: Names of the weights that the checkpoint lacks.
        unexpected: Names of the tensors that the model does not have.
    """
    if not missing and not unexpected:
        return
    parts = [f"none for {_list_names(missing)}"] if missing else []
    parts += [f"{_list_names(unexpected)}, which it does not have"] if unexpected else []
    is_unmerged = any(".base_layer." in name for name in unexpected)
    remedy = MERGE_REMEDY if is_unmerged else REMEDIES["AutoModel"]
    raise SnpatchError(f"{model}: expected the tensors of a {network}, got {' and '.join(parts)}. {remedy}")


def build_untied_error(model: str | Path) -> SnpatchError:
    """Return the error for a checkpoint with a head that is not the embedding that its config ties it to."""
    return SnpatchError(
        f"{model}: expected an lm_head.weight equal to the embedding (tie_word_embeddings = true), got another one. "
        "Set tie_word_embeddings = false in its config.json, or remove lm_head.weight from its weights."
    )


def _list_names(names: Collection[str]) -> str:
    """Return the first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def _check_tokenizer(tokenizer) -> None:
    """Raise the errors that a tokenizer with wrong files would raise at the first prompt."""
    if isinstance(tokenizer.model_max_length, bool) or not isinstance(tokenizer.model_max_length, int | float):
        raise ValueError(f"model_max_length: expected a number, got {tokenizer.model_max_length!r}")
    tokenizer(UNKNOWN_CHARACTER)


def _check_tokenizer_class(tokenizer, model: str | Path) -> None:
    """Raise for a tokenizer_class that reads texts in another way than tokenizer.json.

    A class that transformers chose by itself is a warning. For some classes transformers replaces the steps of
    tokenizer.json by the steps of that class. A byte-level tokenizer then loses every space. transformers knows such
    models by their hub names, but not copies of them.
    """
    from tokenizers import Tokenizer

    path = resolve_model_folder(model, has_weights=False) / TOKENIZER_FILE
    if not tokenizer.is_fast or not path.is_file():
        return
    file_tokenizer = Tokenizer.from_file(str(path))
    ids = tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    file_ids = file_tokenizer.encode(PROBE_TEXT, add_special_tokens=False).ids
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
    file_text = file_tokenizer.decode(file_ids, skip_special_tokens=False).strip()
    if ids == file_ids or text == file_text:  # a different space at the beginning changes no word
        return
    name = type(tokenizer).__name__
    change = f"which reads {PROBE_TEXT!r} as {text!r} and not as {file_text!r}"
    if not _has_tokenizer_class(path.with_name(TOKENIZER_CONFIG_FILE), name):
        logger.warning(f"snpatch: {model}: transformers chose {name}, {change}. Pass prompts as token ids.")
        return
    raise SnpatchError(
        f"{model}: expected a tokenizer_class that follows its {TOKENIZER_FILE}, got {name}, {change}. Set "
        f"tokenizer_class to PreTrainedTokenizerFast in its {TOKENIZER_CONFIG_FILE}."
    )


def _has_tokenizer_class(path: Path, name: str) -> bool:
    """Return whether a tokenizer's config names this class, or its older name with Fast."""
    config = parse_json(path.read_text(encoding="utf-8-sig")) if path.is_file() else None
    config_name = config.get("tokenizer_class") if isinstance(config, dict) else None
    return str(config_name).removesuffix("Fast") == name.removesuffix("Fast")


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
        for path in Path(model).iterdir() if Path(model).is_dir() else ():
            if path.is_file():
                check_no_lfs_pointer(path)
        remedy = "" if isinstance(error, OSError) else f". {REMEDIES.get(loader, REMEDIES['AutoModel'])}"
        raise SnpatchError(f"cannot load {model} ({loader}): {first_line(error).rstrip('.')}{remedy}") from error
