"""Builds the demo model from nothing: tokenizer, base, SFT, DPO, score models, prompts, and what they measure.

SFT and DPO are trained by the same code that trains Llama-2-7B's, on the base's weights as rounded to bfloat16: the
ones that are shipped.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from snpatch.demo import language
from snpatch.demo.corpus import chat, check_language, preferences, sft_rows, write_prompts, write_text
from snpatch.demo.language import Request
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

REFUSALS = ("can not help", "rather not")
NEW_TOKENS = 32
BUILD_FILE = "build.json"
_SMALL = {
    "learning_rate": 1e-2,
    "epochs": 1,
    "batch_size": 32,
    "micro_batch_size": 32,
    "max_length": 128,
    "weight_decay": 0.0,
    "dtype": "float32",
    "gradient_checkpointing": False,
}
SFT = TrainSettings(**_SMALL)
DPO = DpoSettings(**_SMALL | {"epochs": 3, "learning_rate": 5e-3}, beta=0.5, as_published=True)


@dataclass(frozen=True)
class Recipe:
    """Sizes of the world and of its training.

    The IA3 learning rates are five to ten times the paper's because a toy has hundreds of steps, not thousands; beta
    is five times the paper's because at 0.1 so fast a DPO runs from its reference into broken text.
    """

    base: BodySettings = BASE_BODY
    cost: BodySettings = SCORE_BODY
    sft_rows: int = 2880
    dpo_rows: int = 4000  # for each objective
    eval_prompts: int = 120  # a set
    sft: TrainSettings = SFT
    dpo: DpoSettings = DPO
    reward: BodySettings = SCORE_BODY
    helpful: DpoSettings = DPO
    careful: DpoSettings = DPO
    text_documents: int = 200


def build(out: Path, seed: int = 0, progress: Progress = print, recipe: Recipe | None = None) -> dict:
    """Make a whole world in the folder `out` and return the record in build.json.

    out: new, empty, or a world of the same seed and recipe that lacks some models: only they are trained then. Raises
    AssertionError if the language or its data is not what the world promises (an unknown word, equal pairs, a text in
    two places). The figures are measured, not asserted: a short recipe gives a poor world, not an error.
    """
    recipe = recipe or Recipe()
    begin, cpu = time.monotonic(), time.process_time()
    silence_libraries()
    world = _begun(out, seed, recipe)
    tokenizer = make_tokenizer()
    out.mkdir(parents=True, exist_ok=True)
    (out / "experiment.toml").write_bytes(NAMED_CONFIGS["demo"].read_bytes())
    prompts = write_prompts(out, recipe.eval_prompts, seed)
    plain = write_text(out, prompts, recipe.text_documents, seed)
    check_language(tokenizer, prompts, plain, seed)
    for name, train in _trainings(out, tokenizer, recipe, seed, progress).items():
        if not (out / name).exists():
            world["minutes"][name] = _train_into(out / name, train)
            progress(f"{name}: {world['minutes'][name]:.1f} min")
            _write_record(out, world)
    world["figures"] = measure(out, prompts)
    world["bytes"] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name != BUILD_FILE)
    world["minutes"]["all"] = round(world["minutes"].pop("all", 0) + (time.monotonic() - begin) / 60, 2)
    world["cpu_minutes"] = round(world["cpu_minutes"] + (time.process_time() - cpu) / 60, 2)
    _write_record(out, world)
    return world


def _begun(out: Path, seed: int, recipe: Recipe) -> dict:
    """What world.json is to hold, as far as it is known; raises SnpatchError if `out` holds anything else."""
    made_by = json.loads(json.dumps({"seed": seed, "recipe": asdict(recipe)}))
    world = {"minutes": {}, "cpu_minutes": 0.0}
    if (out / BUILD_FILE).exists():
        world = json.loads((out / BUILD_FILE).read_text())
        wanted, got = ({"seed": it["seed"], **it["recipe"]} for it in (made_by, world))
        other = [name for name in got if got[name] != wanted.get(name)]
        if other:
            name = other[0]
            raise SnpatchError(f"{out}: holds another demo model: {name} is to be {wanted.get(name)}, got {got[name]}")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SnpatchError(f"{out}: wanted a folder that is new, empty or a demo model to complete")
    packages = ("torch", "transformers", "peft", "trl", "datasets", "tokenizers")
    return world | made_by | {"versions": {name: version(name) for name in packages}}


def _write_record(out: Path, world: dict) -> None:
    (out / BUILD_FILE).write_text(json.dumps(world, indent=1) + "\n")


def _trainings(
    out: Path, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int, progress: Progress
) -> dict[str, Callable[[Path], object]]:
    """What is trained, in order: the name of its folder -> the training, which saves to the folder that it is given."""
    base = out / "base"

    def sft(settings: TrainSettings) -> Callable[[Path], object]:
        return lambda to: train_sft(base, sft_rows(recipe.sft_rows, seed), to, settings, on_step=on_step)

    def dpo(objective: str, settings: DpoSettings, on: str = "sft") -> Callable[[Path], object]:
        return lambda to: train_dpo(
            base, out / on, preferences(objective, recipe.dpo_rows, seed), to, settings, on_step=on_step
        )

    def on_step(step: int, steps: int, logs: Mapping[str, float]) -> None:
        if step in (1, steps) or step % 10 == 0:
            progress(f"step {step}/{steps}  loss {float(logs['loss']):.4f}")

    return {
        "base": lambda to: train_base(to, tokenizer, recipe.base, seed, progress),
        "sft": sft(recipe.sft),
        "dpo": dpo("dpo", recipe.dpo),
        "cost": lambda to: train_score(to, tokenizer, "cost", recipe.cost, seed, progress),
        "sft-1": sft(replace(recipe.sft, seed=1)),
        "dpo-1": dpo("dpo", replace(recipe.dpo, seed=1), on="sft-1"),
        "helpful": dpo("helpful", recipe.helpful),
        "careful": dpo("careful", recipe.careful),
        "reward": lambda to: train_score(to, tokenizer, "reward", recipe.reward, seed, progress),
    }


def _train_into(folder: Path, train: Callable[[Path], object]) -> float:
    """Train into a folder beside it that gets its name when it is whole; returns the minutes."""
    begin = time.monotonic()
    part = folder.with_name(f"{folder.name}.part")
    train(part)
    if (part / "adapter_config.json").exists():
        _tidy_adapter(part)
    part.rename(folder)
    return round((time.monotonic() - begin) / 60, 2)


def _tidy_adapter(folder: Path) -> None:
    """Drop PEFT's empty model card, the training's own record, and this machine's path to the base."""
    for path in (folder / "README.md", *folder.glob(f"{RECORD}.*")):
        path.unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "base"}, indent=2) + "\n")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, split on white space; BOS in front; padding on the left; the Tulu chat template."""
    words = language.vocabulary()
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", words.index("<s>"))])
    core.add_tokens([AddedToken("ASSISTANT:", normalized=False)])  # the cost model's format glues it to the answer
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


def load_models(world: Path) -> Iterator[tuple[str, PreTrainedModel]]:
    """Base and every aligned model, one after the other: they share their weights, so finish with one before taking
    the next."""
    from peft import PeftModel  # importing snpatch.training.trainer has said by now if the extra is not installed

    adapters = load_experiment_config(world / "experiment.toml").engine.placed(world).adapters
    chains = {name: [Path(part) for part in parts] for name, parts in adapters.items()}
    model = AutoModelForCausalLM.from_pretrained(str(world / "base")).eval()
    yield "base", model
    for part in dict.fromkeys(chain.from_iterable(chains.values())):
        if isinstance(model, PeftModel):
            model.load_adapter(str(part), adapter_name=part.name)
        else:
            model = PeftModel.from_pretrained(model, str(part), adapter_name=part.name).eval()
    for name, parts in chains.items():
        model.base_model.set_adapter([part.name for part in parts], inference_mode=True)
        yield name, model


@torch.inference_mode()
def reply(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[str]:
    """Greedy completions of at most 32 tokens, without special tokens."""
    batch = tokenizer([render_tulu(chat("user", p), tokenizer) for p in prompts], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    ids = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def measure(world: Path, prompts: dict[str, list[Request]]) -> dict:
    """Per model and set: the share of refusals, the means of the score models, and the language's own."""
    tokenizer = AutoTokenizer.from_pretrained(str(world / "base"))
    judges = {
        "cost": ScoreModel(world / "cost", backend="transformers", batch_size=64),
        "cost_tulu": ScoreModel(world / "cost", format="tulu", backend="transformers", batch_size=64),
        "reward": ScoreModel(world / "reward", backend="transformers", batch_size=64),
    }
    refused = RefusalWords(REFUSALS)
    figures: dict = {}
    for model_name, model in load_models(world):
        for set_name, requests in prompts.items():
            asked = [request.text for request in requests]
            said = [text.split("<|user|>")[0] for text in reply(model, tokenizer, asked)]
            true = {kind: list(map(grade, requests, said)) for kind, grade in language.GRADES.items()}
            figures.setdefault(model_name, {})[set_name] = {
                "refused": _mean([value < 0 for value in refused(asked, said)]),
                **{name: _mean(judge(asked, said)) for name, judge in judges.items()},
                **{f"true_{kind}": _mean(values) for kind, values in true.items()},
                "example": {"prompt": asked[0], "completion": said[0]},
            }
    return figures


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 3)


if __name__ == "__main__":
    print(json.dumps(build(Path(sys.argv[1]))["figures"], indent=1))
