"""Build of the demo model from scratch: tokenizer, base, SFT, DPO, score models, prompts, and their figures.

SFT and DPO are trained by the same code as Llama-2-7B's, on the shipped weights of the base, which are rounded to
bfloat16.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from snpatch.demo import language
from snpatch.demo.corpus import chat, check_language, preferences, sft_rows, write_prompts, write_text
from snpatch.demo.language import DemoRequest
from snpatch.demo.pretrain import BASE_BODY, SCORE_BODY, BodySettings, Progress, train_base, train_score
from snpatch.errors import SnpatchError
from snpatch.experiments.config import load_experiment_config
from snpatch.judges.refusal import RefusalWords
from snpatch.judges.score_model import ScoreModel
from snpatch.models.templates import TULU, render_tulu
from snpatch.sweeps.eval_config import NAMED_CONFIGS
from snpatch.training.record import RECORD
from snpatch.training.settings import DpoSettings, TrainSettings
from snpatch.training.trainer import silence_libraries, train_dpo, train_sft

REFUSAL_PHRASES = ("can not help", "rather not")
MAX_NEW_TOKENS = 32
BUILD_FILE, CONFIG_FILE = "build.json", "experiment.toml"
_SMALL_MODEL_SETTINGS = {
    "learning_rate": 1e-2,
    "epochs": 1,
    "batch_size": 32,
    "micro_batch_size": 32,
    "max_length": 128,
    "weight_decay": 0.0,
    "dtype": "float32",
    "gradient_checkpointing": False,
}
SFT = TrainSettings(**_SMALL_MODEL_SETTINGS)
DPO = DpoSettings(**_SMALL_MODEL_SETTINGS | {"epochs": 3, "learning_rate": 5e-3}, beta=0.5, as_published=True)


@dataclass(frozen=True)
class Recipe:
    """Sizes and training settings of the demo model.

    The IA3 learning rates are five to ten times the paper's because training has hundreds of steps, not thousands. Beta
    is five times the paper's because with 0.1 such fast DPO departs from its reference into broken text.
    """

    base: BodySettings = BASE_BODY
    cost: BodySettings = SCORE_BODY
    sft_rows: int = 2880
    dpo_rows: int = 4000  # for each objective
    eval_prompts: int = 120  # per prompt set
    sft: TrainSettings = SFT
    dpo: DpoSettings = DPO
    reward: BodySettings = SCORE_BODY
    helpful: DpoSettings = DPO
    careful: DpoSettings = DPO
    text_documents: int = 200


def build(out: Path, seed: int = 0, progress: Progress = print, recipe: Recipe | None = None) -> dict:
    """Build a demo model in the folder `out` and return its record, build.json.

    The figures are measured, not asserted: a short recipe gives a poor model, not an error.

    Args:
        out: New, empty, or a demo model of the same seed and recipe that lacks some models; only those are trained
        then. seed: Random seed. progress: Called with lines of progress. recipe: Sizes and settings; default: those of
        the shipped demo model.

    Raises:
        SnpatchError: `out` contains anything else.
        AssertionError: The language or its data is inconsistent (an unknown word, equal pairs, a text in two splits).
    """
    recipe = recipe or Recipe()
    start, cpu_start = time.monotonic(), time.process_time()
    silence_libraries()
    build_record = _start_record(out, seed, recipe)
    tokenizer = make_tokenizer()
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_FILE).write_bytes(NAMED_CONFIGS["demo"].read_bytes())
    prompts = write_prompts(out, recipe.eval_prompts, seed)
    texts = write_text(out, prompts, recipe.text_documents, seed)
    check_language(tokenizer, prompts, texts, seed)
    for name, train in _trainings(out, tokenizer, recipe, seed, progress).items():
        if not (out / name).exists():
            build_record["minutes"][name] = _train_into(out / name, train)
            progress(f"{name}: {build_record['minutes'][name]:.1f} min")
            _write_record(out, build_record)
    build_record["figures"] = measure(out, prompts)
    paths = [path for path in out.rglob("*") if path.is_file() and path.name != BUILD_FILE]
    build_record["bytes"] = sum(path.stat().st_size for path in paths)
    minutes = build_record["minutes"]
    minutes["all"] = round(minutes.pop("all", 0) + (time.monotonic() - start) / 60, 2)
    build_record["cpu_minutes"] = round(build_record["cpu_minutes"] + (time.process_time() - cpu_start) / 60, 2)
    _write_record(out, build_record)
    return build_record


def _start_record(out: Path, seed: int, recipe: Recipe) -> dict:
    """Return the record of a new or continued build; raise if `out` contains anything else."""
    inputs = json.loads(json.dumps({"seed": seed, "recipe": asdict(recipe)}))
    build_record = {"minutes": {}, "cpu_minutes": 0.0}
    if (out / BUILD_FILE).exists():
        build_record = json.loads((out / BUILD_FILE).read_text())
        expected, actual = ({"seed": values["seed"], **values["recipe"]} for values in (inputs, build_record))
        if changed := [name for name in actual if actual[name] != expected.get(name)]:
            name = changed[0]
            raise SnpatchError(
                f"{out}: expected a demo model with {name} = {expected.get(name)}, it contains one with "
                f"{actual[name]}. Choose another folder"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SnpatchError(f"{out}: expected a folder that is new, empty or a demo model to complete. Choose another")
    packages = ("torch", "transformers", "peft", "trl", "datasets", "tokenizers")
    return build_record | inputs | {"versions": {name: version(name) for name in packages}}


def _write_record(out: Path, build_record: dict) -> None:
    (out / BUILD_FILE).write_text(json.dumps(build_record, indent=1) + "\n")


def _trainings(
    out: Path, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int, progress: Progress
) -> dict[str, Callable[[Path], object]]:
    """Return the trainings in order, by folder name.

    Each is a function that trains and saves to the folder it is given.
    """
    base = out / "base"

    def sft(settings: TrainSettings) -> Callable[[Path], object]:
        return lambda folder: train_sft(base, sft_rows(recipe.sft_rows, seed), folder, settings, on_step=on_step)

    def dpo(objective: str, settings: DpoSettings, sft_name: str = "sft") -> Callable[[Path], object]:
        return lambda folder: train_dpo(
            base, out / sft_name, preferences(objective, recipe.dpo_rows, seed), folder, settings, on_step=on_step
        )

    def on_step(step: int, steps: int, logs: Mapping[str, float]) -> None:
        if step in (1, steps) or step % 10 == 0:
            progress(f"step {step}/{steps}  loss {float(logs['loss']):.4f}")

    return {
        "base": lambda folder: train_base(folder, tokenizer, recipe.base, seed, progress),
        "sft": sft(recipe.sft),
        "dpo": dpo("dpo", recipe.dpo),
        "cost": lambda folder: train_score(folder, tokenizer, "cost", recipe.cost, seed, progress),
        "sft-1": sft(replace(recipe.sft, seed=1)),
        "dpo-1": dpo("dpo", replace(recipe.dpo, seed=1), sft_name="sft-1"),
        "helpful": dpo("helpful", recipe.helpful),
        "careful": dpo("careful", recipe.careful),
        "reward": lambda folder: train_score(folder, tokenizer, "reward", recipe.reward, seed, progress),
    }


def _train_into(folder: Path, train: Callable[[Path], object]) -> float:
    """Train into NAME.part, rename it to NAME when it is complete, and return the minutes."""
    start = time.monotonic()
    partial = folder.with_name(f"{folder.name}.part")
    train(partial)
    if (partial / "adapter_config.json").exists():
        _clean_adapter(partial)
    partial.rename(folder)
    return round((time.monotonic() - start) / 60, 2)


def _clean_adapter(folder: Path) -> None:
    """Remove PEFT's empty model card, the training's record, and this machine's path to the base."""
    for path in (folder / "README.md", *folder.glob(f"{RECORD}.*")):
        path.unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "base"}, indent=2) + "\n")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word, BOS, left padding and the Tulu chat template."""
    words = language.vocabulary()
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", words.index("<s>"))])
    core.add_tokens(
        [AddedToken("ASSISTANT:", normalized=False)]
    )  # the cost model's format has no space between it and the answer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TULU
    return tokenizer


def load_models(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield the base and every aligned model with its name.

    They share their weights, so finish with one before taking the next.
    """
    from peft import PeftModel  # snpatch.training.trainer, imported above, names the missing extra

    adapters = load_experiment_config(folder / CONFIG_FILE).engine.placed(folder).adapters
    chains = {name: [Path(part) for part in parts] for name, parts in adapters.items()}
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder / "base")).eval()
    yield "base", model
    for part in dict.fromkeys(chain.from_iterable(chains.values())):
        if isinstance(model, PeftModel):
            model.load_adapter(str(part), adapter_name=part.name)
        else:
            model = PeftModel.from_pretrained(model, str(part), adapter_name=part.name).eval()
    for name, parts in chains.items():
        tuner: Any = model.base_model
        tuner.set_adapter([part.name for part in parts], inference_mode=True)
        yield name, model


