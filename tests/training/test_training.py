"""Training of a toy model: weights learned, files saved, rows counted and inputs rejected."""

import csv
import importlib
import json
import math
import shutil
import sys

import pytest
import torch
import toys
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from toys import (
    EOS,
    KEYS,
    LAYERS,
    MESSAGES,
    NEURONS,
    PAIRS,
    encode,
    load_model,
    load_vectors,
    settings,
    to_answer,
    to_chat,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TrainerState

from snpatch.errors import SnpatchError
from snpatch.models.templates import TULU
from snpatch.training import record
from snpatch.training.callbacks import LossMonitor, WeightDecayTowards
from snpatch.training.models import load_tokenizer
from snpatch.training.row_filters import filter_pairs
from snpatch.training.settings import DPO_LEARNING_RATES, SFT_LEARNING_RATES, DpoSettings, TrainSettings
from snpatch.training.trainer import train_dpo, train_sft

ONES, ZEROS = ([torch.full((NEURONS,), value)] * LAYERS for value in (1.0, 0.0))


toy = pytest.fixture(scope="module")(toys.toy)


@pytest.fixture(scope="module")
def dpo_training(toy, tmp_path_factory):
    """Return a DPO adapter on SFT: its folder, figures, and the arguments of each `on_step` call."""
    out, steps = tmp_path_factory.mktemp("trained") / "dpo", []
    figures = train_dpo(
        toy.base, toy.sft(), PAIRS, out, toys.dpo_settings(epochs=6), on_step=lambda *step: steps.append(step)
    )
    return out, figures, steps


def copy_with_tokenizer(folder, tokenizer, base):
    """Copy the base with another tokenizer."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    tokenizer.save_pretrained(folder)
    return folder


def copy_with_scale(sft, folder, layer, neuron, value):
    """Copy an IA3 adapter with another value at one neuron."""
    shutil.copytree(sft, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[KEYS[layer]][0, neuron] = value
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def read_headline(out):
    return json.loads((out / "training.json").read_text())["headline"]


# ---- Learning


@pytest.mark.parametrize("decay_target", [0, 1])
def test_sft_matches_manual_adamw_on_answer_loss(toy, tmp_path, decay_target):
    config = settings(batch_size=8, epochs=3, weight_decay=0.5, weight_decay_target=decay_target)
    figures = train_sft(toy.base, MESSAGES, tmp_path / "out", config)
    target = ONES if decay_target else ZEROS
    want, losses = toys.train_scales(
        load_model(toy.base), ONES, toys.compute_sft_loss, steps=3, rate=0.1, decay=0.5, target=target
    )
    assert min((vector - 1).abs().max() for vector in want) > 0.1
    torch.testing.assert_close(load_vectors(tmp_path / "out"), want, rtol=0, atol=1e-4)
    assert [figures["first_loss"], figures["last_loss"]] == pytest.approx([losses[0], losses[-1]], abs=1e-5)


@pytest.mark.parametrize("decay_target", [0, 1])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_matches_manual_adamw_from_sft(toy, tmp_path, beta, decay_target):
    """With weight_decay_target = 1, decay pulls towards SFT's vector, where DPO's own factor is 1."""
    config = toys.dpo_settings(batch_size=8, epochs=3, weight_decay=0.5, weight_decay_target=decay_target, beta=beta)
    figures = train_dpo(toy.base, toy.sft(), PAIRS, tmp_path / "out", config)
    model, start = load_model(toy.base), load_vectors(toy.sft())
    with torch.no_grad(), toys.apply_scales(model, start):
        loss = toys.build_dpo_loss(toys.compute_margins(model), beta)
    want, losses = toys.train_scales(
        model, start, loss, steps=3, rate=0.1, decay=0.5, target=start if decay_target else ZEROS
    )
    assert min((vector - first).abs().max() for vector, first in zip(want, start, strict=True)) > 0.1
    vectors = [factor * first for factor, first in zip(load_vectors(tmp_path / "out"), start, strict=True)]
    torch.testing.assert_close(vectors, want, rtol=0, atol=1e-4)
    assert [figures["first_loss"], figures["last_loss"]] == pytest.approx([math.log(2), losses[-1]], abs=1e-5)


def test_stacked_sft_and_dpo_prefer_chosen_answers(toy, dpo_training):
    out, figures, _ = dpo_training
    with torch.no_grad():
        model = PeftModel.from_pretrained(load_model(toy.base), toy.sft(), adapter_name="sft").eval()
        before = toys.compute_margins(model)
        model.load_adapter(out, adapter_name="dpo")
        model.base_model.set_adapter(["sft", "dpo"], inference_mode=True)
        after = toys.compute_margins(model)
    assert (after > before + 2).all()
    assert figures["accuracy"] == 1
    assert figures["last_loss"] < 0.7 * figures["first_loss"]


def test_each_step_is_reported_and_recorded(dpo_training):
    out, figures, steps = dpo_training
    with open(out / "training.csv") as file:
        table = list(csv.DictReader(file))
    assert figures["steps"] == 12
    assert [(step, total) for step, total, _ in steps] == [(i, 12) for i in range(1, 13)]
    assert [int(row["step"]) for row in table] == list(range(1, 13))
    assert [float(row["loss"]) for row in table] == [logs["loss"] for *_, logs in steps]
    rates = [0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    assert [float(row["learning_rate"]) for row in table] == pytest.approx(rates)
    margin = [float(row["margin"]) for row in table]
    assert margin[0] == 0
    assert margin[-1] == figures["margin"] > 0.5
    record_content = json.loads((out / "training.json").read_text())
    assert record_content["provenance"]["figures"] == figures
    assert record_content["provenance"]["inputs"]["settings"]["beta"] == 0.1
    assert [row["loss"] for row in record_content["rows"]] == [float(row["loss"]) for row in table]
    assert record_content["headline"][0].startswith("dpo: 12 steps, loss 0.6931 -> ")
    assert not (out / "checkpoints").exists()


def test_plot_shows_loss_margin_and_accuracies(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "plot", toys.PLOT)
    train_dpo(toy.base, toy.sft(), PAIRS, tmp_path / "out", toys.dpo_settings(epochs=1))
    svg = (tmp_path / "out" / "training.svg").read_text()
    assert all(f"<!-- {name} -->" in svg for name in ("step", "loss", "margin", "accuracy", "token accuracy"))
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_learning_rate_follows_warmup_and_schedule(toy, tmp_path):
    config = settings(epochs=2.5, warmup_steps=2, lr_scheduler_type="linear")
    assert train_sft(toy.base, MESSAGES, tmp_path / "out", config)["steps"] == 5
    with open(tmp_path / "out" / "training.csv") as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.1 * 2 / 3, 0.1 / 3])


def test_seed_determines_row_order(toy, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        train_sft(toy.base, MESSAGES, tmp_path / name, settings(epochs=1, seed=seed))
    first, repeat, second_seed = (load_vectors(tmp_path / name) for name in ("one", "again", "two"))
    assert all(map(torch.equal, first, repeat))
    assert not any(map(torch.equal, first, second_seed))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_lora_and_full_training_learn_sft_and_dpo(toy, tmp_path, method):
    """SFT makes its answers likelier than the base does; DPO makes chosen answers likelier than SFT does."""
    figures = json.loads((toy.sft(method) / "training.json").read_text())["provenance"]["figures"]
    assert figures["last_loss"] < 0.8 * figures["first_loss"]
    sft, start = (None, toy.sft("full")) if method == "full" else (toy.sft("lora"), toy.base)
    figures = train_dpo(start, sft, PAIRS, tmp_path / "dpo", toys.dpo_settings(method))
    assert figures["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert figures["accuracy"] == 1
    with torch.no_grad():
        base = toys.compute_sft_loss(load_model(toy.base))
        models = [_load_trained(toy.base, folder) for folder in (toy.sft(method), tmp_path / "dpo")]
        assert toys.compute_sft_loss(models[0]) < 0.7 * base
        assert (toys.compute_margins(models[1]) > toys.compute_margins(models[0]) + 2).all()


def _load_trained(base, folder):
    """Load a checkpoint, or an adapter on the base in plain PEFT."""
    if (folder / "config.json").exists():
        return load_model(folder)
    return PeftModel.from_pretrained(load_model(base), folder).eval()


@pytest.mark.parametrize("train", ["sft", "dpo"])
def test_gradient_checkpointing_gives_same_weights(toy, tmp_path, train):
    for name, is_on in (("kept", False), ("again", True)):
        options = {"gradient_checkpointing": is_on, "epochs": 1}
        if train == "sft":
            train_sft(toy.base, MESSAGES, tmp_path / name, settings(**options))
        else:
            train_dpo(toy.base, toy.sft(), PAIRS, tmp_path / name, toys.dpo_settings(**options))
    torch.testing.assert_close(load_vectors(tmp_path / "again"), load_vectors(tmp_path / "kept"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("add_bos", "names"), [(True, {}), (False, {}), (True, {"pad_token": None, "unk_token": None})]
)
def test_first_loss_covers_answers_and_eos_only(toy, tmp_path, add_bos, names):
    """With and without BOS at the start of a text, and with EOS as the padding token."""
    base = copy_with_tokenizer(tmp_path / "base", toys.tokenizer(add_bos, **names), toy.base)
    figures = train_sft(base, MESSAGES, tmp_path / "out", settings(batch_size=8, epochs=1))
    with torch.no_grad():
        want = toys.compute_sft_loss(load_model(base), add_bos=add_bos).item()
        wrong_loss = toys.compute_sft_loss(load_model(base), add_bos=not add_bos).item()
    assert figures["first_loss"] == pytest.approx(want, abs=1e-5)
    assert abs(want - wrong_loss) > 1e-2


def test_tulu_template_has_bos_and_eos():
    tokenizer = toys.tokenizer()
    tokenizer.chat_template = TULU
    turns = to_chat("ask one", " yes\n", "ask two")
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|user|>\nask one\n<|assistant|>\nyes</s>\n<|user|>\nask two\n<|assistant|>\n"
    encoding = tokenizer.apply_chat_template(to_chat("ask one", "yes here"), return_assistant_tokens_mask=True,
                                           return_dict=True)  # fmt: skip
    assert (encoding["input_ids"], [bool(mask) for mask in encoding["assistant_masks"]]) == encode(
        to_chat("ask one", "yes here")
    )


def test_weight_decay_pulls_vector_without_gradient_towards_target():
    p, q, r = (torch.nn.Parameter(torch.tensor([3.0, 1.0, -2.0])) for _ in range(3))
    optimizer = torch.optim.AdamW([{"params": [p, r]}, {"params": [q], "lr": 0.05}], lr=0.1, weight_decay=0.2)
    WeightDecayTowards({p: torch.ones(3), q: torch.tensor([2.0, 2.0, 2.0])}).on_train_begin(None, None, None, optimizer)
    for _ in range(5):
        p.grad, q.grad = torch.zeros(3), torch.zeros(3)
        optimizer.step()
    first = torch.tensor([3.0, 1.0, -2.0])
    torch.testing.assert_close(p.data, 1 + (first - 1) * (1 - 0.1 * 0.2) ** 5)
    torch.testing.assert_close(q.data, 2 + (first - 2) * (1 - 0.05 * 0.2) ** 5)
    assert torch.equal(r.data, first)


def test_weight_decay_target_rejects_other_optimizers():
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(SnpatchError, match="expected torch's AdamW, got SGD"):
        WeightDecayTowards({p: torch.ones(2)}).on_train_begin(None, None, None, torch.optim.SGD([p], lr=0.1))
    with pytest.raises(SnpatchError, match="expected all trained vectors in the optimizer, 1 are missing"):
        WeightDecayTowards({p: torch.ones(2), q: torch.ones(2)}).on_train_begin(
            None, None, None, torch.optim.AdamW([p])
        )


# ---- Saved files


def test_ia3_adapter_has_peft_format(toy, dpo_training):
    for folder in (toy.sft(), dpo_training[0]):
        tensors = load_file(folder / "adapter_model.safetensors")
        assert sorted(tensors) == KEYS
        assert all(tensor.shape == (1, NEURONS) and tensor.dtype == torch.float32 for tensor in tensors.values())
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "IA3"
        assert config["target_modules"] == config["feedforward_modules"] == ["down_proj"]
        assert (folder / "chat_template.jinja").read_text() == TULU
        assert not (folder / "ref").exists()


def test_lora_adapter_has_requested_rank_and_targets(toy, tmp_path):
    lora_settings = settings("lora", epochs=1, lora_rank=3, lora_targets=("o_proj", "down_proj"))
    train_sft(toy.base, MESSAGES, tmp_path / "out", lora_settings)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 3, 0.0)
    assert sorted(config["target_modules"]) == ["down_proj", "o_proj"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == LAYERS * 2 * 2
    assert all(min(tensor.shape) == 3 for tensor in tensors.values())


def test_full_training_reports_steps_lost_in_rounding(tmp_path):
    """bfloat16 has eight bits of precision: most steps of 5e-7 vanish, and all of 1e-12."""
    base = toys.make_base(tmp_path / "base", torch.bfloat16)
    figures = train_dpo(base, None, PAIRS, tmp_path / "out", toys.dpo_settings("full", learning_rate=5e-7, epochs=1))
    assert 0 < figures["changed_fraction"] < 0.5
    assert any(
        "of the trained values changed after rounding to the saved dtype" in line
        for line in read_headline(tmp_path / "out")
    )
    tiny_steps = toys.dpo_settings("full", learning_rate=1e-12, epochs=1)
    with pytest.raises(SnpatchError, match=r"no trained value changed after rounding to torch.bfloat16"):
        train_dpo(base, None, PAIRS, tmp_path / "tiny", tiny_steps)


def test_checkpoint_config_equals_base_config(toy, tmp_path):
    """Trainers disable the cache and choose another padding token; saving undoes both."""
    tokenizer = toys.tokenizer(pad_token=None)
    base = copy_with_tokenizer(tmp_path / "base", tokenizer, toy.base)
    train_sft(base, MESSAGES, tmp_path / "out", settings("full", epochs=1))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert {name for name in {**before, **after} if before.get(name) != after.get(name)} <= {"transformers_version"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_has_base_dtype_and_tokenizer(tmp_path, dtype):
    base = toys.make_base(tmp_path / "base", dtype)
    train_sft(base, MESSAGES, tmp_path / "out", settings("full", epochs=1, dtype="bfloat16"))
    first, second = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert first.keys() == second.keys()
    assert {tensor.dtype for tensor in second.values()} == {dtype}
    assert all(not torch.equal(first[name], second[name]) for name in first if "proj" in name)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    base_tokenizer, tokenizer = (AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "out"))
    assert base_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert base_tokenizer.special_tokens_map == tokenizer.special_tokens_map
    assert base_tokenizer("ask one")["input_ids"] == tokenizer("ask one")["input_ids"]


def test_full_training_of_bfloat16_weights_runs_in_float32(tmp_path):
    """Steps of 1e-6 are lost in bfloat16, so weights trained in it would not change."""
    base = toys.make_base(tmp_path / "base", torch.bfloat16)
    figures = train_sft(
        base, MESSAGES, tmp_path / "out", settings("full", epochs=1, learning_rate=1e-6, dtype="bfloat16")
    )
    assert 0 < figures["changed_fraction"] < 0.5  # one or two steps of 1e-6 change the rounding of some values


@pytest.mark.parametrize("add_bos", [True, False])
def test_checkpoint_template_is_the_training_template(toy, tmp_path, add_bos):
    base = copy_with_tokenizer(tmp_path / "base", toys.tokenizer(add_bos), toy.base)
    train_sft(base, MESSAGES, tmp_path / "out", settings("full", epochs=1))
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(to_chat("ask one", "yes", "ask two"),
                                                                              add_generation_prompt=True)  # fmt: skip
    assert (
        ids["input_ids"] == encode(to_chat("ask one", "yes", "ask two"), add_generation_prompt=True)[0][not add_bos :]
    )


OWN = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}yes "
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}ask {{ m['content'] + ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}yes {% endif %}"
)


def test_tokenizer_template_is_used_and_saved(toy, tmp_path):
    tokenizer = toys.tokenizer()
    tokenizer.chat_template = OWN
    base = copy_with_tokenizer(tmp_path / "base", tokenizer, toy.base)
    config = settings(template="tokenizer", batch_size=2, epochs=1)
    figures = train_sft(base, [{"messages": to_chat("one", "here")}] * 2, tmp_path / "out", config)
    ask_id, one_id, yes_id, here_id = (toys.WORDS.index(word) for word in ("ask", "one", "yes", "here"))
    with torch.no_grad():
        want = -toys.log_probs(load_model(base), [ask_id, one_id, yes_id, here_id, EOS])[-2:].mean().item()
    assert figures["first_loss"] == pytest.approx(want, abs=1e-5)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == OWN
    train_dpo(base, tmp_path / "out", PAIRS, tmp_path / "dpo", toys.dpo_settings(template="tokenizer", epochs=1))
    assert (tmp_path / "dpo" / "chat_template.jinja").read_text() == OWN


def test_sft_rejects_template_without_generation_marks(toy, tmp_path):
    tokenizer = toys.tokenizer()
    tokenizer.chat_template = OWN.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    base = copy_with_tokenizer(tmp_path / "base", tokenizer, toy.base)
    with pytest.raises(SnpatchError, match="training: TRL refuses: ") as error:
        train_sft(base, MESSAGES, tmp_path / "out", settings(template="tokenizer"))
    assert "\n" not in str(error.value)
    with pytest.raises(SnpatchError, match="its tokenizer has no chat template; use template='tulu'"):
        train_sft(toy.base, MESSAGES, tmp_path / "other", settings(template="tokenizer"))


def test_sft_rejects_template_with_unlabeled_end_of_turn(toy, tmp_path):
    """The model would never learn to stop."""
    tokenizer = toys.tokenizer()
    tokenizer.chat_template = OWN.replace(
        "{{ m['content'] + eos_token }}{% endgeneration %}", "{{ m['content'] }}{% endgeneration %}{{ eos_token }}"
    )
    base = copy_with_tokenizer(tmp_path / "base", tokenizer, toy.base)
    with pytest.raises(SnpatchError, match="excludes the assistant's end-of-turn token from the loss"):
        train_sft(base, MESSAGES, tmp_path / "out", settings(template="tokenizer"))


def test_template_error_is_one_line(toy, tmp_path):
    tokenizer = toys.tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + OWN
    )
    base = copy_with_tokenizer(tmp_path / "base", tokenizer, toy.base)
    with pytest.raises(SnpatchError, match="training: TRL refuses: no system"):
        train_sft(base, MESSAGES, tmp_path / "out", settings(template="tokenizer"))


@pytest.mark.parametrize("prepend", ["first", "always", "never"])
def test_training_and_engine_tokenize_prompts_alike(tmp_path, prepend):
    """Llama-2's tokenizer adds a space at the start of a text, but not after a BOS that the text contains."""
    letters = sorted({*"<|user|>\n<|assistant|>\nabc", "▁", "<unk>", "<s>", "</s>"})
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", letters.index("<s>"))])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(tmp_path)
    tokenizer, template = load_tokenizer(tmp_path, TrainSettings())
    for turns in (to_chat("a"), to_chat("ab", "c", "b")):
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert list(ids) == template.encode(turns)
        assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.unk_token_id not in ids


# ---- Row counts and rejected inputs


SAME = {"prompt": to_chat("ask one"), "chosen": to_answer("yes"), "rejected": to_answer("yes")}
LENGTHS = [len(encode(row["messages"])[0]) for row in MESSAGES]
PAIR_LENGTHS = [max(len(encode(row["prompt"] + row[answer])[0]) for answer in ("chosen", "rejected")) for row in PAIRS]


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (SAME, "chosen and rejected are the same tokens"),
        (SAME | {"chosen": to_answer("nope"), "rejected": to_answer("yep")}, "chosen and rejected are the same tokens"),
        (
            {"prompt": to_chat("ask one"), "chosen": to_answer("yes " * 40), "rejected": to_answer("yes " * 40 + "no")},
            "chosen and rejected are the same tokens up to max_length",
        ),
        (PAIRS[0] | {"prompt": to_chat("ask " * 18)}, "prompt longer than max_prompt_length = 20 tokens"),
        (PAIRS[0] | {"prompt": to_chat("ask " * 29)}, "prompt not shorter than max_length = 32 tokens"),
    ],
    ids=["same", "same but for unknown words", "same up to max_length", "long prompt", "prompt that leaves no room"],
)
def test_uninformative_pair_is_dropped_and_counted(toy, tmp_path, pair, reason):
    config = toys.dpo_settings(epochs=1, max_prompt_length=20, max_dropped=0.12)
    figures = train_dpo(toy.base, toy.sft(), [*PAIRS[:3], pair, *PAIRS[3:]], tmp_path / "with", config)
    assert figures["dropped"] == {reason: 1}
    assert (figures["rows"], figures["truncated"]) == (9, 0)
    assert f"dropped 1 of 9 rows: {reason}" in read_headline(tmp_path / "with")
    train_dpo(toy.base, toy.sft(), PAIRS, tmp_path / "without", config)
    assert all(map(torch.equal, load_vectors(tmp_path / "with"), load_vectors(tmp_path / "without")))


