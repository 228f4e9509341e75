"""lm-evaluation-harness on patched models: its figures equal the oracle's, on generated tasks of tiny's words."""

import json
import logging
import math
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import lm_eval
import oracle
import pytest
import tiny
import torch
import yaml
from jobs import ENCODE, MIN_LOGIT_GAP, ORDERS, RANKINGS, SHAPE
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from snpatch import Engine, Patch, SnpatchError
from snpatch.integrations import lm_eval as harness
from snpatch.integrations.lm_eval import SnpatchLM

METRICS = {
    "tiny_choice": ["acc", "acc_norm"],
    "tiny_text": ["exact_match"],
    "tiny_rolling": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
}
TASKS = list(METRICS)
CHOICES = [[" ".join(tiny.WORDS[(i + 5 * j + 11 * n) % 96] for n in range(j + 1)) for j in range(2)] for i in range(8)]
TEXTS = [" ".join(tiny.WORDS[(i + n * n) % 96] for n in range(length)) for i, length in enumerate((5, 127, 128, 300))]
MAX_TOKENS = 8  # of a completion
K = 150
PATCHES = {
    "unpatched": "sft",
    "all": Patch("sft", "dpo", RANKINGS[0], K),
    "completion": Patch("sft", "dpo", RANKINGS[0], K, "completion"),
}


def encode_without_bos(text: str) -> list[int]:
    return list(ENCODE(text)["input_ids"])[1:]


@pytest.fixture(scope="module")
def llama(zoo):
    return zoo("llama")


@pytest.fixture(scope="module")
def adapters(llama):
    return {name: list(map(str, llama.adapters[name])) for name in ("sft", "dpo")}


@pytest.fixture(scope="module")
def engine(llama, adapters):
    return Engine(llama.folder, adapters, backend="transformers")


