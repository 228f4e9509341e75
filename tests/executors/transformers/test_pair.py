"""Secondary weights on the transformers executor, compared with the oracle's two hooked models."""

import json
import shutil
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from commands import run
from jobs import (
    COMPLETIONS,
    EXTENDED_JOBS,
    IDS,
    INTERVENTION_JOBS,
    JOBS,
    LOGPROB,
    RANKINGS,
    SAME_WEIGHTS_JOBS,
    assert_batch_equals_single,
    assert_equals_oracle,
    assert_ranked_by_one_model,
    assert_ranking,
    assert_self_patch_changes_nothing,
    forced_sequences,
    generate,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from snpatch import Engine, EngineConfig, Patch, Ranking, Sampling, SnpatchError
from snpatch.models.lora import load_lora, merge_loras


@pytest.fixture(scope="module")
def engines(pairs):
    engines_by_options = {}

    def get(architecture="llama", **options) -> Engine:
        key = (architecture, *sorted(options.items()))
        if key not in engines_by_options:
            pair = pairs(architecture)
            engines_by_options[key] = Engine(pair.folder, **pair.engine_arguments, backend="transformers", **options)
        return engines_by_options[key]

    return get


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_mixed_batch_equals_two_hooked_models(pairs, engines, architecture):
    jobs = [*JOBS, *EXTENDED_JOBS, *INTERVENTION_JOBS, *SAME_WEIGHTS_JOBS]
    assert_equals_oracle(pairs(architecture), jobs, generate(engines(architecture), jobs))


@pytest.mark.parametrize("pair", [("sft", "dpo"), ("dpo", "base"), ("tuned", "dpo")])
def test_contrast_equals_the_oracle(pairs, engines, pair):
    models = [oracle.model(*pairs("llama").checkpoints[name]) for name in pair]
    ranking = engines().contrast(IDS, *pair, completions=COMPLETIONS, exclude_layers=())
    assert_ranking(ranking, oracle.contrast(*models, forced_sequences("completion")))


def test_contrast_of_one_model_ranks_by_its_activations(pairs, engines, tmp_path):
    for name in ("base", "dpo"):
        ranking = engines().contrast(IDS, name, completions=COMPLETIONS, exclude_layers=())
        assert_ranked_by_one_model(ranking, oracle.model(*pairs("llama").checkpoints[name]))
        ranking.save(tmp_path / "alone.safetensors")
        assert_ranked_by_one_model(
            Ranking.load(tmp_path / "alone.safetensors"), oracle.model(*pairs("llama").checkpoints[name])
        )


def test_chats_use_the_recipients_template(tmp_path):
    """Each checkpoint has its own template; one without uses the other's."""
    chat = [[{"role": "user", "content": "bala bana"}]]
    kinds = {"own": "{% for m in messages %}<|user|> {{ m.content }}{% endfor %}", "other": "{{ messages[0].content }}"}
    tiny_pair = tiny.make_pair("llama", tmp_path)
    folders = tiny_pair.folder, tiny_pair.models["dpo"][0]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]

    def engine(*templates):
        for tokenizer, folder, template in zip(tokenizers, folders, templates, strict=True):
            tokenizer.chat_template = template
            (folder / "chat_template.jinja").unlink(missing_ok=True)
            tokenizer.save_pretrained(folder)
        return Engine(tiny_pair.folder, **tiny_pair.engine_arguments, backend="transformers")

    chat_engine = engine(kinds["own"], kinds["other"])
    want = [list(t.apply_chat_template(chat[0], add_generation_prompt=True)["input_ids"]) for t in tokenizers]
    assert want[0] != want[1]
    patches = [Patch("base", "dpo", RANKINGS[0], 20), Patch("dpo", "base", RANKINGS[0], 20)]
    completions = chat_engine.generate(chat * 4, ["base", "dpo", *patches], Sampling(max_tokens=2))
    assert [c.prompt_ids for c in completions] == want * 2
    assert chat_engine.fingerprint("base") != chat_engine.fingerprint("dpo")
    for templates, place in (((kinds["own"], None), 0), ((None, kinds["other"]), 1)):
        template_engine = engine(*templates)
        assert [template_engine.encode(chat, name) for name in ("base", "dpo")] == [[want[place]]] * 2