def test_prompt_of_exactly_max_prompt_length_is_used(toy, tmp_path):
    longest = max(len(encode(row["prompt"], add_generation_prompt=True)[0]) for row in PAIRS)
    config = toys.dpo_settings(epochs=1, max_prompt_length=longest)
    assert train_dpo(toy.base, toy.sft(), PAIRS, tmp_path / "out", config)["dropped"] == {}
    with pytest.raises(SnpatchError, match=f"longer than max_prompt_length = {longest - 1} tokens: more than"):
        train_dpo(
            toy.base,
            toy.sft(),
            PAIRS,
            tmp_path / "few",
            toys.dpo_settings(max_prompt_length=longest - 1, max_dropped=0),
        )


def test_dropping_more_than_max_dropped_or_all_rows_fails(toy, tmp_path):
    rows = [*PAIRS, SAME, SAME]
    config = toys.dpo_settings(epochs=1, max_dropped=0.2)
    assert train_dpo(toy.base, toy.sft(), rows, tmp_path / "most", config)["dropped"].popitem()[1] == 2
    message = r"dropped 2 of 10 rows: chosen and rejected are the same tokens: more than max_dropped = 0\.1 of the rows"
    with pytest.raises(SnpatchError, match=message):
        train_dpo(toy.base, toy.sft(), rows, tmp_path / "many", toys.dpo_settings())
    with pytest.raises(SnpatchError, match="dropped 3 of 3 rows"):
        train_dpo(toy.base, toy.sft(), [SAME] * 3, tmp_path / "all", toys.dpo_settings(max_dropped=1.0))
    long_pairs = [PAIRS[0] | {"prompt": to_chat("ask " * 40)}] * 2
    with pytest.raises(SnpatchError, match="dropped 2 of 2 rows: prompt not shorter than max_length = 32 tokens"):
        train_dpo(toy.base, toy.sft(), long_pairs, tmp_path / "long", toys.dpo_settings(max_dropped=1.0))


