"""No name is a word of patches, and `name=value` is read the same way everywhere, whatever paths hold."""

import json
import re
from pathlib import Path

import pytest
import torch
from commands import run

from snpatch import names
from snpatch.cli import options
from snpatch.config import EngineConfig, parse_adapters
from snpatch.errors import SnpatchError
from snpatch.judges.protocol import score_all
from snpatch.judges.refusal import RefusalWords
from snpatch.patching.patch import Constant, Patch
from snpatch.patching.spec import parse_donor
from snpatch.ranking.ranking import Ranking
from snpatch.server.config import ServeConfig
from snpatch.server.registry import check_served_name
from snpatch.sweeps.eval_config import parse_eval_config
from snpatch.sweeps.sweep_file import SweepSpec
from snpatch.utils import parsing

SHAPE = (2, 8)
WORDS = [*names.WORDS, "mean:donor", "mean:recipient", "noise:3", "constant:x", "scale:2", "add:mean:donor", "zero:"]
NO_NAMES = ["", " ", " a", "a ", "a\nb", "\u202ea", "\ud800", 1, None]


def ranking():
    return Ranking.from_scores(torch.arange(16.0).reshape(SHAPE))


def test_reserved_words_are_the_words_of_patches():
    order = ranking()
    for word in names.SOURCES:
        with pytest.raises(SnpatchError):
            parse_donor(f"{word}:?", order)
    for word in ("zero", "scale:2", "add:zero"):
        assert not isinstance(parse_donor(word, order), str)
    for positions in names.POSITIONS:
        assert Patch("base", "dpo", order, 1, positions).positions == positions
    for mode in names.MODES:
        assert Constant(torch.zeros(SHAPE), mode).mode == mode


@pytest.mark.parametrize("name", [*WORDS, *NO_NAMES])
def test_reserved_names_are_rejected_everywhere(name, tmp_path):
    def config(**fields):
        return EngineConfig("m", **fields)

    word = re.escape(str(name).partition(":")[0]) if name in WORDS else "expected a name"
    places = [
        lambda: config(adapters={name: ("a",)}),
        lambda: config(models={name: "weights"}),
        lambda: config(models={name: {"lora": ("l",)}}),
        lambda: config(models={name: {"lora": ("l",), "adapters": ("a",)}}),
        lambda: EngineConfig.from_dict({"model": "m", "adapters": {name: "a"}}),
        lambda: score_all({name: RefusalWords()}, ["p"], ["c"]),
        *(
            lambda kind=kind: ServeConfig(config(), **{kind: {name: "file"}})
            for kind in ("rankings", "constants", "guards")
        ),
        lambda: ServeConfig(config(), patches={name: {"recipient": "base"}}),
        lambda: ServeConfig(config(), judges={name: "refusal"}),
        lambda: parse_eval_config({"model": "m", "judges": {name: {"source": "refusal"}}}),
    ]
    for place in places:
        with pytest.raises(SnpatchError, match=word) as caught:
            place()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WORDS)
def test_reserved_file_names_are_rejected(name, tmp_path, capsys):
    spec = {"model": "m", "adapters": {"sft": "a", "dpo": "b"}, "sets": {"p": {"source": "p.jsonl"}},
            "judges": {"cost": {"source": "refusal"}}, "rankings": {"safety": "r.safetensors"},
            "sweep": {"recipients": ["sft"], "donors": ["dpo"], "windows": [1]}}  # fmt: skip
    assert SweepSpec.from_dict(spec, tmp_path).rankings
    for part, value in (("rankings", "r"), ("judges", {"source": "refusal"}), ("adapters", "c")):
        with pytest.raises(SnpatchError, match=name.partition(":")[0]):
            SweepSpec.from_dict({**spec, part: {**spec[part], name: value}}, tmp_path)
    for arguments in (
        ("generate", "m", "p.jsonl", "-a", f"{name}=a"),
        ("generate", "m", "p.jsonl", "--lora", f"{name}=a"),
        ("generate", "m", "p.jsonl", "--checkpoint", f"{name}=a"),
        ("sweep", "m", "p.jsonl", "--ranking", f"{name}=r", *SWEPT),
        ("sweep", "m", "p.jsonl", "--ranking", "r", *SWEPT[:-2], "--judge", f"{name}=refusal"),
    ):
        code, _, err = run(capsys, *arguments, *(("-o", tmp_path / "o") if arguments[0] == "sweep" else ()))
        assert (code, err.count("\n")) == (2, 1)
        assert f"cannot be named {name!r}" in err


SWEPT = ("--donor", "dpo", "--recipient", "sft", "-k", "1", "--judge", "refusal")


def test_file_with_reserved_name_needs_explicit_name(tmp_path, capsys):
    arguments = ("sweep", "m", "p.jsonl", *SWEPT, "-o", tmp_path)
    code, _, err = run(capsys, *arguments, "--ranking", "runs/zero.safetensors")
    assert code == 2
    assert "cannot be named 'zero'" in err
    assert "name=value" in err


@pytest.mark.parametrize(
    "donor", ["mean", "mean:sft", "noise", "noise:", "scale:", "constant", "add", "add:", "zero:1"]
)
def test_donors_with_reserved_prefix_and_no_meaning_are_rejected(donor):
    with pytest.raises(SnpatchError, match="expected a valid donor"):
        parse_donor(donor, ranking())