def test_capture_equals_the_oracle(pairs, engines):
    for name in ("base", "dpo", "tuned"):
        features = engines().capture(IDS, name, RANKINGS[0], 30)
        want = torch.stack([oracle.model(*pairs("llama").checkpoints[name]).activations(ids)[-1] for ids in IDS])
        neurons = RANKINGS[0].rank.flatten().argsort()[:30]
        assert (features - want.flatten(1)[:, neurons]).abs().max() < 1e-4


def test_promises_2_and_3_hold_with_secondary_weights(engines):
    engine = engines()
    for model in ("base", "dpo", "tuned"):
        assert_self_patch_changes_nothing(engine, model)
    jobs = [*JOBS, *EXTENDED_JOBS, *INTERVENTION_JOBS]
    batch, singles = generate(engine, jobs), [generate(engine, [job])[0] for job in jobs]
    assert_batch_equals_single(batch, singles, 1e-5)


def test_secondary_copy_of_the_model_shares_all_weights(zoo, tmp_path):
    tiny_model = zoo("llama")
    shutil.copytree(tiny_model.folder, tmp_path / "copy")
    with Engine(tiny_model.folder, tiny_model.adapters, backend="transformers") as shared:
        want = generate(shared, JOBS)
    models = {"dpo": {"checkpoint": tmp_path / "copy", "adapters": tiny_model.adapters["dpo"]}}
    with Engine(
        tiny_model.folder, {"sft": tiny_model.adapters["sft"]}, models=models, backend="transformers"
    ) as engine:
        assert engine.executor.memory.secondary == 0  # equal weights are stored once
        assert_batch_equals_single(generate(engine, JOBS), want, LOGPROB)  # batches differ


# ---- LoRA --------------------------------------------------------------------------------------------------------


VARIANTS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 32}},
    {"target_modules": "all-linear"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_merge_loras_equals_peft(zoo, tmp_path, options):
    folder = zoo("llama").folder
    lora_folder = tiny.write_lora(folder, tmp_path, **options)
    base_tensors = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    merged = dict(merge_loras(base_tensors.items(), [lora_folder]))
    assert merged.keys() == expected.keys()
    assert any(not torch.equal(merged[name], base_tensors[name]) for name in base_tensors)
    for name in expected:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-6, atol=1e-6)


def test_lora_as_secondary_weights_equals_the_oracle(zoo, tmp_path):
    tiny_model = zoo("llama")
    folder = tiny.write_lora(tiny_model.folder, tmp_path)
    pair = tiny.TinyModel(tiny_model.folder, {}, models={"dpo": (tmp_path / "merged", ())})
    jobs = [job for job in (*JOBS, *EXTENDED_JOBS) if "sft" not in (job.recipient, job.donor)]
    with Engine(tiny_model.folder, models={"dpo": {"lora": folder}}, backend="transformers") as engine:
        assert_equals_oracle(pair, jobs, generate(engine, jobs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .* is not supported"),
    ],
)
def test_load_lora_unsupported_option_is_an_error(zoo, tmp_path, options, message):
    with pytest.raises(SnpatchError, match=message):
        load_lora(tiny.write_lora(zoo("llama").folder, tmp_path, **options))