@pytest.mark.parametrize("less", [0, 1, 3])
def test_truncated_rows_are_counted_exactly(toy, tmp_path, less):
    limit = max(LENGTHS) - less
    figures = train_sft(toy.base, MESSAGES, tmp_path / "sft", settings(batch_size=8, epochs=1, max_length=limit))
    assert figures["truncated"] == sum(length > limit for length in LENGTHS) == (0 if less == 0 else 1)
    assert figures["dropped"] == {}
    with torch.no_grad():
        assert figures["first_loss"] == pytest.approx(
            toys.compute_sft_loss(load_model(toy.base), limit).item(), abs=1e-5
        )
    limit = max(PAIR_LENGTHS) - less
    figures = train_dpo(toy.base, toy.sft(), PAIRS, tmp_path / "dpo", toys.dpo_settings(epochs=1, max_length=limit))
    assert figures["truncated"] == sum(length > limit for length in PAIR_LENGTHS)
    assert (figures["truncated"] > 0) == (less > 0)
    assert (f"truncated {figures['truncated']} of 8 rows at max_length" in read_headline(tmp_path / "dpo")) == (
        less > 0
    )


def test_conversation_without_answer_within_max_length_is_dropped(toy, tmp_path):
    rows = [*MESSAGES, {"messages": to_chat("ask " * 40, "yes")}]
    reason = "no assistant token within max_length = 32"
    figures = train_sft(toy.base, rows, tmp_path / "with", settings(epochs=1, max_dropped=0.12))
    assert (figures["dropped"], figures["truncated"]) == ({reason: 1}, 0)
    assert f"dropped 1 of 9 rows: {reason}" in read_headline(tmp_path / "with")
    train_sft(toy.base, MESSAGES, tmp_path / "without", settings(epochs=1, max_dropped=0.12))
    assert all(map(torch.equal, load_vectors(tmp_path / "with"), load_vectors(tmp_path / "without")))
    with pytest.raises(SnpatchError, match=f"dropped 1 of 9 rows: {reason}: more than max_dropped"):
        train_sft(toy.base, rows, tmp_path / "out", settings())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected rows with messages, got none"),
        ([{"text": "ask one"}], "expected rows with messages, row 0 has text"),
        ([MESSAGES[0], {"text": "ask one"}], "expected rows with messages, row 1 has text"),
        ([MESSAGES[0], {"messages": to_chat("ask one")}], "row 1 has no assistant turn"),
        (
            [MESSAGES[0], {"messages": [{"role": "tool", "content": "no"}, *to_chat("ask one", "yes")]}],
            r"row 1: expected a role of the Tulu template \(system, user, assistant\), got 'tool'",
        ),
    ],
)
def test_sft_rejects_bad_conversations(toy, tmp_path, rows, message):
    with pytest.raises(SnpatchError, match=message):
        train_sft(toy.base, rows, tmp_path / "out", settings())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected rows with prompt, chosen, rejected, got none"),
        (
            [{"prompt": to_chat("ask one"), "chosen": to_answer("no")}],
            "expected rows with prompt, chosen, rejected, row 0 has prompt, chosen$",
        ),
        ([PAIRS[0], {"prompt": to_chat("ask one"), "chosen": to_answer("no")}], "row 1 has prompt, chosen$"),
    ],
)
def test_dpo_rejects_bad_preferences(toy, tmp_path, rows, message):
    with pytest.raises(SnpatchError, match=message):
        train_dpo(toy.base, toy.sft(), rows, tmp_path / "out", toys.dpo_settings())
    assert not (tmp_path / "out").exists()


