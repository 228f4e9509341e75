"""Host of gpu_check.py's children: their environment, vLLM and the plugin's entry point; and the code's fingerprint.

Why no install: a borrowed machine may have neither a compiler nor write access, and vLLM needs only the entry point.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # without FlashInfer every engine would fail in its sampler
    "VLLM_USE_DEEP_GEMM": "0",
    # Asking torch about the card starts CUDA, which a forked engine cannot use; NVML fails on some hosts, hence both.
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
    """The machine that the steps run on.

    work: folder for compiled kernels, logs and records, kept between calls. site: folder that has vLLM or that it is
    unpacked to. has_own_caches: compiled kernels are cached in `work`; a rehearsal uses the user's caches, which are
    warm.
    """

    def __init__(self, work: Path, site: Path, has_own_caches: bool = True) -> None:
        self.work, self.site = work, site
        self._caches = {n: str(work / "cache" / folder) for n, folder in CACHES.items()} if has_own_caches else {}
        self.entry = work / "entry"

    def environment(self, **changes: str) -> dict[str, str]:
        """Return a child's environment. The caller's PYTHONPATH comes last."""
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [str(ROOT), str(self.entry), str(self.site), *inherited]
        return {**os.environ, **ALWAYS, **self._caches, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **changes}

    def unpack(self, parts: Path) -> str | None:
        """Unpack vLLM's parts into the site by their unpack.py; return an error message or None."""
        command = [sys.executable, str(parts / "unpack.py"), "--parts", str(parts), "--target", str(self.site)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return "unpack.py took more than 300 s"
        if result.returncode == 0:
            return None
        lines = (result.stdout + result.stderr).strip().splitlines()
        return f"unpack.py ended with {result.returncode}: {lines[-1] if lines else ''}"

    def machine(self) -> dict:
        """Return gpu_probe.py's description of the machine, with the plugin registered."""
        facts = self._probe()
        if not facts["has_plugin"]:
            register_plugin(self.entry)
            facts = self._probe()
        return facts

    def _probe(self) -> dict:
        command = [sys.executable, str(ROOT / "bench" / "gpu_probe.py"), "machine"]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=180, env=self.environment(), cwd=ROOT
            )
        except subprocess.TimeoutExpired:
            raise SystemExit("gpu_check: gpu_probe.py did not finish within 180 s") from None
        if result.returncode:
            raise SystemExit("gpu_check: this Python cannot run the steps: " + result.stderr.strip().splitlines()[-1])
        return json.loads(result.stdout.splitlines()[-1])


def register_plugin(folder: Path) -> None:
    """Write snpatch's package metadata to a folder on the Python path.

    vLLM then finds the plugin without an installation.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = re.search(r'^__version__ = "(.+)"', (ROOT / "snpatch" / "__init__.py").read_text(), re.M)[1]
    info = folder / f"{project['name']}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata)
    groups = project["entry-points"].items()
    lines = [line for g, points in groups for line in (f"[{g}]", *(f"{n} = {target}" for n, target in points.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def commit() -> str | None:
    """Return the checkout's commit, with "-dirty" if files differ; SNPATCH_COMMIT without a checkout."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return os.environ.get("SNPATCH_COMMIT")
    head, diff = (
        subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()
        for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--", *CODE))
    )
    return head + ("-dirty" if diff else "")


def source() -> str:
    """Return a hash of the code, which also identifies a changed copy or one without a repository."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
