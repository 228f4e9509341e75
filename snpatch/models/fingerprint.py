"""What names a checkpoint by content: a hash of its bytes, taken once and kept beside each file's place, size and time.

Why bytes and not sums of the weights: sums of floats differ between devices, so equal weights would be strangers, and
weights that an engine has packed for itself cannot be summed at all.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import snapshot_download

from snpatch.errors import SnpatchError, first_line
from snpatch.files import write_text

WEIGHTS = ("*.safetensors", "*.bin", "*.pt")  # the first kind of which there is any
TOKENIZER = ("tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab*", "chat_template*")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "generation_config.json")
# An adapter on the hub: owner and name, and perhaps a revision and a folder in it.
HUB = re.compile(
    r"(?!.*\.\.)(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<subfolder>[\w.-]+(/[\w.-]+)*))?"
)
CONFIG = "config.json"  # sizes, rotary base, norms' epsilon: what the same weights may be read with
CACHE = "digests.json"
DIGITS = 16


def fingerprint_checkpoint(model: str | Path, has_weights: bool = True) -> str:
    """Names a checkpoint, a folder or a model from the hub, by the bytes of its weights and its config.

    has_weights False: by its config alone, as its weights are drawn at random. Where it lies and when it was written do
    not matter. Files are read in parallel, as fast as the disk and SHA-256 allow (1.8 GB a second and core where the
    CPU has instructions for it); a file that was hashed before and has the same path, size and time is not read again
    (3 ms).
    """
    folder = local_model_folder(model, has_weights)
    files = [*(_weights(folder) if has_weights else ()), folder / CONFIG]
    kept = _Kept()
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter
        digests = list(pool.map(kept.digest_of, files))
    kept.save()
    named = sorted(f"{file.name} {fingerprint}" for file, fingerprint in zip(files, digests, strict=True))
    return hashlib.sha256("\n".join(named).encode(errors="surrogateescape")).hexdigest()[:DIGITS]


def fingerprint_adapter(adapter: str | Path) -> str:
    """Names a PEFT adapter, a folder or one from the hub, by the bytes of its tensors and its config."""
    folder = local_adapter_folder(adapter)
    files = [*_weights(folder), folder / "adapter_config.json"]
    kept = _Kept()
    digests = [kept.digest_of(file) for file in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:DIGITS]


def fingerprint_tokenizer(tokenizer) -> str:
    """Names a tokenizer by everything that makes its ids; its chat template is not part of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [type(tokenizer).__name__, tokenizer.all_special_tokens]
    parts += [backend.to_str()] if backend is not None else [sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:DIGITS]


def fingerprint_tokenizer_files(folder: str | Path) -> str:
    """Names a folder's tokenizer and its chat template by their files' bytes."""
    files = sorted(path for pattern in TOKENIZER for path in Path(folder).glob(pattern))
    kept = _Kept()
    digests = [f"{file.name} {kept.digest_of(file)}" for file in files]
    kept.save()
    return hashlib.sha256("\n".join(digests).encode(errors="surrogateescape")).hexdigest()[:DIGITS]


def local_model_folder(model: str | Path, has_weights: bool = True) -> Path:
    """The folder itself, or the local copy of a model from the hub (name or name@revision), perhaps without weights."""
    if Path(model).is_dir():
        return Path(model)
    try:
        wanted = ["*.json", "*.model", "*.jinja", *(["*.safetensors"] if has_weights else [])]
        name, _, revision = str(model).partition("@")
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
        if has_weights and not any(folder.glob("*.safetensors")):
            snapshot_download(name, revision=revision or None, allow_patterns=["*.bin", "*.bin.index.json"])
        return folder
    except Exception as error:  # the hub's client, and the one of HTTP below it, raise their own
        raise SnpatchError(f"cannot download {model}: {first_line(error)}") from error


def local_adapter_folder(adapter: str | Path) -> Path:
    """Return the folder of a PEFT adapter, or the local copy of one from the hub.

    adapter: a folder, or owner/name, owner/name@revision, owner/name:subfolder, owner/name@revision:subfolder.
    """
    match = HUB.fullmatch(str(adapter))
    if Path(adapter).is_dir() or match is None:
        return Path(adapter)
    below = f"{match['subfolder']}/" if match["subfolder"] else ""
    wanted = [below + pattern for pattern in (*ADAPTER, *TOKENIZER)]
    try:
        folder = Path(snapshot_download(match["name"], revision=match["revision"], allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise SnpatchError(
            f"{adapter}: no such folder (wanted a PEFT adapter), and no adapter of that name can be downloaded: "
            f"{first_line(error)}"
        ) from error
    if not (folder / below).is_dir():
        raise SnpatchError(f"{adapter}: there is no {match['subfolder']} in {match['name']}")
    return folder / below


def local_snapshot(model: str | Path) -> str:
    """What a library is told of a model: for name@revision its local copy, as few know that form; else the name."""
    return str(local_model_folder(model)) if "@" in str(model) and not Path(model).is_dir() else str(model)


def get_revision(model: str | Path) -> str | None:
    """The commit of a model from the hub; None for a folder."""
    return None if Path(model).is_dir() else local_model_folder(model).name


def _weights(folder: Path) -> list[Path]:
    for pattern in WEIGHTS:
        if found := sorted(folder.glob(pattern)):
            return found
    raise SnpatchError(f"cannot load {folder}: it holds no weights ({', '.join(WEIGHTS)})")


def _cache() -> Path | None:
    """Return the file of digests; None for a user without a home, as containers run them."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "snpatch" / CACHE
    try:
        return Path.home() / ".cache" / "snpatch" / CACHE
    except RuntimeError:
        return None


class _Kept:
    """Digests by file, in the user's cache folder. One that cannot be read or written costs time and no more."""

    def __init__(self) -> None:
        self._path = _cache()
        self._new: dict[str, list] = {}
        try:
            kept = None if self._path is None else json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            kept = None
        self._kept: dict[str, list] = kept if isinstance(kept, dict) else {}

    def digest_of(self, path: Path) -> str:
        try:
            place, status = str(path.resolve(strict=True)), path.stat()
            stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
            kept = self._kept.get(place)
            if not isinstance(kept, list) or kept[:-1] != stamp or not isinstance(kept[-1], str):
                with open(path, "rb") as file:
                    self._new[place] = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            raise SnpatchError(f"cannot read {path}: {error.strerror or error}") from error
        return self._new.get(place, self._kept.get(place))[-1]

    def save(self) -> None:
        if not self._new or self._path is None:
            return
        alive = {place: kept for place, kept in (self._kept | self._new).items() if Path(place).exists()}
        try:
            write_text(self._path, json.dumps(alive, indent=0))
        except SnpatchError:
            return  # the next start reads the weights again