def test_lora_of_another_model_or_ia3_is_an_error(zoo, tmp_path):
    tiny_model, weights = zoo("llama"), {"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 4)}
    folder = tiny.write_lora(tiny_model.folder, tmp_path)
    with pytest.raises(SnpatchError, match=r"up_proj.weight is \[4, 4\], its update \[96, 64\]"):
        list(merge_loras(weights.items(), [folder]))
    with pytest.raises(SnpatchError, match=r"has no weight .* a LoRA of another model"):
        list(merge_loras({}.items(), [folder]))
    with pytest.raises(SnpatchError, match=r"expected an adapter of type LORA, got 'IA3'\. Pass an IA3 adapter"):
        load_lora(tiny_model.adapters["sft"][0])


def test_revision_of_the_same_model_is_secondary_weights(pairs, tmp_path, monkeypatch):
    """Two commits of one Hub model, found in the local cache."""
    tiny_pair, cache = pairs("llama"), tmp_path / "models--org--tiny"
    for revision, folder in (("main", tiny_pair.folder), ("v2", tiny_pair.models["dpo"][0])):
        shutil.copytree(folder, cache / "snapshots" / f"commit-{revision}")
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(f"commit-{revision}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    jobs = [job for job in (*JOBS, *EXTENDED_JOBS) if "sft" not in (job.recipient, job.donor)]
    with Engine("org/tiny", models={"dpo": "org/tiny@v2"}, backend="transformers") as engine:
        assert_equals_oracle(tiny_pair, jobs, generate(engine, jobs))
        assert engine.weights.revision == "commit-main"
    with pytest.raises(SnpatchError, match=r"cannot download org/tiny@v3"):
        Engine("org/tiny", models={"dpo": "org/tiny@v3"}, backend="transformers")


# ---- incompatible checkpoints ---------------------------------------------------------------------------------------


def copy_changed(folder: Path, out: Path, file: str = "config.json", **changes) -> Path:
    shutil.copytree(folder, out)
    (out / file).write_text(json.dumps({**json.loads((out / file).read_text()), **changes}))
    return out


def test_another_architecture_or_shape_is_an_error(zoo, pairs, tmp_path):
    folder = pairs("llama").folder
    with pytest.raises(SnpatchError, match=r"expected architecture llama as .*, got qwen3"):
        Engine(folder, models={"dpo": zoo("qwen3").folder}, backend="transformers")
    second_folder = copy_changed(folder, tmp_path / "shape", intermediate_size=100)
    with pytest.raises(SnpatchError, match=r"expected intermediate_size = 96 as in .*, got 100"):
        Engine(folder, models={"dpo": second_folder}, backend="transformers")


def test_different_tokenizers_error_names_the_first_difference(pairs, tmp_path):
    folder = pairs("llama").folder
    second_folder = copy_changed(folder, tmp_path / "other")
    path = second_folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab[tiny.WORDS[3]], vocab[tiny.WORDS[5]] = vocab[tiny.WORDS[5]], vocab[tiny.WORDS[3]]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(SnpatchError, match=f"the same ids .* in the token '{tiny.WORDS[3]}': 9 and 11"):
        Engine(folder, models={"dpo": second_folder}, backend="transformers")
    tokenizer["model"]["vocab"] = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(SnpatchError, match=r"in the pre_tokenizer: .*WhitespaceSplit.* and .*Whitespace"):
        Engine(folder, models={"dpo": second_folder}, backend="transformers")


def test_third_set_of_weights_is_an_error(pairs, zoo):
    folder, dpo = pairs("llama").folder, pairs("llama").models["dpo"][0]
    with pytest.raises(
        SnpatchError, match=r"expected at most one set of secondary weights, got 2: .* Start one engine per pair"
    ):
        EngineConfig.of(folder, models={"dpo": dpo, "other": zoo("llama").folder})
    config = EngineConfig.of(
        folder, models={"sft": folder, "dpo": dpo, "tuned": {"checkpoint": dpo, "adapters": ["a"]}}
    )
    assert config.secondary == config.models["dpo"]
    assert config.models["sft"].checkpoint is None


def test_config_with_models_round_trips_through_a_file(pairs, tmp_path):
    arguments = pairs("llama").engine_arguments
    config = EngineConfig.of(pairs("llama").folder, **arguments, backend="transformers")
    config.save(tmp_path / "engine.json")
    assert EngineConfig.load(tmp_path / "engine.json") == config
    with pytest.raises(SnpatchError, match="models: dpo: unknown key weight; expected one of checkpoint, lora"):
        EngineConfig.from_dict({"model": "m", "models": {"dpo": {"weight": "n"}}})


def test_recipients_eos_ends_its_completions(pairs, tmp_path):
    pair = pairs("llama")
    folder, end = pair.folder, oracle.generate(oracle.model(*pair.checkpoints["dpo"]), IDS[0], 10).ids[4]
    second = copy_changed(pair.models["dpo"][0], tmp_path / "second", "generation_config.json", eos_token_id=end)
    with Engine(folder, models={"dpo": second}, backend="transformers") as engine:
        (completion,) = engine.generate([IDS[0]], "dpo")
        assert (completion.finish_reason, completion.token_ids[-1]) == ("eos", end)
        assert all(text.finish_reason == "length" for text in engine.generate(IDS, "base", Sampling(max_tokens=10)))


# ---- the command line and experiment configs ----------------------------------------------------------------------


def test_command_line_accepts_secondary_weights(capsys, pairs, tmp_path):
    tiny_pair, prompts, ranking = pairs("llama"), tmp_path / "prompts.jsonl", tmp_path / "ranking.safetensors"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in tiny.PROMPTS))
    second, sft = tiny_pair.models["dpo"][0], tiny_pair.adapters["sft"][0]
    common = [
        tiny_pair.folder,
        prompts,
        "-a",
        f"sft={sft}",
        "--checkpoint",
        f"dpo={second}",
        "--checkpoint",
        f"tuned={second}",
    ]
    common += ["-a", f"tuned={sft}", "--template", "tulu", "--backend", "transformers"]
    code, _, err = run(capsys, "contrast", *common, "--recipient", "sft", "--donor", "dpo", "-o", ranking,
                       "--max-tokens", 4, "--no-exclude-layers")  # fmt: skip
    assert code == 0, err
    assert "GB secondary weights" in err
    patched = ["--recipient", "tuned", "--donor", "sft", "--ranking", ranking, "-k", 40, "--strength", 1.5]
    code, out, err = run(capsys, "generate", *common, *patched, "--max-tokens", 5, "--json")
    assert code == 0, err
    with Engine(tiny_pair.folder, **tiny_pair.engine_arguments, template="tulu", backend="transformers") as engine:
        patch = Patch("tuned", "sft", Ranking.load(ranking), 40, strength=1.5)
        chats = [[{"role": "user", "content": text}] for text in tiny.PROMPTS]
        want = engine.generate(chats, patch, Sampling(max_tokens=5))
    assert [json.loads(line)["token_ids"] for line in out.splitlines()] == [c.token_ids for c in want]
    code, _, err = run(capsys, "generate", tiny_pair.folder, prompts, "--checkpoint", f"dpo={second},{second}")
    assert (code, "checkpoint: expected one checkpoint per name" in err) == (2, True)


