"""Names of vLLM that snpatch uses, and supported, unknown and old versions of vLLM."""

import ast
import re
import warnings
from pathlib import Path

import pytest

from snpatch import SnpatchError
from snpatch.executors.vllm import api_check, versions

pytest.importorskip("vllm", reason="vLLM is not installed")

FOLDER = Path(api_check.__file__).parent
LISTED = [api_check.ENGINE_NAMES, *api_check.RUNNER_NAMES.values(), api_check.SERVER_NAMES]
SERVER = FOLDER.parents[1] / "server"
CORE = "vllm.v1.engine.llm_engine"


def edited_source(*edits):
    """Return an api_check.read_source with some texts of a module replaced, or a module removed (text None)."""
    read_source = api_check.read_source

    def source(module):
        text = read_source(module)
        for name, pattern, replacement in edits:
            if name == module and text is not None:
                assert replacement is None or pattern in text, f"{name} has no {pattern}"
                text = None if replacement is None else text.replace(pattern, replacement)
        return text

    return source


def test_installed_vllm_has_every_name():
    assert api_check.missing_names(serving=True) == []


def test_missing_names_finds_each_missing_name_member_and_parameter():
    """Each listed name, attribute and parameter is looked up under a name that does not exist, one at a time."""
    for listed in LISTED:
        for module, names in listed.items():
            for name, uses in names.items():
                probes = {(f"not_{name}", ""): f"{module}.not_{name}"}
                for member, parameters in (m.groups() for m in api_check.USE.finditer(uses) if m[0]):
                    if parameters is None:
                        probes[name, f"not_{member}"] = f"{module}.{name}.not_{member}"
                    for parameter in filter(None, re.split(r"[ ,]+", parameters or "")):
                        path = f"{module}.{name}.{member}".rstrip(".")
                        probes[name, f"{member}(not_{parameter})"] = f"{path}(not_{parameter})"
                for (probe, use), missing in probes.items():
                    assert api_check._missing_in({module: {probe: use}}) == [missing]
            assert api_check._missing_in({module + ".x": names}) == [module + ".x"]


def test_every_import_of_vllm_is_listed():
    """All `from vllm... import X` in executors/vllm and server, also inside functions."""
    imports = set()
    for file in (*FOLDER.rglob("*.py"), *SERVER.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm" and not node.level:
                imports |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "vllm" for alias in node.names), "import names from vllm"
    assert len(imports) > 25
    assert {(module, name) for module, name in imports if not any(name in c.get(module, {}) for c in LISTED)} == set()


def test_only_executors_vllm_and_server_import_vllm():
    package = FOLDER.parent.parent
    files = [file for file in package.rglob("*.py") if not {FOLDER, SERVER} & {*file.parents}]
    assert len(files) > 30
    for file in files:
        assert not re.search(r"^\s*(from|import) vllm\b", file.read_text(), re.MULTILINE), file


def test_known_versions_are_0_24_to_0_33_and_include_the_installed_one(recwarn):
    assert sorted(versions.KNOWN) == [(0, minor) for minor in range(24, 34)]
    assert versions.SUPPORTED == "0.24 to 0.33"
    major, minor = map(int, versions.check().split(".")[:2])
    assert (major, minor) in versions.KNOWN
    assert not [w for w in recwarn if "vLLM" in str(w.message)]


@pytest.fixture
def version(monkeypatch):
    """version(text): set the installed version."""
    versions._check_unknown.cache_clear()
    yield lambda text: monkeypatch.setattr(versions, "installed", lambda: text)
    versions._check_unknown.cache_clear()


@pytest.mark.parametrize("number", ["0.24.0", "0.29.1", "0.32.0+cpu", "0.33.0"])
def test_known_version_is_not_checked(version, monkeypatch, recwarn, number):
    version(number)
    monkeypatch.setattr(api_check, "missing_names", lambda serving: pytest.fail("a known version was checked"))
    assert versions.check() == number
    assert not recwarn


@pytest.mark.parametrize("unknown", ["0.34.0", "0.40.2", "1.0", "dev"])
def test_unknown_version_with_all_names_warns_once(version, unknown):
    version(unknown)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [versions.check() for _ in range(3)] == [unknown] * 3
    assert [str(w.message) for w in caught] == [
        f"snpatch is tested with vLLM 0.24 to 0.33, not with {unknown}; it has every name that snpatch uses"
    ]


@pytest.mark.parametrize(
    ("edits", "names"),
    [
        ([(CORE, "def abort_request(", "def abort(")], f"{CORE}.LLMEngine.abort_request"),
        ([("vllm.inputs.engine", "cache_salt", "salt")],
         "vllm.inputs.tokens_input(cache_salt)"),
        ([("vllm.v1.core.sched.output", "resumed_req_ids", "resumed")],
         "vllm.v1.core.sched.output.CachedRequestData.resumed_req_ids"),
        ([("vllm.forward_context", "", None)], "vllm.forward_context"),
        ([("vllm.v1.worker.gpu_model_runner", "", None), ("vllm.v1.worker.gpu.model_states.default", "", None)],
         "vllm.v1.worker.gpu_model_runner, vllm.v1.worker.gpu.model_states.default"),
        ([(CORE, "def step(", "def run("), (CORE, "def add_request(", "def add(")],
         f"{CORE}.LLMEngine.add_request, {CORE}.LLMEngine.step"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_unknown_version_without_a_used_name_raises_naming_it(version, monkeypatch, recwarn, edits, names):
    version("0.34.0")
    monkeypatch.setattr(api_check, "read_source", edited_source(*edits))
    with pytest.raises(SnpatchError) as error:
        versions.check()
    assert str(error.value) == (
        f"backend vllm: expected vLLM 0.24 to 0.33, got 0.34.0, which lacks {names}. Install vLLM 0.24 to 0.33."
    )
    assert not recwarn


@pytest.mark.parametrize("module", ["vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_states.default"])
def test_missing_names_with_one_model_runner_is_empty(monkeypatch, module):
    monkeypatch.setattr(api_check, "read_source", edited_source((module, "", None)))
    assert api_check.missing_names(serving=True) == []


@pytest.mark.parametrize("number", ["0.9.2", "0.23.0"])
def test_older_version_raises(version, number):
    version(number)
    with pytest.raises(SnpatchError, match=f"expected vLLM 0.24 to 0.33, got {number}. Install one of those."):
        versions.check()


def test_missing_vllm_raises(version):
    version(None)
    with pytest.raises(
        SnpatchError, match=r"vLLM is not installed\. Run: pip install .*(vllm|cuda).* .without a GPU: pip install"
    ):
        versions.check()
