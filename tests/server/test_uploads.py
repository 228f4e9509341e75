"""Upload folder: refused and interrupted uploads leave no file, and no file there keeps a server from starting."""

import hashlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from jobs import RANKINGS, SHAPE, VALUES

from snpatch import Constant, SnpatchError

pytest.importorskip("vllm", reason="vLLM is not installed")

from snpatch.server import uploads
from snpatch.server.errors import InternalError, PayloadTooLargeError
from snpatch.server.uploads import Uploads

HOLD = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


class FakeRegistry:
    """Registry without an engine."""

    def __init__(self, shape: tuple[int, int] = SHAPE) -> None:
        self.rankings, self.constants, self._shape = {}, {}, shape
        self.engine = SimpleNamespace(geometry=SimpleNamespace(n_layers=shape[0], n_neurons=shape[1]))

    def check_value(self, kind, name, value):
        if tuple(value.shape if kind == "rankings" else value.values.shape) != self._shape:
            raise SnpatchError(f"{name}: is for another model")

    def add(self, kind, name, value):
        self.check_value(kind, name, value)
        getattr(self, kind)[name] = value

    def remove(self, kind, name):
        del getattr(self, kind)[name]


@pytest.fixture
def bodies(tmp_path):
    """Contents of three files, by name."""
    for name, ranking in zip(("first", "second"), RANKINGS, strict=True):
        ranking.save(tmp_path / name)
    Constant(VALUES).save(tmp_path / "values")
    return {name: (tmp_path / name).read_bytes() for name in ("first", "second", "values")}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "a folder"


def files(folder):
    return {path.name for path in folder.iterdir()} - {"index.json", ".lock"}


def get_file_name(body: bytes) -> str:
    return f"{hashlib.sha256(body).hexdigest()}.safetensors"


def test_upload_over_quota_leaves_no_file(folder, bodies):
    uploads_folder = Uploads(folder, FakeRegistry())
    for i in range(uploads.MAX_UPLOADED_NAMES - 1):
        uploads_folder.upload("rankings", f"r{i}", bodies["first"])
    stored_files = {name: uploads_folder.store_file("rankings", name, bodies["second"]) for name in ("a", "b")}
    constant = uploads_folder.store_file("constants", "c", bodies["values"])  # all started before the quota was full
    uploads_folder.assign_name("rankings", "a", *stored_files["a"])
    for kind, name, file in (("rankings", "b", stored_files["b"]), ("constants", "c", constant)):
        with pytest.raises(PayloadTooLargeError, match="at most 64 rankings and constants, got one more"):
            uploads_folder.assign_name(kind, name, *file)
    assert files(folder) == {get_file_name(bodies["first"]), get_file_name(bodies["second"])}


@pytest.mark.parametrize("body", [b"", b"\x80\x04cos\nsystem\n.", "values"])
def test_invalid_upload_leaves_no_file(folder, bodies, body):
    uploads_folder = Uploads(folder, FakeRegistry())
    with pytest.raises(SnpatchError) as error:
        uploads_folder.upload("rankings", "a", bodies.get(body, body))
    assert str(folder) not in str(error.value)
    assert not files(folder)


def test_upload_with_unwritable_index_leaves_no_file(folder, bodies, monkeypatch):
    uploads_folder = Uploads(folder, FakeRegistry())
    uploads_folder.upload("rankings", "a", bodies["first"])

    def raise_disk_full(path, text):
        raise SnpatchError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(uploads, "write_text", raise_disk_full)
    for name in ("a", "b"):
        with pytest.raises(InternalError, match="No space left on device") as error:
            uploads_folder.upload("rankings", name, bodies["second"])
        assert str(folder) not in str(error.value)
    assert files(folder) == {get_file_name(bodies["first"])}
    assert uploads_folder._registry.rankings["a"].fingerprint == RANKINGS[0].fingerprint


def test_delete_removes_file_before_writing_index(folder, bodies, monkeypatch):
    uploads_folder = Uploads(folder, FakeRegistry())
    uploads_folder.upload("rankings", "a", bodies["first"])
    write = uploads.write_text

    def raise_disk_full(path, text):
        if files(folder):
            raise SnpatchError(f"cannot write {path}: No space left on device")
        write(path, text)

    monkeypatch.setattr(uploads, "write_text", raise_disk_full)
    assert uploads_folder.delete("rankings", "a")
    assert not files(folder)
    assert json.loads((folder / "index.json").read_text())["rankings"] == {}


def test_delete_with_unwritable_index_can_be_repeated(folder, bodies, monkeypatch):
    uploads_folder = Uploads(folder, FakeRegistry())
    uploads_folder.upload("rankings", "a", bodies["first"])

    def raise_error(path, text):
        raise SnpatchError(f"cannot write {path}: Input/output error")

    with monkeypatch.context() as patch, pytest.raises(InternalError, match="Input/output error"):
        patch.setattr(uploads, "write_text", raise_error)
        uploads_folder.delete("rankings", "a")
    assert not uploads_folder._registry.rankings
    assert uploads_folder.delete("rankings", "a")
    assert not uploads_folder.delete("rankings", "a")