def test_row_longer_than_model_context_is_rejected(toy, tmp_path):
    """max_length may exceed the context if no row does."""
    base = copy_with_tokenizer(tmp_path / "base", toys.tokenizer(), toy.base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    train_sft(base, MESSAGES, tmp_path / "sft", settings(epochs=1, max_length=400))
    longer = [*MESSAGES, {"messages": to_chat("ask " * 20, "yes")}]
    with pytest.raises(
        SnpatchError, match=r"at most 20 tokens, the model's context, got 25 in row .* Set max_length = 20"
    ):
        train_sft(base, longer, tmp_path / "out", settings(epochs=1, max_length=400))
    pair = {"prompt": to_chat("ask " * 20), "chosen": to_answer("no"), "rejected": to_answer("yes")}
    with pytest.raises(SnpatchError, match="at most 20 tokens, the model's context, got 25"):
        train_dpo(base, None, [*PAIRS, pair], tmp_path / "dpo", toys.dpo_settings(epochs=1, max_length=400))


def test_tokenizer_that_appends_eos_is_rejected(toy, tmp_path):
    """An engine's prompt would contain an EOS that training never sees."""
    tokenizer = toys.tokenizer()
    tokenizer.backend_tokenizer.post_processor = toys.processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", EOS)]
    )
    base = copy_with_tokenizer(tmp_path / "base", tokenizer, toy.base)
    with pytest.raises(SnpatchError, match="its tokenizer appends '</s>' to every text"):
        train_sft(base, MESSAGES, tmp_path / "sft", settings())
    with pytest.raises(SnpatchError, match="its tokenizer appends '</s>' to every text"):
        train_dpo(base, None, PAIRS, tmp_path / "dpo", toys.dpo_settings())


