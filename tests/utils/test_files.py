"""Atomic writes and checked reads of files."""

import os

import pytest
import torch
from safetensors.torch import save_file

from snpatch import SnpatchError
from snpatch.errors import first_line, shown
from snpatch.models.pretrained import load_pretrained
from snpatch.utils.files import atomic_write, check_writable, open_regular, read_tensors, write_tensors, write_text


def test_atomic_write_failure_keeps_old_file(tmp_path):
    path = tmp_path / "table.csv"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_check_writable_unwritable_path_raises(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (lambda p: write_text(p, "x"), check_writable):
        with pytest.raises(SnpatchError, match=r"cannot write .*file/out"):
            write(tmp_path / "file" / "out")
    check_writable(tmp_path / "new" / "out")
    assert not list((tmp_path / "new").iterdir())


def test_tensors_round_trip_and_other_kind_raises(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(6).view(2, 3).t()}, kind="ranking", meta={"n": [1, "two"]})
    tensors, meta = read_tensors(path, kind="ranking")
    assert torch.equal(tensors["a"], torch.tensor([[0, 3], [1, 4], [2, 5]]))
    assert meta == {"n": [1, "two"]}
    with pytest.raises(SnpatchError, match="expected a snpatch capture, got ranking"):
        read_tensors(path, kind="capture")
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(SnpatchError, match="not a safetensors file"):
        read_tensors(path, kind="ranking")


@pytest.mark.parametrize("meta", [None, "not json", "[1]"])
def test_read_tensors_without_meta_is_one_line(tmp_path, meta):
    header = {"kind": "ranking"} | ({} if meta is None else {"meta": meta})
    save_file({"rank": torch.zeros(1)}, tmp_path / "a.safetensors", metadata=header)
    with pytest.raises(SnpatchError, match="its header holds no JSON object under `meta`"):
        read_tensors(tmp_path / "a.safetensors", kind="ranking")


def test_first_line_of_empty_message_is_error_type():
    assert first_line(ValueError("\n  what \nmore")) == "what"
    assert first_line(OSError()) == "OSError"


def test_shown_integer_with_too_many_digits_is_described():
    assert shown(10**5000) == "int with too many digits to show"
    assert shown([10**5000]) == "list with too many digits to show"


def test_first_line_of_key_error_names_the_key():
    assert first_line(KeyError("x")) == "unknown or missing key 'x'"
    assert first_line(KeyError()) == "KeyError"


def test_load_pretrained_empty_message_is_one_line():
    class Loader:
        @staticmethod
        def from_pretrained(model):
            raise ValueError

    with pytest.raises(SnpatchError, match=r"cannot load some/model \(Loader\): ValueError"):
        load_pretrained(Loader, "some/model")


def test_atomic_write_syncs_before_rename(tmp_path, monkeypatch):
    calls = []

    def synced(descriptor):
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def replaced(partial, path):
        calls.append("replaced")
        rename(partial, path)

    rename = os.replace
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_text(tmp_path / "table.csv", "new")
    assert calls == [f"{tmp_path}/.table.csv.partial{os.getpid()}", "replaced", str(tmp_path)]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/hosts", path)])
def test_open_regular_refuses_links_pipes_folders(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(OSError, match=r"not a regular file|symbolic links"):
        open_regular(str(tmp_path / "x"), os.O_RDONLY)
    (tmp_path / "y").write_text("content")
    with open(tmp_path / "y", "rb", opener=open_regular) as file:
        assert file.read() == b"content"
