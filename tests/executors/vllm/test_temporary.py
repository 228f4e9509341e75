"""Temporary folders: the next start removes those of ended processes only."""

import os
import subprocess
import sys

from snpatch.executors.vllm.temporary import TemporaryFolder, remove_abandoned

MAKE = """
import sys
from snpatch.executors.vllm.temporary import TemporaryFolder
made = TemporaryFolder(sys.argv[1])
(made.path / "socket").write_text("")
print(made.path.name, flush=True)
input()
"""


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_temporary_folder_next_start_removes_those_of_killed_processes_only(tmp_path):
    command = [sys.executable, "-c", MAKE, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process_folder = process.stdout.readline().strip()
        folder = TemporaryFolder(tmp_path)
        assert names(tmp_path) == {process_folder, folder.path.name}
        process.kill()
        process.wait()
        assert names(tmp_path) == {process_folder, folder.path.name}
        second = TemporaryFolder(tmp_path)
        assert names(tmp_path) == {folder.path.name, second.path.name}
        folder.remove()
        second.remove()
    assert not names(tmp_path)


def test_remove_abandoned_keeps_other_folders(tmp_path):
    target = tmp_path / "target"
    target.write_text("")
    for name in ("snpatch-empty", "snpatch-link", "snpatch-pipe", "snpatch-folder", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "snpatch-link" / "owner").symlink_to(target)
    os.mkfifo(tmp_path / "snpatch-pipe" / "owner")
    (tmp_path / "snpatch-folder" / "owner").mkdir()
    (tmp_path / "other" / "owner").write_text("")
    before = names(tmp_path)
    remove_abandoned(tmp_path)
    assert names(tmp_path) == before