@pytest.mark.parametrize(
    ("sft", "options", "message"),
    [
        (
            "ia3",
            {"method": "lora"},
            "expected a LoRA as SFT adapter with method = lora, got IA3. Use method = ia3, or a checkpoint",
        ),
        (
            "ia3",
            {"method": "full"},
            "expected no SFT adapter with method = full, which trains checkpoints. Pass the SFT",
        ),
        ("lora", {"method": "full"}, "expected no SFT adapter with method = full"),
        ("full", {}, "neither adapter_model.safetensors nor adapter_model.bin"),
    ],
)
def test_dpo_rejects_method_that_cannot_continue_sft(toy, tmp_path, sft, options, message):
    with pytest.raises(SnpatchError, match=message):
        train_dpo(toy.base, toy.sft(sft), PAIRS, tmp_path / "out", toys.dpo_settings(**options))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_zero_sft_scale_fails_with_its_neuron(toy, tmp_path):
    sft = copy_with_scale(toy.sft(), tmp_path / "sft", 1, 17, 0.0)
    with pytest.raises(SnpatchError, match=r"the scale of layer 1, neuron 17 is 0 \(and 0 more"):
        train_dpo(toy.base, sft, PAIRS, tmp_path / "out", toys.dpo_settings())
    train_dpo(toy.base, sft, PAIRS, tmp_path / "published", toys.dpo_settings(epochs=1, as_published=True))
    assert all(vector.isfinite().all() for vector in load_vectors(tmp_path / "published"))


