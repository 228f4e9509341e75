"""Fingerprints of checkpoints and tokenizers, and the cache of file hashes."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny

from snpatch import SnpatchError
from snpatch.config import EngineConfig
from snpatch.models.fingerprint import fingerprint_checkpoint, fingerprint_tokenizer
from snpatch.models.loaded_models import LoadedModels


@pytest.fixture
def folder(zoo, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(zoo("llama").folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that were hashed."""
    names, hash_file = [], hashlib.file_digest

    def hash_and_record(file, kind):
        names.append(Path(file.name).name)
        return hash_file(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", hash_and_record)
    return names


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_fingerprint_depends_on_bytes_and_not_on_path(folder, tmp_path):
    first = fingerprint_checkpoint(folder)
    assert len(first) == 16
    shutil.copytree(folder, tmp_path / "another")
    assert fingerprint_checkpoint(tmp_path / "another") == first
    flip(folder / "model.safetensors")
    assert fingerprint_checkpoint(folder) != first
    flip(folder / "model.safetensors")
    assert fingerprint_checkpoint(folder) == first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert fingerprint_checkpoint(folder) != first


def test_file_is_hashed_again_only_if_its_time_changes(folder, reads):
    first = fingerprint_checkpoint(folder)
    assert sorted(reads) == ["config.json", "model.safetensors"]
    reads.clear()
    assert fingerprint_checkpoint(folder) == first
    assert not reads
    os.utime(folder / "model.safetensors", (1, 1))
    assert fingerprint_checkpoint(folder) == first
    assert reads == ["model.safetensors"]


def test_fingerprint_covers_all_shards(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    first = fingerprint_checkpoint(folder)
    flip(folder / "model-00002-of-00002.safetensors")
    assert fingerprint_checkpoint(folder) != first


@pytest.mark.parametrize("content", [b"", b"[]", b'{"x": 1', 5, [], None])
def test_damaged_or_unwritable_cache_only_costs_time(folder, tmp_path, reads, content):
    """content: of the file, or what it holds for each of the checkpoint's files."""
    first = fingerprint_checkpoint(folder)
    cache_file = tmp_path / "cache" / "snpatch" / "digests.json"
    places = json.loads(cache_file.read_text())
    cache_file.unlink()
    if content is None:
        cache_file.mkdir()
    elif isinstance(content, bytes):
        cache_file.write_bytes(content)
    else:
        cache_file.write_text(json.dumps(dict.fromkeys(places, content)))
    reads.clear()
    assert fingerprint_checkpoint(folder) == first
    assert len(reads) == 2


def test_fingerprint_covers_settings_that_change_completions(folder):
    """Guards, rankings and stored completions of an engine stay valid for a server of the same model."""

    def fingerprint(**arguments) -> str:
        (weights,) = LoadedModels(EngineConfig(str(folder), vllm=arguments)).weights.values()
        return weights.fingerprint

    assert fingerprint() == fingerprint(max_num_seqs=4) == fingerprint(served_model_name=["a", "base"])
    assert fingerprint() != fingerprint(kv_cache_dtype="fp8")


def test_folder_without_weights_raises_one_line_error(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(SnpatchError, match="it holds no weights"):
        fingerprint_checkpoint(folder)


def test_tokenizer_fingerprint_covers_what_determines_ids():
    first = fingerprint_tokenizer(tiny.tokenizer())
    assert fingerprint_tokenizer(tiny.tokenizer()) == first
    assert fingerprint_tokenizer(tiny.tokenizer(eos="<pad>")) != first
    larger_tokenizer = tiny.tokenizer()
    larger_tokenizer.add_tokens(["another"])
    assert fingerprint_tokenizer(larger_tokenizer) != first