def test_experiment_config_with_secondary_weights(capsys, pairs, tmp_path):
    tiny_pair = pairs("llama")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in tiny.PROMPTS))
    shutil.copytree(tiny_pair.models["dpo"][0], tmp_path / "second")
    (tmp_path / "experiment.toml").write_text(f"""
model = "{tiny_pair.folder}"
template = "tulu"
recipients = ["base"]
benchmarks = ["p"]
max_tokens = 3
contrast_tokens = 3
[models]
dpo = {{ checkpoint = "second" }}
[contrasts]
safety = {{ recipient = "base", donor = "dpo", prompts = "p" }}
[judges]
cost = {{ source = "refusal" }}
[sets]
p = {{ source = "p.jsonl" }}
[settings.curve]
k = [0, 0.5]
controls = 1
""")
    arguments = ["-c", tmp_path / "experiment.toml", "-o", tmp_path / "out", "--backend", "transformers"]
    code, _, err = run(capsys, "exp", "curve", *arguments)
    assert code == 0, err
    provenance = json.loads((tmp_path / "out" / "curve.json").read_text())["provenance"]
    assert provenance["adapters"]["dpo"] == {"checkpoint": "second", "lora": [], "adapters": []}
    assert {row["recipient"] for row in json.loads((tmp_path / "out" / "curve.json").read_text())["rows"]} >= {"base"}
