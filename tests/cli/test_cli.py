"""The command line: runs on the golden model, and one line with a non-zero exit code for invalid input."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from commands import ADAPTERS, DPO, GOLDEN, MODEL, PAIR, SFT, run
from safetensors.torch import load_file, save_file

import snpatch
from snpatch import Ranking, cli
from snpatch.cli import help_panels
from snpatch.data import load_dataset


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.engine)])
def test_contrast_then_generate_then_sweep(request, capsys, prompts, tmp_path, backend):
    ranking = tmp_path / "safety.safetensors"
    common = [MODEL, prompts, *ADAPTERS, "--backend", backend, "--batch-size", 8]
    if backend == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed")
        request.getfixturevalue("in_process")  # the processes have tests of their own
        common += ["--engine-arg", "kv_cache_memory_bytes=33554432", "--engine-arg", "max_rankings=4"]
    code, out, err = run(capsys, "contrast", *common, "--recipient", "sft", "--donor", "dpo", "-o", ranking,
                         "--max-tokens", 24, "--no-exclude-layers", "--json")  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["tokens"] == 12 * 24
    assert "contrast: 12/12" in err
    golden = load_file(GOLDEN / "contrast.safetensors")["completion.batch5.change_scores"]
    assert torch.allclose(Ranking.load(ranking).scores, golden, atol=1e-5 * golden.max().item(), rtol=0)

    code, out, err = run(capsys, "generate", *common, "--recipient", "sft", "--donor", "dpo", "--ranking", ranking,
                         "-k", 281, "--max-tokens", 24, "--json")  # fmt: skip
    assert code == 0, err
    golden_ids = json.loads((GOLDEN / "generation.json").read_text())["runs"]["guided.sft.k20.batch5"]["ids"]
    assert [json.loads(line)["token_ids"] for line in out.splitlines()] == golden_ids

    folder = tmp_path / "sweep"
    code, out, err = run(capsys, "sweep", *common, "--ranking", f"safety={ranking}", "--donor", "dpo", "--recipient",
                         "sft", "-k", "0,70:281,281", "--judge", "refusal", "--controls", 1, "--max-tokens", 4,
                         "--limit", 3, "-o", folder, "--json")  # fmt: skip
    assert code == 0, err
    rows = json.loads(out)["tables"]["sweep"]
    assert [(r["recipient"], r["ranking"], r["rank_lo"], r["rank_hi"]) for r in rows if r["control"] is None] == [
        ("sft", None, 0, 0), ("dpo", None, 0, 0),
        ("sft", "safety", 0, 0), ("sft", "safety", 70, 281), ("sft", "safety", 0, 281),
    ]  # fmt: skip
    expected = {"sweep.csv", "sweep.json", "sweep-records.jsonl", "sweep.sqlite", "spec.json", "sweep.png", "sweep.svg"}
    assert {path.name for path in folder.iterdir()} == expected


def test_contrast_given_completions_equals_generated_ones(capsys, prompts, tmp_path):
    common, pair = [MODEL, prompts, *PAIR, "--max-tokens", 6], ["--recipient", "sft", "--donor", "dpo"]
    completions_file, first_ranking, second_ranking = (
        tmp_path / name for name in ("w.jsonl", "1.safetensors", "2.safetensors")
    )
    assert run(capsys, "generate", *common, "--recipient", "sft", "-o", completions_file)[0] == 0
    assert run(capsys, "contrast", *common, *pair, "-o", first_ranking)[0] == 0
    assert run(capsys, "contrast", *common, *pair, "-o", second_ranking, "--completions", completions_file)[0] == 0
    assert torch.allclose(Ranking.load(first_ranking).scores, Ranking.load(second_ranking).scores, rtol=1e-5, atol=1e-7)
    completions_file.write_text('{"completion": "kuze"}\n')
    code, _, err = run(capsys, "contrast", *common, *pair, "-o", second_ranking, "--completions", completions_file)
    assert code == 2
    assert "expected one completion for each of 12 prompts, got 1" in err
    code, _, err = run(
        capsys,
        "contrast",
        *common,
        *pair,
        "-o",
        second_ranking,
        "--completions",
        completions_file,
        "--positions",
        "prompt",
    )
    assert (code, err) == (
        2,
        "snpatch: error: --completions: expected --positions completion or completion_shifted, got prompt\n",
    )
    meta = Ranking.load(first_ranking).meta
    assert (meta["empty"], meta["data"]["rows"], meta["data"]["path"]) == (0, 12, str(prompts))


def test_contrast_completions_of_other_prompts_are_refused(capsys, tmp_path):
    prompts, completions_file = tmp_path / "p.jsonl", tmp_path / "c.jsonl"
    words = ("kuze", "mabo", "tiva", "sopu")
    prompts.write_text("".join(json.dumps({"goal": w if w != "mabo" else None}) + "\n" for w in words))
    completions_file.write_text("".join(json.dumps({"prompt": w, "completion": "kuze"}) + "\n" for w in words))
    pair = [MODEL, prompts, *PAIR, "--recipient", "sft", "--donor", "dpo", "-o", tmp_path / "r.safetensors"]
    code, _, err = run(capsys, "contrast", *pair, "--skip-invalid", "--limit", 3, "--completions", completions_file)
    assert code == 2
    assert f"{prompts}: skipped 1 invalid rows\n" in err
    assert "c.jsonl, line 2: expected the completion of the prompt 'tiva', got that of 'mabo'" in err


def test_contrast_compares_completions_by_the_column_of_prompts(capsys, tmp_path):
    prompts, completions_file = tmp_path / "p.jsonl", tmp_path / "c.jsonl"
    prompts.write_text('{"prompt_text": "kuze"}\n{"prompt_text": "mabo"}\n')
    completions_file.write_text(
        '{"prompt_text": "mabo", "completion": "kuze"}\n{"prompt_text": "kuze", "completion": "kuze"}\n'
    )
    pair = [MODEL, prompts, *PAIR, "--recipient", "sft", "--donor", "dpo", "-o", tmp_path / "r.safetensors"]
    code, _, err = run(capsys, "contrast", *pair, "--column", "prompt_text", "--completions", completions_file)
    assert code == 2
    assert "c.jsonl, line 1: expected the completion of the prompt 'kuze', got that of 'mabo'" in err


def test_public_files_are_read_as_prompts_and_rankings(capsys, tmp_path):
    """Use a named column and a CSV list of neurons, and print the notes on rows."""
    data, neurons = tmp_path / "p.csv", tmp_path / "neurons.csv"
    data.write_text("text,other\nkuze,1\nmabo,2\n")
    neurons.write_text("layer,neuron,score\n1,5,0.5\n0,3,0.9\n2,7,0.1\n")
    options = ["--recipient", "sft", "--donor", "dpo", "-k", 3, "--max-tokens", 3, "--json"]
    outs = []
    for file in (neurons, tmp_path / "own.safetensors"):
        code, out, err = run(capsys, "generate", MODEL, data, *PAIR, *options, "--ranking", file, "--column", "text")
        assert code == 0, err
        outs.append(out)
        Ranking.from_order([[0, 3], [1, 5], [2, 7]], (4, 352)).save(tmp_path / "own.safetensors")
    assert outs[0] == outs[1]
    assert all(json.loads(line)["overwrites"] > 0 for line in outs[0].splitlines())
    code, _, err = run(capsys, "generate", MODEL, data, *PAIR)
    assert code == 2
    assert "p.csv: expected the columns prompt or messages, got text, other. Name the prompt's column (--column)" in err
    folder = tmp_path / "sweep"
    options = ["--recipient", "sft", "--donor", "dpo", "-k", "0,3"]
    options += ["--judge", "refusal", "--max-tokens", 2, "-o", folder]
    code, _, err = run(capsys, "sweep", MODEL, data, *PAIR, "--column", "text", "--ranking", f"own={neurons}", *options)
    assert code == 0, err
    assert json.loads((folder / "sweep.json").read_text())["provenance"]["sets"]["prompts"]["column"] == "text"


@pytest.mark.parametrize("donor", ["zero", "mean:donor", "noise:3"])
def test_generate_with_constant_donors(capsys, prompts, tmp_path, donor):
    ranking = tmp_path / "r.safetensors"
    run(capsys, "contrast", MODEL, prompts, *PAIR, "--recipient", "sft", "--donor", "dpo", "-o", ranking,
        "--max-tokens", 4)  # fmt: skip
    out_file = tmp_path / "out.jsonl"
    code, _, err = run(capsys, "generate", MODEL, prompts, *PAIR, "--recipient", "sft", "--donor", donor, "--ranking",
                       ranking, "-k", 100, "--max-tokens", 3, "--limit", 2, "-o", out_file)  # fmt: skip
    assert code == 0, err
    overwrites = [json.loads(line)["overwrites"] for line in out_file.read_text().splitlines()]
    assert len(overwrites) == 2
    assert min(overwrites) > 0


def test_env_prints_implementation_of_each_op(capsys):
    code, out, _ = run(capsys, "env", "--json")
    assert code == 0
    environment = json.loads(out)
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["ops"] == {"patched_glu (cpu)": "C++", "patched_glu (cuda)": "Triton"}


def test_help_does_not_import_torch():
    code = "import sys, snpatch.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def copy_changed(tmp_path, source, change):
    """Return a copy of a folder with one change."""
    folder = tmp_path / "broken"
    shutil.copytree(source, folder)
    change(folder)
    return str(folder)


def damage(name, change):
    """Return a change to one safetensors file: change(tensors) in place."""

    def apply(folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return apply


def set_nan(key):
    return lambda tensors: tensors[key].view(-1)[0].fill_(float("nan"))


IA3 = "base_model.model.model.layers.{}.mlp.down_proj.ia3_l"
ADAPTER, WEIGHTS = "adapter_model.safetensors", "model.safetensors"


def bad_jsonl(line):
    def make(tmp_path):
        path = tmp_path / "bad.jsonl"
        path.write_text('{"prompt": "good"}\n\n' + line + "\n")
        return {"prompts": str(path)}

    return make


def adapter(change):
    return lambda tmp_path: {"adapters": ["-a", f"sft={SFT}", "-a", f"dpo={copy_changed(tmp_path, DPO, change)}"]}


def other_shape(tmp_path):
    Ranking.from_scores(torch.rand(3, 352)).save(tmp_path / "other.safetensors")
    return {"ranking": str(tmp_path / "other.safetensors")}


def nan_scores(tmp_path):
    path = tmp_path / "nan.safetensors"
    Ranking.from_scores(torch.rand(4, 352)).save(path)
    tensors = load_file(path)
    tensors["scores"][2, 5] = float("nan")
    save_file(tensors, path, metadata={"kind": "ranking", "meta": "{}"})
    return {"ranking": str(path)}


def long_prompt(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "kuze " * 600}) + "\n")
    return {"prompts": str(path)}


def empty_file(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    return {"prompts": str(tmp_path / "empty.jsonl")}


def not_utf8(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "caf\xe9"}\n'.encode("latin-1"))
    return {"prompts": str(tmp_path / "latin.jsonl")}


def blocked_output(tmp_path):
    (tmp_path / "file").write_text("")
    return {"out": str(tmp_path / "file" / "out.jsonl")}


BAD = {
    "missing model": (lambda t: {"model": str(t / "nowhere")}, "nowhere: no such folder"),
    "model without weights": (
        lambda t: {"model": copy_changed(t, MODEL, lambda f: (f / WEIGHTS).unlink())},
        "cannot load",
    ),
    "NaN in weights": (
        lambda t: {"model": copy_changed(t, MODEL, damage(WEIGHTS, set_nan("model.norm.weight")))},
        "weight model.norm.weight holds NaN",
    ),
    "missing adapter": (lambda t: {"adapters": ["-a", f"sft={t}/no", "-a", f"dpo={DPO}"]}, "no: no such folder"),
    "adapter for a wider model": (
        adapter(damage(ADAPTER, lambda t: t.update({IA3.format(0): torch.ones(1, 353)}))),
        r"expected \[1, 352\] for this model, got \[1, 353\]",
    ),
    "adapter for a deeper model": (
        adapter(damage(ADAPTER, lambda t: t.update({IA3.format(4): torch.ones(1, 352)}))),
        "is for layer 4, the model has 4 layers",
    ),
    "adapter for a shallower model": (
        adapter(damage(ADAPTER, lambda t: t.pop(IA3.format(3)))),
        "no tensor for layer 3",
    ),
    "NaN in an adapter": (adapter(damage(ADAPTER, set_nan(IA3.format(1)))), "holds NaN"),
    "adapter option without a name": (lambda t: {"adapters": ["-a", SFT]}, "--adapter: expected name=folder"),
    "ranking of another shape": (other_shape, r"expected a ranking of \[4, 352\], the model, got \[3, 352\]"),
    "NaN in scores": (nan_scores, "scores: expected finite values, got nan at layer 2, neuron 5"),
    "missing ranking": (lambda t: {"ranking": str(t / "r.safetensors")}, "r.safetensors: no such file"),
    "window outside the ranking": (lambda t: {"window": "1409"}, "reaches past the ranking's 1408 neurons"),
    "window the wrong way round": (lambda t: {"window": "9:5"}, r"expected 0 <= lo <= hi, got \[9, 5\)"),
    "window that is no number": (lambda t: {"window": "many"}, "expected a number, got 'many'"),
    "unknown model name": (lambda t: {"recipient": "tulu"}, "model: expected one of base, sft, dpo, got 'tulu'"),
    "unknown donor name": (lambda t: {"donor": "tulu"}, "got 'tulu'"),
    "donor without its moments": (lambda t: {"donor": "mean:donor"}, "the ranking holds no donor_mean"),
    "unknown place": (lambda t: {"more": ["--positions", "somewhere"]}, "positions: expected one of"),
    "missing prompts": (lambda t: {"prompts": str(t / "p.jsonl")}, "p.jsonl: expected a file or a dataset"),
    "no prompt": (empty_file, "expected prompts, got none"),
    "broken JSON": (bad_jsonl('{"prompt": "half'), "bad.jsonl, line 3: not JSON"),
    "row without a prompt": (bad_jsonl('{"text": "x"}'), "line 3: expected an object with prompt or messages"),
    "prompt that is no text": (bad_jsonl('{"prompt": 7}'), "line 3: prompt: expected a non-empty string"),
    "broken messages": (bad_jsonl('{"messages": [{"role": "user"}]}'), "line 3: messages: expected a list"),
    "prompt past the context": (long_prompt, "prompt 0: expected at most .* tokens for a context of 512, got"),
    "unwritable output": (blocked_output, "cannot write .*out.jsonl"),
    "a ranking without a donor": (
        lambda t: {"donor": None},
        "--donor: expected with --ranking, --window, got none. Pass --donor.",
    ),
    "unknown dtype": (lambda t: {"more": ["--dtype", "float99"]}, "dtype: expected one of auto, float32"),
    "a GPU that is not there": (lambda t: {"more": ["--device", "cuda:77"]}, "device 'cuda:77': "),
    "a place that is no number": (lambda t: {"more": ["--positions", "--5"]}, "positions: expected one of"),
    "a position past the text": (
        lambda t: {"more": ["--positions", "500"]},
        "positions: expected less than the maximum of .* tokens, got 500",
    ),
    "prompts that are not text": (not_utf8, "latin.jsonl, line 1: not UTF-8"),
    "bad sampling": (lambda t: {"more": ["--top-p", "0"]}, r"top_p: expected a value in \(0, 1\], got 0.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_input_prints_one_line_and_writes_nothing(capsys, tmp_path, prompts, ranking, case):
    make, message = BAD[case]
    arguments = {
        "model": MODEL, "prompts": prompts, "adapters": PAIR[:4], "recipient": "sft", "donor": "dpo",
        "ranking": ranking, "window": "70", "out": str(tmp_path / "results" / "out.jsonl"), "more": [],
    }  # fmt: skip
    arguments.update(make(tmp_path))
    donor = ["--donor", arguments["donor"]] if arguments["donor"] else []
    code, out, err = run(capsys, "generate", arguments["model"], arguments["prompts"], *arguments["adapters"],
                         "--recipient", arguments["recipient"], *donor, "--ranking", arguments["ranking"],
                         "--window", arguments["window"], "--max-tokens", 2, "-o", arguments["out"],
                         "--template", "tulu", "--backend", "transformers", *arguments["more"])  # fmt: skip
    lines = [line for line in err.splitlines() if line.startswith("snpatch: error: ")]
    assert code == 2
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not out
    assert not Path(arguments["out"]).exists()
    assert not list(tmp_path.glob("results/*"))


def test_process_invalid_input_exits_with_2(tmp_path):
    command = [sys.executable, "-m", "snpatch.cli", "generate", str(tmp_path / "no"), str(tmp_path / "p.jsonl")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"snpatch: error: {tmp_path}/p.jsonl: expected a file or a dataset")
    assert result.stderr.count("\n") == 1


def test_unknown_option_is_refused(capsys, prompts):
    code, _, err = run(capsys, "generate", MODEL, prompts, "--no-such-option")
    assert code == 2
    assert "No such option" in err


@pytest.mark.parametrize(
    ("options", "missing"),
    [([], "--ranking and --window"), (["-k", 1], "--ranking"), (["--ranking", "r.safetensors"], "--window")],
)
def test_donor_without_ranking_or_window_names_the_missing_option(capsys, prompts, options, missing):
    code, _, err = run(capsys, "generate", MODEL, prompts, *PAIR, "--recipient", "sft", "--donor", "dpo", *options)
    assert code == 2
    assert f"--donor: expected {missing} with it, got none. Pass {missing}.\n" in err


def test_help_and_guide_say_that_the_last_layer_is_not_ranked(capsys):
    code, out, _ = run(capsys, "contrast", "--help")
    assert code == 0
    assert "The last layer is not ranked by default; --no-exclude-layers ranks all layers." in out
    guide = (Path(snpatch.__file__).parent / "patching" / "README.md").read_text()
    assert "The last layer is not ranked by default" in guide


def test_rankings_with_one_name_are_refused(capsys, prompts, ranking, tmp_path):
    code, _, err = run(capsys, "sweep", MODEL, prompts, *PAIR, "--ranking", ranking, "--ranking", ranking, "--donor",
                       "dpo", "--recipient", "sft", "-k", "1", "--judge", "refusal", "-o", tmp_path / "s")  # fmt: skip
    assert code == 2
    assert "--ranking: expected each name once, got 'golden' twice. Give a source or name=source" in err


def test_prompts_any_unicode_is_one_line_each(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\ufeff" + json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_dataset(path).prompts == [[{"role": "user", "content": "a\u2028b\x85c"}]]


@pytest.mark.parametrize(("words", "code"), [(["env"], 0), (["generate", "nothing", "none.jsonl"], 2), (["--no"], 2)])
def test_program_exits_before_library_destructors(words, code):
    """abort() replaces the handler that nanobind registers, which prints a line for each remaining object."""
    begin = "import ctypes, sys; ctypes.pythonapi.Py_AtExit(ctypes.CDLL(None).abort); from snpatch import cli"
    program = f"{begin}; sys.argv[1:] = {words}; cli.program()"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == code


def test_version_is_printed(capsys):
    code, out, _ = run(capsys, "--version")
    assert (code, out) == (0, f"snpatch {snpatch.__version__}\n")


def test_prompt_option_generates_a_completion_of_a_text(capsys):
    common = ["generate", MODEL, *PAIR, "--max-tokens", 4, "--json"]
    code, out, _ = run(capsys, *common, "--prompt", "the cat", "--prompt", "a dog")
    assert code == 0
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["the cat", "a dog"]


@pytest.mark.parametrize(("arguments", "count"), [([], "none"), (["p.jsonl", "--prompt", "x"], "both")])
def test_prompts_and_prompt_option_exclude_each_other(capsys, arguments, count):
    code, _, err = run(capsys, "generate", MODEL, *arguments)
    assert (code, err) == (2, f"snpatch: error: PROMPTS: expected a file or dataset, or --prompt TEXT, got {count}\n")


def test_help_groups_options_by_subject_with_common_ones_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = run(capsys, "generate", "--help")
    assert shown_panels(out) == ["Arguments", "Model", "Data", "Patch", "Sampling", "Output", "Advanced"]
    assert out.index("--max-tokens") < out.index("--min-tokens")
    assert "<bool>" not in out


def shown_panels(text: str) -> list[str]:
    return re.findall("^╭─ ([A-Z][a-z]+) ─", text, re.M)


def test_serve_help_begins_with_the_model_and_ends_with_limits(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = run(capsys, "serve", "--help")
    assert shown_panels(out) == ["Arguments", "Model", "Patch", "Guard", "Judges", "Server", "Advanced", "Limits"]
    assert out.index("--patch ") < out.index("--open-route ") < out.index("--max-requests ")


def test_train_help_has_panels(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    panels = ["Arguments", "Model", "Data", "Training", "Output", "Advanced"]
    assert shown_panels(run(capsys, "train", "sft", "--help")[1]) == panels
    _, out, _ = run(capsys, "train", "dpo", "--help")
    assert shown_panels(out) == panels
    training = out[out.index("─ Training ─") : out.index("─ Output ─")]
    assert all(f"--{name} " in training for name in ("learning-rate", "batch-size", "seed", "beta", "save-steps"))


def iter_commands(command):
    yield command
    for subcommand in getattr(command, "commands", {}).values():
        yield from iter_commands(subcommand)


def test_every_option_of_a_grouped_command_has_its_panel_and_help_no_type():
    group = typer.main.get_command(cli.app)
    help_panels.arrange(group)
    for command in iter_commands(group):
        options = [option for option in command.params if option.param_type_name == "option"]
        if any(option.name in help_panels.GROUPED_BY for option in options):
            for option in options:
                assert option.name in help_panels.PANELS[option.rich_help_panel], (command.name, option.name)
        assert command._help_option.metavar == ""
        assert sorted(command._help_option.opts) == ["--help", "-h"]


def test_reference_lists_options_in_the_order_of_the_panels():
    page = (Path(snpatch.__file__).parent / "cli" / "REFERENCE.md").read_text()
    generate = page[page.index("## `snpatch generate`") : page.index("## `snpatch find-minimal`")]
    places = [generate.index(f"--{name}") for name in ("adapter", "limit", "recipient", "max-tokens", "out", "dtype")]
    assert places == sorted(places)
    assert "May be repeated" not in page
