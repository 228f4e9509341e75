"""A few steps of SFT and DPO on a toy: what is trained, what is saved, and what is refused."""

import importlib
import json
import math
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from snpatch.errors import SnpatchError
from snpatch.models.templates import TULU
from snpatch.training.settings import DpoSettings, TrainSettings
from snpatch.training.training import train_dpo, train_sft

WORDS = "<unk> <s> </s> <pad> <|user|> <|assistant|> ask one two three yes here it is no never".split()
TOY = {
    "learning_rate": 0.1,
    "epochs": 30,
    "batch_size": 8,
    "max_length": 32,
    "weight_decay": 0.0,
    "bf16": False,
    "gradient_checkpointing": False,
}
LAYERS, NEURONS = 2, 96


def said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


MESSAGES = [{"messages": said("user", f"ask {n}") + said("assistant", "yes here it is")} for n in ("one", "two")] * 4
PAIRS = [
    {
        "prompt": said("user", f"ask {n}"),
        "chosen": said("assistant", "no never"),
        "rejected": said("assistant", "yes here it is"),
    }
    for n in ("one", "two")
] * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama with a word-level tokenizer that has no chat template."""
    folder = tmp_path_factory.mktemp("base")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Both adapters, trained with a handful of steps each, and the figures of the two runs."""
    out, lines = tmp_path_factory.mktemp("adapters"), []
    sft = train_sft(base, MESSAGES, out / "sft", TrainSettings(**TOY, micro_batch_size=4), lines.append)
    dpo = train_dpo(base, out / "sft", PAIRS, out / "dpo", DpoSettings(**TOY, micro_batch_size=4), lines.append)
    return out, sft, dpo, lines


def log_probability(model, tokenizer, content: str) -> float:
    """Of an answer and its EOS, summed over tokens, as an answer to "ask one"."""
    prompt = tokenizer("<|user|>\nask one\n<|assistant|>\n")["input_ids"]
    answer = tokenizer(content + "</s>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(answer)), answer].sum())


def test_template_is_tulus_with_bos_and_eos(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TULU
    turns = said("user", "ask one") + said("assistant", "yes") + said("user", "ask two")
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|user|>\nask one\n<|assistant|>\nyes</s>\n<|user|>\nask two\n<|assistant|>\n"
    ids = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer("<|user|>\nask one\n<|assistant|>\n")["input_ids"]


def test_sft_loss_covers_the_answer_and_eos_only(base, trained):
    _, sft, _, _ = trained
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    assert sft["first_loss"] == pytest.approx(_first_loss(model, tokenizer), abs=1e-3)


def _first_loss(model, tokenizer) -> float:
    """Of the untrained model, a mean over the five answer tokens of both prompts."""
    total = 0.0
    for number in ("one", "two"):
        prompt = tokenizer(f"<|user|>\nask {number}\n<|assistant|>\n")["input_ids"]
        answer = tokenizer("yes here it is</s>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total -= float(logits.log_softmax(-1)[range(len(answer)), answer].sum())
    return total / 10


def test_adapters_are_saved_in_pefts_format(trained):
    out, sft, dpo, lines = trained
    for name in ("sft", "dpo"):
        tensors = load_file(out / name / "adapter_model.safetensors")
        keys = {f"base_model.model.model.layers.{i}.mlp.down_proj.ia3_l" for i in range(LAYERS)}
        assert set(tensors) == keys
        assert all(t.shape == (1, NEURONS) and t.dtype == torch.float32 for t in tensors.values())
        assert any((t - 1).abs().max() > 0.1 for t in tensors.values())
        config = json.loads((out / name / "adapter_config.json").read_text())
        assert config["peft_type"] == "IA3"
        assert config["target_modules"] == config["feedforward_modules"] == ["down_proj"]
    assert sft["steps"] == dpo["steps"] == 30
    assert any(line.startswith("step 30/30") for line in lines)


def test_learning_happens_and_the_two_stack(base, trained):
    out, sft, dpo, _ = trained
    assert sft["last_loss"] < 0.5 * sft["first_loss"]
    assert dpo["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert dpo["last_loss"] < 0.5 * dpo["first_loss"]
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    yes, no = "yes here it is", "no never"
    before = log_probability(model, tokenizer, yes)
    model = PeftModel.from_pretrained(model, out / "sft", adapter_name="sft").eval()
    assert log_probability(model, tokenizer, yes) > before + 1
    margin = log_probability(model, tokenizer, no) - log_probability(model, tokenizer, yes)
    model.load_adapter(out / "dpo", adapter_name="dpo")
    model.base_model.set_adapter(["sft", "dpo"], inference_mode=True)
    assert log_probability(model, tokenizer, no) - log_probability(model, tokenizer, yes) > margin + 5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "wanted rows with the columns"),
        ([{"prompt": said("user", "ask one"), "chosen": said("assistant", "no")}], "wanted rows with the columns"),
        ([PAIRS[0], PAIRS[0] | {"chosen": PAIRS[0]["rejected"]}], "pair 1 are the same tokens"),
        ([PAIRS[0] | {"prompt": said("user", "ask " * 40)}], "longer than max_prompt_length=20"),
    ],
)
def test_bad_preferences_are_refused(base, trained, tmp_path, rows, message):
    settings = DpoSettings(**TOY, micro_batch_size=4, max_prompt_length=20)
    with pytest.raises(SnpatchError, match=message):
        train_dpo(base, trained[0] / "sft", rows, tmp_path, settings)


def test_pairs_that_differ_only_in_unknown_words_are_refused(base, trained, tmp_path):
    pair = PAIRS[0] | {"chosen": said("assistant", "nope"), "rejected": said("assistant", "yep")}
    with pytest.raises(SnpatchError, match="the same tokens"):
        train_dpo(base, trained[0] / "sft", [pair], tmp_path, DpoSettings(**TOY, micro_batch_size=4))


def test_micro_batches_must_divide_the_batch():
    with pytest.raises(SnpatchError, match="must divide batch_size, got 7 and 120"):
        TrainSettings(micro_batch_size=7)


def test_defaults_are_the_papers():
    settings = DpoSettings()
    assert (settings.learning_rate, settings.epochs, settings.batch_size) == (1e-3, 3, 120)
    assert (settings.max_length, settings.max_prompt_length) == (4096, 2048)
    assert (settings.weight_decay, settings.schedule, settings.warmup_steps) == (0.1, "cosine", 0)
    assert (settings.beta, settings.bf16) == (0.1, True)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "snpatch.training.training")
    with pytest.raises(ImportError, match=r"pip install 'snpatch\[train\]'"):
        importlib.import_module("snpatch.training.training")