def test_non_finite_factor_is_not_saved(toy, tmp_path):
    sft = copy_with_scale(toy.sft(), tmp_path / "sft", 0, 5, 1e-44)
    with pytest.raises(SnpatchError, match="the scale of layer 0, neuron 5 is not finite"):
        train_dpo(toy.base, sft, PAIRS, tmp_path / "out", toys.dpo_settings(epochs=1))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_nan_loss_stops_training_at_its_step(toy, tmp_path):
    with pytest.raises(SnpatchError, match=r"expected a finite loss, got nan at step 2\. Lower the learning rate"):
        train_sft(toy.base, MESSAGES, tmp_path / "sft", settings(learning_rate=1e38))
    sft = copy_with_scale(toy.sft(), tmp_path / "broken", 0, 5, math.inf)
    with pytest.raises(SnpatchError, match="holds NaN or infinity"):
        train_dpo(toy.base, sft, PAIRS, tmp_path / "dpo", toys.dpo_settings())
    for out in ("sft", "dpo"):
        assert not (tmp_path / out / "adapter_model.safetensors").exists()
        assert not (tmp_path / out / "training.json").exists()


def test_infinite_gradient_stops_training_with_finite_loss():
    state = TrainerState(global_step=7, max_steps=9)
    with pytest.raises(SnpatchError, match="expected a finite gradient norm, got inf at step 7"):
        LossMonitor(None).on_log(None, state, None, {"loss": 0.5, "grad_norm": math.inf})
    LossMonitor(None).on_log(None, state, None, {"loss": 0.5, "grad_norm": 1e30})