class Oracle:
    """Expected responses to the requests of the tasks."""

    def __init__(self, tiny_model: tiny.TinyModel, positions: str) -> None:
        self.recipient, self.positions = oracle.model(*tiny_model.checkpoints["sft"]), positions
        self.donor = oracle.model(*tiny_model.checkpoints["dpo"])
        self.mask = oracle.build_mask(ORDERS[0][:K], SHAPE)

    def patch(self, context: list[int]) -> oracle.Patch | None:
        if self.positions == "unpatched":
            return None
        return oracle.Patch(self.mask, self.donor, start=len(context) if self.positions == "completion" else 0)

    def loglikelihood(self, context: list[int], text: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of the text, and whether it is the greedy completion."""
        patch, ids = self.patch(context), context + text
        logits = patch.forward(self.recipient, ids) if patch else self.recipient.forward(ids)
        rows = logits[len(context) - 1 : -1].double().log_softmax(-1)
        return rows[range(len(text)), text].sum().item(), rows.argmax(-1).tolist() == text

    def rolling_loglikelihood(self, text: list[int]) -> float:
        """Use windows of the context's length after BOS; each later window starts as far back as it can."""
        total, size = 0.0, tiny.CONTEXT - 1
        for start in range(0, len(text), size):
            stop = min(start + size, len(text))
            context = [tiny.BOS, *text][: stop + 1][-tiny.CONTEXT :][: start - stop]
            total += self.loglikelihood(context, text[start:stop])[0]
        return total

    def write(self, prompt: list[int]) -> str:
        generation = oracle.generate(self.recipient, prompt, MAX_TOKENS, self.patch(prompt), eos=tiny.EOS)
        assert generation.gap > MIN_LOGIT_GAP, "too close to call, choose other prompts"
        return ENCODE.decode(generation.ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def oracles(llama):
    return {name: Oracle(llama, name) for name in PATCHES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, oracles):
    """Folder of the task files.

    The correct choice is the first word of the patched model, against the unpatched model's and others. Half of the
    patched model's completions are the targets of `tiny_text`; a word of one is the stop string.
    """
    folder = tmp_path_factory.mktemp("tasks")
    patched, unpatched = (
        [oracles[n].write([tiny.BOS, *encode_without_bos(p)]) for p in tiny.PROMPTS] for n in ("all", "unpatched")
    )
    targets = [text if i % 2 else "nothing" for i, text in enumerate(patched)]
    firsts = [[text.split()[0] for text in pair] for pair in zip(patched, unpatched, strict=True)]
    choices = [[*pair, *other_choices] for pair, other_choices in zip(firsts, CHOICES, strict=True)]
    rows = {
        "choice": [{"text": p, "choices": c, "label": 0} for p, c in zip(tiny.PROMPTS, choices, strict=True)],
        "text": [{"text": p, "target": t} for p, t in zip(tiny.PROMPTS, targets, strict=True)],
        "rolling": [{"text": text} for text in TEXTS],
    }
    common = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{text}}"}
    options = {
        "choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"},
        "text": {
            "output_type": "generate_until",
            "doc_to_target": "{{target}}",
            "generation_kwargs": {"until": [patched[0].split()[4]], "max_gen_toks": MAX_TOKENS, "do_sample": False},
        },
        "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
    }
    for name, lines in rows.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        task = {
            "task": f"tiny_{name}",
            **common,
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
            "metric_list": [{"metric": metric} for metric in METRICS[f"tiny_{name}"]],
            **options[name],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def evaluate(folder):
    """Yield a function that evaluates the tasks with lm-eval, without its report on the machine, that takes seconds."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def run(model, tasks=TASKS, **options):
        return lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield run


@pytest.fixture(scope="module")
def results(engine, evaluate):
    """Results of each of PATCHES, by name."""
    return {name: evaluate(SnpatchLM(engine, patch)) for name, patch in PATCHES.items()}


def figures(results) -> dict[str, dict[str, float]]:
    """Return task -> metric -> value."""
    return {
        task: {name.removesuffix(",none"): value for name, value in row.items() if name.split(",")[0] in METRICS[task]}
        for task, row in results["results"].items()
    }


def samples(results, task: str) -> list[dict]:
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def assert_figures(results, expected: Oracle):
    """Assert that every response and every figure equals the oracle's."""
    actual = figures(results)
    is_correct = {"acc": [], "acc_norm": []}
    for sample in samples(results, "tiny_choice"):
        choices = sample["doc"]["choices"]
        context = [tiny.BOS, *encode_without_bos(sample["doc"]["text"])]
        loglikelihoods = [expected.loglikelihood(context, encode_without_bos(choice)) for choice in choices]
        responses = [response for (response,) in sample["resps"]]
        assert [value for value, _ in responses] == pytest.approx([value for value, _ in loglikelihoods], abs=1e-3)
        assert [is_greedy for _, is_greedy in responses] == [is_greedy for _, is_greedy in loglikelihoods]
        values = torch.tensor([value for value, _ in loglikelihoods])
        lengths = torch.tensor([len(choice) for choice in choices])
        for name, scores in (("acc", values), ("acc_norm", values / lengths)):
            is_correct[name].append(scores.argmax().item() == sample["doc"]["label"])
    assert actual["tiny_choice"] == {
        name: pytest.approx(sum(outcomes) / len(outcomes)) for name, outcomes in is_correct.items()
    }

    hits = []
    for sample in samples(results, "tiny_text"):
        ((_, options),) = sample["arguments"]
        text = expected.write([tiny.BOS, *encode_without_bos(sample["doc"]["text"])]).split(options["until"][0])[0]
        assert sample["resps"] == [[text]]
        hits.append(text == sample["doc"]["target"])
    assert actual["tiny_text"] == {"exact_match": pytest.approx(sum(hits) / len(hits))}

    total = 0.0
    for sample, text in zip(samples(results, "tiny_rolling"), TEXTS, strict=True):
        value = expected.rolling_loglikelihood(encode_without_bos(text))
        assert sample["resps"] == [[pytest.approx(value, abs=1e-2)]]
        total += value
    words, chars = sum(len(text.split()) for text in TEXTS), sum(map(len, TEXTS))
    assert actual["tiny_rolling"] == {
        "word_perplexity": pytest.approx(math.exp(-total / words), rel=1e-4),
        "byte_perplexity": pytest.approx(math.exp(-total / chars), rel=1e-4),
        "bits_per_byte": pytest.approx(-total / chars / math.log(2), rel=1e-4),
    }


@pytest.mark.parametrize("name", PATCHES)
def test_figures_match_oracle(results, oracles, name):
    assert_figures(results[name], oracles[name])


@pytest.mark.engine
def test_vllm_figures_match_oracle(llama, adapters, evaluate, oracles, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with Engine(
        llama.folder, adapters, backend="vllm", enforce_eager=True, kv_cache_memory_bytes=64 << 20, block_size=32
    ) as engine:
        for name, patch in PATCHES.items():
            assert_figures(evaluate(SnpatchLM(engine, patch)), oracles[name])


def test_patch_changes_figures_unless_it_has_no_neurons(engine, evaluate, results):
    unpatched_figures, patched_figures = figures(results["unpatched"]), figures(results["all"])
    assert figures(evaluate(SnpatchLM(engine, Patch("sft", "dpo", RANKINGS[0], 0)))) == unpatched_figures
    assert all(patched_figures[task] != unpatched_figures[task] for task in TASKS)


def test_each_kind_of_request_is_one_engine_call(engine, evaluate, monkeypatch):
    calls = []
    for name in ("generate", "logprobs"):
        method = getattr(engine, name)
        monkeypatch.setattr(
            engine,
            name,
            lambda prompts, *a, m=method, **k: calls.append((m.__name__, len(prompts))) or m(prompts, *a, **k),
        )
    evaluate(SnpatchLM(engine, "sft"))
    assert sorted(calls) == [("generate", 8), ("logprobs", 1 + 1 + 2 + 3), ("logprobs", 8 * 4)]


@pytest.fixture(scope="module")
def model_args(llama, adapters, tmp_path_factory):
    """Return the model of PATCHES as lm-eval's model arguments."""
    ranking = tmp_path_factory.mktemp("ranking") / "ranking.safetensors"
    RANKINGS[0].save(ranking)
    adapters_text = ";".join(f"{name}={'+'.join(folders)}" for name, folders in adapters.items())
    return {"model": str(llama.folder), "backend": "transformers", "adapters": adapters_text, "ranking": str(ranking)}


def format_args(model_args: dict, **changes) -> str:
    return ",".join(f"{name}={value}" for name, value in {**model_args, **changes}.items())


def test_model_args_build_the_same_model(evaluate, results, model_args, adapters):
    expected = results["completion"]
    patch = {"recipient": "sft", "donor": "dpo", "positions": "completion"}
    for arguments in (
        format_args(model_args, **patch, k=K, token_budget=200),
        {**model_args, **patch, "k": f"0:{K}", "adapters": adapters, "dtype": "float32"},
    ):
        actual = evaluate("snpatch", TASKS[:2], model_args=arguments)
        assert figures(actual) == {task: figures(expected)[task] for task in TASKS[:2]}
        for name in ("backend", "models", "patch"):
            assert actual["config"][name] == expected["config"][name]
    assert [*expected["config"]["models"]] == ["sft", "dpo"]
    assert expected["config"]["patch"] == {
        "recipient": "sft",
        "donor": "dpo",
        "ranking": RANKINGS[0].fingerprint,
        "window": [0, K],
        "positions": "completion",
        "strength": 1.0,
    }
    unpatched = evaluate(
        "snpatch", TASKS[1:2], model_args={n: v for n, v in model_args.items() if n != "ranking"}, limit=1
    )
    assert unpatched["config"]["patch"] == {"recipient": "base"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model=FOLDER is missing"),
        ({"adapters": "sft"}, r"adapters: expected name=folder\+folder;..., got 'sft'"),
        ({"adapters": "sft=a;sft=b"}, "each name once"),
        ({"k": 3}, "ranking, k, positions and strength need a donor"),
        ({"donor": "dpo"}, "a donor needs ranking=FILE and k="),
        ({"donor": "dpo", "k": "few"}, "a window: expected a number, got 'few'"),
        ({"donor": "dpo", "k": 10**6}, "reaches past the ranking's 288 neurons"),
        ({"donor": "dpo", "k": 3, "positions": "here"}, "positions: expected one of all, prompt, last_prompt_token"),
        ({"donor": "dpo", "k": 3, "recipient": "nobody"}, "got 'nobody'"),
        ({"ranking": None, "sort": 1}, "unknown argument sort"),
        ({"ranking": None, "batch_size": 0}, "batch_size: expected at least 1"),
    ],
)
def test_invalid_model_args_raise(evaluate, model_args, changes, message):
    with pytest.raises(SnpatchError, match=message):
        evaluate("snpatch", TASKS[1:2], model_args={**model_args, **changes}, limit=1)


def test_model_args_build_a_pair(evaluate, model_args, pairs):
    tiny_pair = pairs("llama")
    with Engine(tiny_pair.folder, **tiny_pair.engine_arguments, backend="transformers") as engine:
        patch = Patch("base", "dpo", RANKINGS[0], 20, strength=1.5)
        expected = evaluate(SnpatchLM(engine, patch), TASKS[2:], limit=2)
    arguments = {
        "model": tiny_pair.folder,
        "checkpoint": f"dpo={tiny_pair.models['dpo'][0]}",
        "backend": "transformers",
    }
    patched = {"donor": "dpo", "ranking": model_args["ranking"], "k": 20, "strength": 1.5}
    actual = evaluate("snpatch", TASKS[2:], model_args=format_args(arguments, **patched), limit=2)
    unpatched = evaluate("snpatch", TASKS[2:], model_args=format_args(arguments), limit=2)
    assert figures(actual) == figures(expected) != figures(unpatched)


def test_batch_size_and_device_reach_the_engine(model_args):
    def executor(**additional):
        args = {name: value for name, value in model_args.items() if name != "ranking"}
        return SnpatchLM.create_from_arg_obj(args, additional).engine.executor

    default = executor()._batch_size
    assert default > 1
    assert executor(batch_size=1, max_batch_size=None, device="cuda:0")._batch_size == default  # lm-eval's defaults
    assert executor(batch_size="auto")._batch_size == default
    assert executor(batch_size="auto:4", max_batch_size=5)._batch_size == 5
    assert executor(batch_size="7")._batch_size == 7
    with pytest.raises(SnpatchError, match="--batch_size: expected a number or auto, got 'many'"):
        executor(batch_size="many")
    with pytest.raises(SnpatchError, match="device 'nowhere'"):
        executor(device="nowhere")


def generate(lm: SnpatchLM, *contexts: str, **gen_kwargs) -> list[str]:
    requests = [Instance("generate_until", {}, (context, gen_kwargs), 0) for context in contexts]
    return lm.generate_until(requests, disable_tqdm=True)


def test_completions_stop_at_until_strings_and_max_gen_toks(engine):
    lm = SnpatchLM(engine, PATCHES["all"], max_gen_toks=12)
    words = engine.generate([tiny.PROMPTS[0]], lm.patch)[0].text.split()[:12]
    text = " ".join(words)
    assert generate(lm, tiny.PROMPTS[0]) == [text]
    assert generate(lm, tiny.PROMPTS[0], max_tokens=3) == [" ".join(words[:3])]
    for stops in ([words[7], words[4], ""], [words[4][1:]], [f"{words[2]} {words[3]}", "nowhere"]):
        (completion,) = generate(lm, tiny.PROMPTS[0], until=stops)
        assert completion == text[: min(text.find(stop) for stop in stops if stop and stop in text)]


def test_special_token_stops_a_completion(llama, engine, tmp_path):
    words = engine.generate([tiny.PROMPTS[0]])[0].text.split()
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [words[5]]})
    folder = llama.with_eos(tiny.EOS, tmp_path / "model").folder
    tokenizer.save_pretrained(folder)
    lm = SnpatchLM(Engine(folder, backend="transformers"), max_gen_toks=12)
    assert generate(lm, tiny.PROMPTS[0], until=[words[5]])[0].split() == words[:5]