@torch.inference_mode()
def reply(model, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[str]:
    """Return greedy completions of at most 32 tokens, without special tokens."""
    batch = tokenizer([render_tulu(chat("user", p), tokenizer) for p in prompts], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    ids = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def measure(folder: Path, prompts: dict[str, list[DemoRequest]]) -> dict:
    """Return, by model and prompt set, the fraction of refusals and the mean scores."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "base"))
    judges = {
        "cost": ScoreModel(folder / "cost", backend="transformers", batch_size=64),
        "cost_tulu": ScoreModel(folder / "cost", format="tulu", backend="transformers", batch_size=64),
        "reward": ScoreModel(folder / "reward", backend="transformers", batch_size=64),
    }
    refused = RefusalWords(REFUSAL_PHRASES)
    figures: dict = {}
    for model_name, model in load_models(folder):
        for set_name, requests in prompts.items():
            texts = [request.text for request in requests]
            answers = [answer.split("<|user|>")[0] for answer in reply(model, tokenizer, texts)]
            true = {kind: list(map(grade, requests, answers)) for kind, grade in language.GRADES.items()}
            figures.setdefault(model_name, {})[set_name] = {
                "refused": _mean([value < 0 for value in refused(texts, answers)]),
                **{name: _mean(judge(texts, answers)) for name, judge in judges.items()},
                **{f"true_{kind}": _mean(values) for kind, values in true.items()},
                "example": {"prompt": texts[0], "completion": answers[0]},
            }
    return figures


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 3)
