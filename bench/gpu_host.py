"""What the children of gpu_check.py run with: their environment, vLLM, the plugin's entry point; and what the records
say of the code.

Why no install: a lent machine may have neither a compiler nor room for changes, and vLLM asks only for the entry point.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # without FlashInfer every engine would end at its sampler
    "VLLM_USE_DEEP_GEMM": "0",
    # torch asked about the card starts CUDA, which a forked engine cannot use; NVML fails on some hosts, so both.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
CACHES = {"VLLM_CACHE_ROOT": "vllm", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
CODE = ("snpatch", "kernels", "bench", "tests")


class Host:
    """work: keeps compiled kernels, logs and records between calls. site: where vLLM is, or is unpacked to.

    has_own_caches: whether compiled kernels are kept in `work`; a rehearsal takes the user's, which are warm.
    """

    def __init__(self, work: Path, site: Path, has_own_caches: bool = True) -> None:
        self.work, self.site = work, site
        self._caches = {n: str(work / "cache" / folder) for n, folder in CACHES.items()} if has_own_caches else {}
        self.entry = work / "entry"

    def environment(self, **more: str) -> dict[str, str]:
        """A child's environment. The caller's own PYTHONPATH comes last."""
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [str(ROOT), str(self.entry), str(self.site), *inherited]
        return {**os.environ, **ALWAYS, **self._caches, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}

    def unpack(self, parts: Path) -> str | None:
        """Unpack vLLM's parts into the site by their own unpack.py; what it said where it failed."""
        command = [sys.executable, str(parts / "unpack.py"), "--parts", str(parts), "--target", str(self.site)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return "unpack.py took more than 300 s"
        lines = (done.stdout + done.stderr).strip().splitlines()
        return None if done.returncode == 0 else f"unpack.py ended with {done.returncode}: {lines[-1] if lines else ''}"

    def machine(self) -> dict:
        """gpu_probe.py's view of the machine, with the plugin registered."""
        found = self._probe()
        if not found["has_plugin"]:
            register_plugin(self.entry)
            found = self._probe()
        return found

    def _probe(self) -> dict:
        command = [sys.executable, str(ROOT / "bench" / "gpu_probe.py"), "machine"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=180, env=self.environment(), cwd=ROOT
            )
        except subprocess.TimeoutExpired:
            raise SystemExit("gpu_check: this machine did not tell of its card within 180 s") from None
        if done.returncode:
            raise SystemExit("gpu_check: this Python cannot run the steps: " + done.stderr.strip().splitlines()[-1])
        return json.loads(done.stdout.splitlines()[-1])


def register_plugin(folder: Path) -> None:
    """Metadata of snpatch without an install, in a folder of the Python path: vLLM finds the plugin by it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(metadata)
    groups = project["entry-points"].items()
    lines = [line for g, points in groups for line in (f"[{g}]", *(f"{n} = {target}" for n, target in points.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def commit() -> str | None:
    """The checkout's commit, "-dirty" behind it where files differ; SNPATCH_COMMIT where there is no checkout."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return os.environ.get("SNPATCH_COMMIT")
    head, changed = (
        subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()
        for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--", *CODE))
    )
    return head + ("-dirty" if changed else "")


def source() -> str:
    """Names the code by content: a copy without its repository, or with changes, has one, too."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