def test_sampling_uses_lm_eval_names(engine):
    lm = SnpatchLM(engine, "sft", max_gen_toks=12)
    greedy = generate(lm, tiny.PROMPTS[0])
    assert generate(lm, tiny.PROMPTS[0], do_sample=False, temperature=1.0) == greedy
    assert generate(lm, tiny.PROMPTS[0], temperature=3.0, top_k=1) == greedy
    assert generate(lm, tiny.PROMPTS[0], do_sample=True, seed=1) != greedy
    first, second = (generate(lm, *[tiny.PROMPTS[0]] * 3, temperature=2.0, seed=seed) for seed in (1, 2))
    assert first != second
    assert first == generate(lm, *[tiny.PROMPTS[0]] * 3, temperature=2.0, seed=1)
    with pytest.raises(SnpatchError, match="min_p needs the vllm backend"):
        generate(lm, tiny.PROMPTS[0], do_sample=True, min_p=0.1)


def test_sampling_arguments_of_none_are_defaults(engine):
    lm = SnpatchLM(engine, "sft", max_gen_toks=12)
    names = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "seed", "min_p")
    assert generate(lm, tiny.PROMPTS[0], **dict.fromkeys(names)) == generate(lm, tiny.PROMPTS[0])
    sampled = generate(lm, tiny.PROMPTS[0], do_sample=True, seed=1)
    assert generate(lm, tiny.PROMPTS[0], do_sample=True, seed=1, temperature=None, top_p=None) == sampled