def test_start_removes_only_files_of_interrupted_uploads(folder, bodies):
    uploads_folder = Uploads(folder, FakeRegistry())
    uploads_folder.upload("rankings", "a", bodies["first"])
    uploads_folder.store_file("rankings", "b", bodies["second"])  # killed before it was named
    first = get_file_name(bodies["first"])
    for name in (f".{first}.partial77", ".index.json.partial77"):
        (folder / name).write_bytes(b"half")
    for name in ("safety.safetensors", ".notes.partial", "readme.txt"):
        (folder / name).write_bytes(b"the user's")
    restarted_uploads = Uploads(folder, FakeRegistry())
    assert files(folder) == {first, "safety.safetensors", ".notes.partial", "readme.txt"}
    assert restarted_uploads._registry.rankings.keys() == {"a"}


def _replace(path, make):
    path.unlink()
    make(path)


DAMAGED = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "other": lambda path: path.write_bytes(path.read_bytes()[::-1]),
    "large": lambda path: path.write_bytes(bytes(2 << 20)),
    "link": lambda path: _replace(path, lambda path: path.symlink_to("/dev/zero")),
    "pipe": lambda path: _replace(path, os.mkfifo),
    "folder": lambda path: _replace(path, os.mkdir),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_skipped_until_replaced_or_deleted(folder, bodies, caplog, damage):
    uploads_folder = Uploads(folder, FakeRegistry())
    uploads_folder.upload("rankings", "bad", bodies["first"])
    uploads_folder.upload("rankings", "good", bodies["second"])
    damage(folder / get_file_name(bodies["first"]))
    restarted_uploads = Uploads(folder, FakeRegistry())
    (line,) = caplog.messages
    assert (get_file_name(bodies["first"]) in line, "rankings: bad is skipped" in line) == (True, True)
    assert restarted_uploads._registry.rankings.keys() == {"good"}
    restarted_uploads.upload("rankings", "new", bodies["second"])
    if not (folder / get_file_name(bodies["first"])).is_dir():
        assert restarted_uploads.delete("rankings", "bad")
        assert files(folder) == {get_file_name(bodies["second"])}
        restarted_uploads.upload("rankings", "bad", bodies["first"])
        assert Uploads(folder, FakeRegistry())._registry.rankings.keys() == {"good", "new", "bad"}


def test_upload_for_other_model_is_skipped_and_kept(folder, bodies, caplog):
    Uploads(folder, FakeRegistry()).upload("rankings", "a", bodies["first"])
    assert not Uploads(folder, FakeRegistry((2, 96)))._registry.rankings
    assert "rankings: a is skipped: a: is for another model" in caplog.text
    assert Uploads(folder, FakeRegistry())._registry.rankings.keys() == {"a"}


def test_upload_with_configured_name_is_skipped(folder, bodies, caplog):
    Uploads(folder, FakeRegistry()).upload("rankings", "a", bodies["first"])
    registry = FakeRegistry()
    registry.add("rankings", "a", RANKINGS[1])
    assert Uploads(folder, registry)._registry.rankings["a"] is RANKINGS[1]
    assert "a is also set by the server's config" in caplog.text


UNREADABLE = {
    "empty": "", "cut": '{"rankings": {"a"', "list": "[]", "text": "\udcff", "number": "7",
    "deep": '{"rankings":' + '{"a":' * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_index_logs_one_line_and_removes_no_file(folder, bodies, caplog, text):
    Uploads(folder, FakeRegistry()).upload("rankings", "a", bodies["first"])
    (folder / "index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    restarted_uploads = Uploads(folder, FakeRegistry())
    (line,) = caplog.messages
    assert "index.json: expected the names of uploads as JSON, got" in line
    assert not restarted_uploads._registry.rankings
    assert files(folder) == {get_file_name(bodies["first"])}
    restarted_uploads.upload("rankings", "b", bodies["second"])
    assert Uploads(folder, FakeRegistry())._registry.rankings.keys() == {"b"}


@pytest.mark.parametrize(
    "entry",
    [{"b": 5}, {"b": "../../secret"}, {"../x": "0" * 64}, {"b\nc": "0" * 64}, {"image": "0" * 64}, {"b": {}}, 5, [1]],
)
def test_invalid_index_entry_is_skipped_alone(folder, bodies, caplog, entry):
    Uploads(folder, FakeRegistry()).upload("rankings", "a", bodies["first"])
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"constants": entry}))
    assert Uploads(folder, FakeRegistry())._registry.rankings.keys() == {"a"}
    (line,) = caplog.messages
    assert "index.json: constants:" in line


def test_symlinked_index_is_replaced_and_target_unchanged(folder, bodies, tmp_path, caplog):
    folder.mkdir()
    (tmp_path / "target").write_text("{}")
    (folder / "index.json").symlink_to(tmp_path / "target")
    Uploads(folder, FakeRegistry()).upload("rankings", "a", bodies["first"])
    assert "Too many levels of symbolic links" in caplog.text
    assert (tmp_path / "target").read_text() == "{}"
    assert Uploads(folder, FakeRegistry())._registry.rankings.keys() == {"a"}


def test_folder_of_other_server_is_refused(folder):
    folder.mkdir()
    command = [sys.executable, "-c", HOLD, folder / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(SnpatchError, match=r"got one of another server\. Stop the other server"):
            Uploads(folder, FakeRegistry())
    Uploads(folder, FakeRegistry())
