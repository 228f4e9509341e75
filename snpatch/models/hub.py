"""Local folders of models and adapters, downloaded from the Hugging Face Hub where they are not folders already."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from snpatch.errors import SnpatchError, first_line
from snpatch.models.checkpoint_files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHT_FILES,
    GENERATION_CONFIG_FILE,
    TOKENIZER_PATTERNS,
)

# An adapter on the hub: owner and name, optionally a revision and a folder in the repository.
HUB_ADAPTER = re.compile(
    r"(?!.*\.\.)(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<subfolder>[\w.-]+(/[\w.-]+)*))?"
)
ADAPTER_PATTERNS = (ADAPTER_CONFIG_FILE, *ADAPTER_WEIGHT_FILES, GENERATION_CONFIG_FILE, *TOKENIZER_PATTERNS)


def resolve_model_folder(model: str | Path, has_weights: bool = True) -> Path:
    """Return a model's folder: the folder itself, or the local copy of a model on the hub.

    Args:
        model: Folder, hub name, or hub name@revision.
        has_weights: Download the weights, too.

    Raises:
        SnpatchError: The model cannot be downloaded.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        patterns = ["*.json", "*.model", "*.jinja", *(["*.safetensors"] if has_weights else [])]
        name, _, revision = str(model).partition("@")
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
        if has_weights and not any(folder.glob("*.safetensors")):
            snapshot_download(name, revision=revision or None, allow_patterns=["*.bin", "*.bin.index.json"])
        return folder
    except Exception as error:  # the hub's client and its HTTP client raise exceptions of their own
        raise SnpatchError(f"cannot download {model}: {first_line(error)}") from error


def resolve_adapter_folder(adapter: str | Path) -> Path:
    """Return a PEFT adapter's folder: the folder itself, or the local copy of an adapter on the hub.

    Args:
        adapter: Folder, owner/name, owner/name@revision, owner/name:subfolder or owner/name@revision:subfolder.

    Raises:
        SnpatchError: The adapter cannot be downloaded, or its repository has no such subfolder.
    """
    match = HUB_ADAPTER.fullmatch(str(adapter))
    if Path(adapter).is_dir() or match is None:
        return Path(adapter)
    prefix = f"{match['subfolder']}/" if match["subfolder"] else ""
    patterns = [prefix + pattern for pattern in ADAPTER_PATTERNS]
    try:
        folder = Path(snapshot_download(match["name"], revision=match["revision"], allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise SnpatchError(
            f"{adapter}: no such folder (expected a PEFT adapter), and no adapter of that name can be downloaded: "
            f"{first_line(error)}"
        ) from error
    if not (folder / prefix).is_dir():
        raise SnpatchError(f"{adapter}: no folder {match['subfolder']} in {match['name']}")
    return folder / prefix


def resolve_revision(model: str | Path) -> str:
    """Return a model as other libraries accept it.

    This is the local copy of name@revision, else the unchanged name.
    """
    return str(resolve_model_folder(model)) if "@" in str(model) and not Path(model).is_dir() else str(model)


def get_revision(model: str | Path) -> str | None:
    """Return the commit of a model on the hub; None for a folder."""
    return None if Path(model).is_dir() else resolve_model_folder(model).name