def test_no_requests_give_no_responses(engine):
    lm = SnpatchLM(engine, PATCHES["all"])
    for respond in (lm.loglikelihood, lm.loglikelihood_rolling, lm.generate_until):
        assert respond([], disable_tqdm=True) == []


def test_long_prompts_are_truncated_with_a_warning(engine, caplog):
    lm, long_text = SnpatchLM(engine, PATCHES["all"]), TEXTS[3]
    with caplog.at_level(logging.WARNING):
        texts = generate(lm, long_text, tiny.PROMPTS[0], max_gen_toks=9)
    assert "1 of 2 prompts were truncated on the left to the context of 128 tokens" in caplog.text
    assert texts[0] == engine.generate([encode_without_bos(long_text)[-119:]], lm.patch)[0].text
    value, _ = lm.loglikelihood([Instance("loglikelihood", {}, (long_text, " bala"), 0)], disable_tqdm=True)[0]
    (expected,) = engine.logprobs([encode_without_bos(long_text)[-127:]], lm.patch, completions=["bala"])
    assert value == expected.values.item()
    with pytest.raises(SnpatchError, match="expected less than the model's context of 128 tokens, got 128"):
        generate(lm, tiny.PROMPTS[0], max_gen_toks=128)


def test_text_without_context_is_read_after_bos(engine, oracles):
    lm = SnpatchLM(engine, PATCHES["completion"])
    ((value, _),) = lm.loglikelihood([Instance("loglikelihood", {}, ("", TEXTS[0]), 0)], disable_tqdm=True)
    assert value == pytest.approx(
        oracles["completion"].loglikelihood([tiny.BOS], encode_without_bos(TEXTS[0]))[0], abs=1e-3
    )
    assert lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXTS[0],), 0)], disable_tqdm=True) == [
        value
    ]