@pytest.mark.parametrize("donor", ["zero", "mean:donor", "noise:3", "scale:2", "constant:x", "add:zero"])
def test_python_patch_with_reserved_donor_is_rejected(donor):
    with pytest.raises(
        SnpatchError, match=r"expected a model's name, a Constant, Noise or Scale, got .*, a reserved word"
    ):
        Patch("base", donor, ranking(), 1)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((None, "dpo", "r", 1), "ranking: expected a Ranking"),
        ((None, 3, None, 1), "donor: expected a model's name"),
        ((3, "dpo", None, 1), "recipient: expected a model's name"),
    ],
)
def test_patches_of_wrong_type_raise_one_line_error(parts, message):
    recipient, donor, order, window = parts
    with pytest.raises(SnpatchError, match=message):
        Patch("base" if recipient is None else recipient, donor, order or ranking(), window)


@pytest.mark.parametrize(
    "name", ["Zero", "zeros", "meaner", "my mödel 1", "a@b", "safety[/v2]", "zero-shot", "org/zero", "a,b"]
)
def test_names_that_are_not_reserved_are_accepted(name):
    assert EngineConfig("m", {name: "a"}).adapters == {name: ("a",)}
    assert parse_donor(name, ranking()) == name


@pytest.mark.parametrize("word", names.WORDS)
def test_upload_with_reserved_name_is_rejected(word):
    with pytest.raises(SnpatchError, match=f"cannot be named '{word}'"):
        check_served_name(word, "one of the rankings")


def test_refusal_judge_keeps_its_name():
    config = EngineConfig("m")
    assert ServeConfig(config, judges={"refusal": "refusal"}).judges
    with pytest.raises(SnpatchError, match="refusal is the name of the built-in judge of refusal words"):
        ServeConfig(config, judges={"refusal": "cost-model"})


FOLDER = "runs/lr=1e-4,beta=0.1/my mödel +;"


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(FOLDER).mkdir(parents=True)
    Path(FOLDER, "s=1.safetensors").write_text("")
    Path("a,b").mkdir()
    Path("a").mkdir()
    Path("x=y").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dpo=" + FOLDER, ("dpo", FOLDER)),
        (FOLDER, ("", FOLDER)),
        (f"{FOLDER}/s=1.safetensors", ("", f"{FOLDER}/s=1.safetensors")),
        (f"safety={FOLDER}/s=1.safetensors", ("safety", f"{FOLDER}/s=1.safetensors")),
        ("runs/lr=1/missing.safetensors", ("", "runs/lr=1/missing.safetensors")),
        ("./x=y", ("", "./x=y")),
        ("x=y", ("", "x=y")),
        ("n=x=y", ("n", "x=y")),
        ("cost=owner/name@lr=1", ("cost", "owner/name@lr=1")),
        ("owner/name", ("", "owner/name")),
        ("n=", ("n", "")),
        ("=v", ("", "v")),
    ],
)
def test_name_ends_at_first_equals_sign(inside, text, expected):
    assert parsing.split_name(text) == expected


@pytest.mark.parametrize(
    ("text", "between", "expected"),
    [
        (FOLDER, ",", [FOLDER]),
        (f"{FOLDER},{FOLDER}", ",", [FOLDER, FOLDER]),
        (f"hub/one,{FOLDER},hub/two", ",", ["hub/one", FOLDER, "hub/two"]),
        ("a,b", ",", ["a,b"]),
        ("a,c", ",", ["a", "c"]),
        (f"{FOLDER}+a", "+", [FOLDER, "a"]),
        ("", ",", [""]),
    ],
)
def test_existing_paths_may_contain_separators(inside, text, between, expected):
    assert parsing.split_paths(text, between) == expected


def test_adapters_judges_and_rankings_accept_any_path(inside):
    form = "--adapter", "name=folder"
    assert parse_adapters([f"dpo={FOLDER},hub/x"], ",", *form) == {"dpo": [FOLDER, "hub/x"]}
    for text in (FOLDER, "x=y", "=a", "a=", "plain"):
        with pytest.raises(SnpatchError, match=f"--adapter: expected name=folder, got '{re.escape(text)}'"):
            parse_adapters([text], ",", *form)
    with pytest.raises(SnpatchError, match="--adapter: expected each name once, got 'dpo' twice"):
        parse_adapters(["dpo=a", "dpo=b"], ",", *form)
    file = f"{FOLDER}/s=1.safetensors"
    assert options.parse_sources([file, f"b={file}"], "ranking", options.file_stem) == {"s=1": file, "b": file}
    assert options.parse_sources([FOLDER], "judge", lambda _: "cost") == {"cost": FOLDER}
    with pytest.raises(SnpatchError, match="--judge: expected a source or name=source"):
        options.parse_sources(["b="], "judge", lambda _: "cost")


def test_file_stem_of_folder_is_its_whole_name(tmp_path):
    folder = tmp_path / "lr=1e-4,beta=0.1"
    folder.mkdir()
    assert options.file_stem(str(folder)) == folder.name
    assert options.file_stem("no/ranking.safetensors") == "ranking"


def test_sweep_options_keep_paths_unchanged(inside, capsys):
    file = f"{FOLDER}/s=1.safetensors"
    Path("p.jsonl").write_text('{"prompt": "a"}\n')
    run(capsys, "sweep", "missing", "p.jsonl", "-a", f"dpo={FOLDER}", "-a", "sft=a,b", "--donor", "dpo",
        "--recipient", "sft", "-k", "1", "--judge", f"cost={FOLDER}", "--ranking", file, "-o", "out",
        "--backend", "transformers")  # fmt: skip
    spec = json.loads(Path("out/spec.json").read_text())
    assert spec["rankings"] == {"s=1": str(Path(file).resolve())}
    assert spec["judges"] == {"cost": {"source": str(Path(FOLDER).resolve())}}
    assert spec["adapters"] == {"dpo": [FOLDER], "sft": ["a,b"]}
