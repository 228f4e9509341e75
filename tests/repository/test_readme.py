"""README and guides: tables equal those of the records, links exist, and blocks of code run or name what exists."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from snpatch import cli
from snpatch.sweeps.sweep_file import SweepSpec

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def readme_table():
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "bench" / "readme_table.py")
    module = sys.modules["readme_table"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_all_pages_equal_those_of_the_records(readme_table):
    for page, text in readme_table.fill_pages().items():
        assert page.read_text() == text, page


def test_readme_fits_two_hundred_lines():
    assert (ROOT / "README.md").read_text().count("\n") <= 200


def test_gpu_records_fill_separate_tables(readme_table, tmp_path):
    assert readme_table.tables(tmp_path)["generate on a GPU"]() == ""
    assert readme_table.tables(tmp_path)["op on a GPU"]() == ""
    ratio = {"ratio": 0.97, "q1": 0.96, "q3": 0.98}
    info = {"device": "cuda", "size": "7b", "runner": "v2", "side": "twin", "batch": 8, "new": 100}
    twin = {"extra_info": {**info, "native 2B": ratio, "native B": ratio}, "stats": {"median": 2.0}}
    case = {"device": "cuda", "tokens": 64, "neurons": 11008, "dtype": "bfloat16", "bytes": 10**7, "calls": 10}
    sides = [
        {"extra_info": {**case, "side": side}, "stats": {"median": seconds}}
        for side, seconds in (("copy", 2e-5), ("snpatch", 1e-4))
    ]
    parts = {"bench": {"status": "ok", "benchmarks": [twin, *sides]}, "tests": {"status": "ok"}}
    record = {"rehearsal": False, "card": "NVIDIA A100", "versions": {"vllm": "0.33.0"}, "parts": parts}
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "records.json").write_text(json.dumps({"end-to-end": record}))
    tables = readme_table.tables(tmp_path)
    assert "| batch of 8 | 400 | 0.97x (0.96 .. 0.98) | 0.97x (0.96 .. 0.98) |" in tables["generate on a GPU"]()
    assert "7b geometry, bfloat16, NVIDIA A100, model runner v2; vllm 0.33.0; medians." in tables["generate on a GPU"]()
    assert "| 64 x 11008, bfloat16 | 10 us | 2 us (0.20x) | 1000 |" in tables["op on a GPU"]()
    assert tables["generate"]() == tables["op"]() == tables["contrast"]() == ""
    (tmp_path / "gpu" / "records.json").write_text(json.dumps({"end-to-end": record | {"rehearsal": True}}))
    assert readme_table.tables(tmp_path)["op on a GPU"]() == ""


def write_record(tmp_path, *benchmarks: dict) -> Path:
    machine = {"device": "CPU", "threads": 1, "capability": "AVX2", "versions": {"vllm": "0.33.0", "torch": "2.14.0"}}
    (tmp_path / "a.cpu.json").write_text(json.dumps({"machine_info": machine, "benchmarks": benchmarks}))
    return tmp_path


def test_attack_table_of_a_record_has_growth_outcomes_and_health(readme_table, tmp_path):
    ends = [{"rss_mb": mb, "descriptors": 40, "threads": 9} for mb in (900.04, 901.26)]
    process = dict(zip(("before", "after"), ends, strict=True))
    process["growth_mb"] = {"rss_all": 0.0412, "rss_second_half": -0.0009}
    process["growth_error_mb"] = {"rss_all": 0.0101, "rss_second_half": 0.0207}
    info = {"side": "attack", "requests": 30_000, "clients": 200, "slow_sockets": 100, "cores": 2, "known": 20}
    info |= {"faults": [], "outcomes": {"whole": 20_000, "left": 10_000}, "processes": {"EngineCore": process}}
    info["health"] = {"asked": 3600, "median_ms": 12.3, "p99_ms": 98.7, "worst_ms": 187.6}
    folder = write_record(tmp_path, {"extra_info": info, "stats": {"median": 270.0}})
    table = readme_table.tables(folder)["attack"]()
    assert "| EngineCore | 900.0 | 901.3 | 0.041 ± 0.010 | -0.001 ± 0.021 | 40 / 40 | 9 / 9 |" in table
    assert "30,000 requests from 200 clients in 4.5 minutes" in table
    assert (
        "10,000 disconnected before the end, 20,000 complete streams with verified receipts. Wrong responses: 0."
        in table
    )
    assert "`/health`: 12 ms (median), 99 ms (99 %), 188 ms (worst), 3,600 times." in table
    assert "share 2 cores; CPU, 1 thread, AVX2; vllm 0.33.0, torch 2.14.0." in table
    assert readme_table.tables(folder)["zeroing"]() == readme_table.tables(folder)["generate"]() == ""


def test_zeroing_table_of_a_record_has_speeds_and_shares(readme_table, tmp_path):
    ratio = {"median_s": 2.0, "ratio": 0.9957, "q1": 0.99, "q3": 1.0011}
    info = {"side": "zeroing", "size": "160m", "batch": 16, "prompt": 128, "new": 64, "no zeroing": ratio}
    runs = (
        {"extra_info": {**info, "zeroing_share": 0.00312}, "stats": {"median": 2.0}},
        {"extra_info": {**info, "new": 1, "zeroing_share": 0.001}, "stats": {"median": 1.25}},
    )
    table = readme_table.tables(write_record(tmp_path, *runs))["zeroing"]()
    ratio = "99.6 % (99.0 % .. 100.1 %)"
    assert f"| 160m | 512 | {ratio} | 0.31 % | 1.25 | {ratio} | 0.10 % |" in table
    assert "16 requests of 128 prompt + 64 completion tokens, CPU, 1 thread, AVX2; vllm 0.33.0" in table
    assert readme_table.tables(tmp_path)["generate"]() == ""


def test_kernels_readme_has_the_predicted_times():
    import predict

    readme = (ROOT / "kernels" / "README.md").read_text()
    assert "| 64 x 11008 |" in readme
    assert predict.fill_table(readme) == readme


def test_links_of_all_pages_exist(readme_table):
    for page in [*readme_table.pages(), ROOT / "kernels/README.md"]:
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


# ---- blocks of code --------------------------------------------------------------------------------------------------

BLOCK = re.compile(r"(?:<!-- not run: (.+?) -->\n)?```(python|sh)\n(.*?)```", re.S)
REASONS = {"needs a network", "needs a download", "needs a server", "minutes", "minutes, or needs a download"}


def blocks(language: str) -> list[tuple[Path, str | None, str]]:
    """Return (page, why it does not run here, code) of each block in README and guides."""
    pages = [*ROOT.glob("*.md"), ROOT / "bench/README.md", *sorted((ROOT / "snpatch").rglob("README.md"))]
    matches = [(page, *groups) for page in pages for groups in BLOCK.findall(page.read_text())]
    return [(page, reason or None, code) for page, reason, kind, code in matches if kind == language]


def test_blocks_that_do_not_run_have_a_reason():
    reasons = {reason for language in ("python", "sh") for _, reason, _ in blocks(language)}
    assert reasons - {None} <= REASONS


@pytest.mark.parametrize(("page", "reason", "code"), blocks("python"), ids=lambda value: getattr(value, "name", ""))
def test_python_block_runs_or_imports_what_exists(page, reason, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compile(code, str(page), "exec")
    if reason is not None:
        code = "\n".join(re.findall(r"^from snpatch\S* import .+", code, re.M))
    exec(code, {"__name__": "__main__"})


def test_shell_blocks_name_existing_targets_commands_and_options():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    num_commands = 0
    for page, reason, code in blocks("sh"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert set(words[1:2]) <= targets, (page, line)
            elif words[:1] == ["snpatch"]:
                assert reason, f"{page}: a command that no test runs needs its reason: {line}"
                parse_command(words[1:])
                num_commands += 1
    assert num_commands > 15


def parse_command(words: list[str]) -> None:
    """Raise typer's error for an unknown command or option."""
    command = typer.main.get_command(cli.app)
    context = typer.Context(command, info_name="snpatch")
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        command.parse_args(context, list(words))
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        context = typer.Context(command, info_name=name, parent=context, **command.context_settings)
    command.make_parser(context).parse_args(list(words))


def test_parse_command_rejects_unknown_commands_and_options():
    for words in (["generation", "m"], ["generate", "m", "--recipent", "a"], ["train", "sfx"]):
        with pytest.raises(Exception, match="No such"):
            parse_command(words)


def test_sweep_file_of_the_guide_is_valid(tmp_path):
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "snpatch/sweeps/README.md").read_text(), re.S)
    (tmp_path / "sweep.toml").write_text(block)
    spec = SweepSpec.load(tmp_path / "sweep.toml")
    assert [window.hi for window in spec.sweep.windows] == [0, 200, 1000, 5000, 20_000]
    spec.save(tmp_path / "again.json")
    assert SweepSpec.load(tmp_path / "again.json").sweep == spec.sweep