def test_empty_text_has_log_likelihood_zero(engine):
    lm = SnpatchLM(engine, PATCHES["completion"])
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(("", TEXTS[0], ""))]
    values = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    assert values == [0, *lm.loglikelihood_rolling(requests[1:2], disable_tqdm=True), 0]
    assert lm.loglikelihood_rolling([requests[0], requests[2]], disable_tqdm=True) == [0, 0]


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} bama{% endif %}"
)


@pytest.mark.parametrize("template", ["tulu", "tokenizer"])
def test_chats_use_the_engine_template(llama, adapters, evaluate, template, tmp_path):
    folder = llama.with_eos(tiny.EOS, tmp_path / "model").folder
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    lm = SnpatchLM(Engine(folder, adapters, backend="transformers", template=template), PATCHES["all"])
    chat = [{"role": "user", "content": tiny.PROMPTS[0]}]
    assert [lm.tok_encode(lm.apply_chat_template(chat))] == lm.engine.encode([chat])
    unfinished = [*chat, {"role": "assistant", "content": "bala bana"}]
    prefix = {"tulu": f"<|user|>\n{tiny.PROMPTS[0]}\n<|assistant|>\n", "tokenizer": f"<s> {tiny.PROMPTS[0]} "}[template]
    assert lm.apply_chat_template(unfinished, add_generation_prompt=False) == prefix + "bala bana"
    results = evaluate(lm, TASKS[1:2], apply_chat_template=True)
    for sample in samples(results, "tiny_text"):
        ((_, options),) = sample["arguments"]
        chat = [{"role": "user", "content": sample["doc"]["text"]}]
        expected = lm.engine.generate([chat], lm.patch, harness.Sampling(max_tokens=MAX_TOKENS))[0].text
        assert sample["resps"] == [[expected.split(options["until"][0])[0]]]
    with pytest.raises(SnpatchError, match="expected no name, got 'chatml'"):
        lm.chat_template("chatml")
    assert lm.chat_template(True) == (TEMPLATE if template == "tokenizer" else "tulu")
    fingerprint = lm.engine.requests.template("base").fingerprint
    assert lm.tokenizer_name == f"{folder}--{template}-{fingerprint}".replace("/", "__")


def test_command_line_evaluates_a_patch(folder, results, model_args, monkeypatch, tmp_path):
    patched = format_args(model_args, recipient="sft", donor="dpo", k=K)
    options = ["--tasks", *TASKS, "--include_path", folder, "--output_path", tmp_path, "--model_args", patched]
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "snpatch", *map(str, options)])
    harness.main()
    (path,) = tmp_path.rglob("results_*.json")
    assert figures(json.loads(path.read_text())) == figures(results["all"])


def test_command_line_error_is_one_line(folder, model_args, monkeypatch, capsys):
    options = ["--model", "snpatch", "--tasks", "tiny_text", "--include_path", str(folder)]
    monkeypatch.setattr(
        sys, "argv", ["lm_eval", *options, "--model_args", format_args(model_args, donor="dpo", positions=-1)]
    )
    with pytest.raises(SystemExit, match="2"):
        harness.main()
    assert capsys.readouterr().err.splitlines()[-1] == "snpatch: error: model_args: a donor needs ranking=FILE and k="


def test_entry_points_exist():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for entry_point, expected in (
        (project["entry-points"]["lm_eval.models"]["snpatch"], SnpatchLM),
        (project["scripts"]["snpatch-lm-eval"], harness.main),
    ):
        module, _, name = entry_point.partition(":")
        assert getattr(import_module(module), name) is expected