def test_training_fails_if_adapter_unchanged(toy, tmp_path):
    with pytest.raises(SnpatchError, match="no trained value changed"):
        train_sft(toy.base, MESSAGES, tmp_path / "out", settings(learning_rate=1e-30, epochs=1))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_unchanged_parameters_are_listed(toy, tmp_path):
    """A LoRA's first factor has no gradient while its second is 0."""
    figures = train_sft(toy.base, MESSAGES, tmp_path / "out", settings("lora", batch_size=8, epochs=1, weight_decay=0))
    assert len(figures["unchanged_parameters"]) == LAYERS * 2
    assert all("lora_A" in name for name in figures["unchanged_parameters"])
    assert any(
        line.startswith(f"{LAYERS * 2} trained parameters did not change, ") for line in read_headline(tmp_path / "out")
    )


def test_trl_error_is_one_line(toy, tmp_path):
    for config, options in (
        (settings(lr_scheduler_type="uphill"), {}),
        (settings(), {"report_to": ["nowhere"]}),
        (settings(), {"report_to": ["clearml"]}),
        (settings("lora", lora_targets=("nothing",)), {}),
    ):
        with pytest.raises(SnpatchError, match="training: TRL refuses: ") as error:
            train_sft(toy.base, MESSAGES, tmp_path / "out", config, **options)
        assert "\n" not in str(error.value)
        shutil.rmtree(tmp_path / "out")


# ---- Settings


def test_default_settings_match_paper():
    for kind in (TrainSettings, DpoSettings):
        defaults = kind()
        assert (defaults.method, defaults.peak_learning_rate, defaults.epochs, defaults.batch_size) == (
            "ia3",
            1e-3,
            3,
            120,
        )
        assert (defaults.weight_decay, defaults.weight_decay_target) == (0.1, 0)
        assert (defaults.lr_scheduler_type, defaults.warmup_steps, defaults.max_length) == ("cosine", 0, 4096)
        assert (defaults.lora_rank, defaults.lora_targets, defaults.template) == (64, ("q_proj", "v_proj"), "tulu")
    defaults = DpoSettings()
    assert (defaults.beta, defaults.max_prompt_length, defaults.as_published) == (0.1, 2048, False)


def test_learning_rate_default_depends_on_method():
    assert SFT_LEARNING_RATES == {"ia3": 1e-3, "lora": 2e-5, "full": 2e-5}
    assert DPO_LEARNING_RATES == {"ia3": 1e-3, "lora": 2e-5, "full": 5e-7}
    for method in ("ia3", "lora", "full"):
        assert (TrainSettings(method=method).peak_learning_rate, DpoSettings(method=method).peak_learning_rate) == (
            SFT_LEARNING_RATES[method],
            DPO_LEARNING_RATES[method],
        )
        assert (
            TrainSettings(method=method, learning_rate=0.5).peak_learning_rate
            == DpoSettings(method=method, learning_rate=0.5).peak_learning_rate
            == 0.5
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "all"}, "method.* one of ia3, lora, full, got 'all'"),
        ({"template": "chatml"}, "template.* one of tulu, tokenizer, got 'chatml'"),
        ({"micro_batch_size": 7}, "micro_batch_size: expected a divisor of batch_size = 120, got 7"),
        ({"micro_batch_size": 0}, "micro_batch_size.* at least 1, got 0"),
        ({"batch_size": 0}, "^batch_size.* at least 1, got 0"),
        ({"weight_decay_target": 0.5}, "weight_decay_target.* one of 0, 1, got 0.5"),
        ({"weight_decay_target": 1, "method": "lora"}, "weight_decay_target: expected 0 with method = lora, got 1"),
        ({"weight_decay_target": 1, "method": "full"}, "weight_decay_target: expected 0 with method = full, got 1"),
        ({"epochs": 0}, "epochs: expected more than 0, got 0"),
        ({"learning_rate": 0}, "learning_rate: expected more than 0, got 0"),
        ({"learning_rate": -0.1}, "learning_rate: expected more than 0, got -0.1"),
        ({"dtype": "int8"}, "dtype.*int8"),
        ({"dtype": "float16"}, "dtype.* one of auto, bfloat16, float32, got 'float16'"),
        ({"weight_decay": -1}, "weight_decay.* at least 0, got -1"),
        ({"max_length": 1}, "max_length.* at least 2, got 1"),
    ],
)
def test_invalid_settings_raise(fields, message):
    for kind in (TrainSettings, DpoSettings):
        with pytest.raises(SnpatchError, match=message):
            kind(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0}, "beta: expected more than 0, got 0"),
        ({"as_published": True, "method": "lora"}, "as_published: expected method = ia3, got lora"),
    ],
)
def test_invalid_dpo_settings_raise(fields, message):
    with pytest.raises(SnpatchError, match=message):
        DpoSettings(**fields)


def test_missing_extra_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "snpatch.training.trainer")
    with pytest.raises(ImportError, match=r"pip install 'peft.*' 'trl.*' 'accelerate"):
        importlib.import_module("snpatch.training.trainer")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharded_training_is_rejected(toy, tmp_path, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(SnpatchError, match=f"expected data parallel training, accelerate's config selects {name}"):
        train_sft(toy.base, MESSAGES, tmp_path / "out", settings())


def test_accelerate_precision_setting_is_ignored(toy, tmp_path, monkeypatch):
    plain_loss = train_sft(toy.base, MESSAGES, tmp_path / "a", settings(epochs=1))["first_loss"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train_sft(toy.base, MESSAGES, tmp_path / "b", settings(epochs=1))["first_loss"] == plain_loss


def test_pair_whose_prompt_is_not_prefix_of_answers_is_dropped():
    rows = {
        "prompt_ids": [[1, 7, 5, 6], [1, 8, 5, 6], [1, 7, 5]],
        "chosen_ids": [[9, 2]] * 3,
        "rejected_ids": [[8, 2]] * 3,
    }
    pairs, stats = filter_pairs(Dataset.from_dict(rows), 3, DpoSettings(max_dropped=0.4), context=99)
    assert pairs["prompt_ids"] == rows["prompt_ids"][:2]
    assert dict(stats.dropped) == {"the template does not render the prompt as the beginning of its answers": 1}


IA3_OF_DOWN_PROJ = {"target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}
DOWN_PROJ_KEY = "base_model.model.model.layers.0.mlp.down_proj.ia3_l"


def keep(tensors):
    return tensors


@pytest.mark.parametrize(
    ("config", "change", "fields", "message"),
    [
        (IA3Config(**IA3_OF_DOWN_PROJ), lambda t: {k: v for k, v in t.items() if k != DOWN_PROJ_KEY}, {}, "no tensor"),
        (
            IA3Config(**IA3_OF_DOWN_PROJ),
            lambda t: {k.replace("model.model.model", "model.model.transformer"): v for k, v in t.items()},
            {},
            "transformer",
        ),
        (IA3Config(**IA3_OF_DOWN_PROJ), keep, {"scaling_alpha": 3}, "scaling_alpha = 3 is not supported"),
        (IA3Config(**IA3_OF_DOWN_PROJ, modules_to_save=["lm_head"]), keep, {}, "modules_to_save"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), keep, {}, "IA3 on q_proj is not supported"),
        (LoraConfig(), lambda t: {k: v for k, v in t.items() if "layers.0." not in k}, {}, "no matrices for"),
        (LoraConfig(init_lora_weights="pissa"), keep, {}, "init_lora_weights = 'pissa' is not supported"),
        (LoraConfig(modules_to_save=["lm_head"]), keep, {}, "modules_to_save"),
    ],
)
def test_dpo_on_an_sft_adapter_that_engines_refuse_is_an_error(toy, tmp_path, config, change, fields, message):
    config.task_type = "CAUSAL_LM"
    if config.target_modules is None:
        config.target_modules = {"q_proj", "down_proj"}
    get_peft_model(load_model(toy.base), config).save_pretrained(tmp_path / "sft")
    tensors = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    save_file(change(tensors), tmp_path / "sft" / "adapter_model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "sft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    method = "ia3" if isinstance(config, IA3Config) else "lora"
    with pytest.raises(SnpatchError, match=message) as caught:
        train_dpo(toy.base, tmp_path / "sft", PAIRS, tmp_path / "out", toys.dpo_settings(method, epochs=1))
    assert "\n" not in str(caught.value)
