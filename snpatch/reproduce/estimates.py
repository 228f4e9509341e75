"""What a reproduction costs before it is run: downloads, GPU hours, disk, each step by itself.

Why two rates and no table of GPUs: training is bound by matrix products, writing by reading weights and keys from
memory. Both are reckoned for one H100, at a share of its peaks that such programs commonly reach, until a step of this
very folder was measured: then the others of its kind are reckoned by that.
"""

import json
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from snpatch import experiments
from snpatch.contrast import POSITIONS
from snpatch.models.checkpoint import load_config
from snpatch.report.report import View
from snpatch.reproduce.pipeline import ADAPTERS, CONTRASTS, Pair, Pipeline
from snpatch.reproduce.preset import Size
from snpatch.worlds.world import PromptSet

TRAIN_FLOPS = 0.4 * 989e12  # of an H100's dense bfloat16 products
READ_BYTES = 0.6 * 3.35e12  # a second, of its memory
BATCH = 128  # pairs of rows that are written at once
CONTEXT = 400  # tokens that a row has read on average
PASSES = {"sft": 3, "dpo": 4}  # forward, again, backward through frozen weights; DPO: and the reference's forward
JUDGE = 6.7e9  # parameters of the paper's judges
JUDGED = 300  # tokens of a judged text
TEXT_BYTES = 1500  # of a text with its labels and scores in the store
WIKITEXT = 341_469  # tokens of Wikitext-2's test


@dataclass(frozen=True)
class Cost:
    """Of a step. seconds: None where the size of what it reads is not known before it is loaded. by: how it was
    reckoned."""

    seconds: float | None = 0.0
    disk_gb: float = 0.0
    by: str = ""


def plan(pipeline: Pipeline) -> View:
    """A row a step: whether it is done, what it costs, how that is known; the sums last."""
    size = _size(pipeline)
    costs = {name: _cost(pipeline, name, size) for name in pipeline.steps.steps}
    rows, hours, disk = [], 0.0, 0.0
    for name, cost in costs.items():
        reason = pipeline.steps.reason(name)
        if reason:
            hours += (cost.seconds or 0) / 3600
            disk += cost.disk_gb
        rows.append((name, reason or "done", _hours(cost.seconds), f"{cost.disk_gb:.3f}", cost.by))
    unknown = sum(cost.seconds is None for cost in costs.values())
    note = f"{unknown} steps of unknown size not counted" if unknown else ""
    rows.append(("all that is to run", "", _hours(hours * 3600), f"{disk:.3f}", note))
    return View(("step", "state", "GPU hours (one H100)", "disk, GB", "reckoned by"), tuple(rows))


def downloads(pipeline: Pipeline) -> View:
    """What has to be fetched: models and data sets that are no files here, with their sizes where they are known."""
    size, world = _size(pipeline), pipeline.world
    weights = [world.engine.model, *(s.weights for s in world.engine.sources.values() if s.weights)]
    judges = [judge["source"] for judge in world.judges.values()]
    rows = [(one, "model", f"{2 * size.parameters / 1e9:.1f}" if size else "?") for one in dict.fromkeys(weights)]
    rows += [(one, "judge", f"{2 * JUDGE / 1e9:.1f}") for one in dict.fromkeys(judges) if "/" in one]
    sets = [*world.sets.values()]
    if pipeline.preset.training:
        sets += [one for name, one in pipeline.preset.training.data.items()]
    known = _sizes()
    rows += [
        (name, "data", str(known[name]["gb"]) if name in known else "?")
        for name in dict.fromkeys(one.source for one in sets if not one.source.endswith(".jsonl"))
    ]
    missing = tuple(row for row in rows if not Path(world.place(row[0])).exists())
    return View(("from the hub, if it is not in its cache", "what", "GB"), missing)


def _sizes() -> dict:
    return tomllib.loads((Path(__file__).parent / "sizes.toml").read_text(encoding="utf-8"))


def _size(pipeline: Pipeline) -> Size | None:
    """Of the model: of its config where it is a folder here, else as the preset says."""
    model = pipeline.world.place(pipeline.world.engine.model)
    if not Path(model).is_dir():
        return pipeline.preset.size
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(model, allow_untested=True)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Size(parameters, config.num_hidden_layers * config.num_key_value_heads * head * 4)


def _cost(pipeline: Pipeline, name: str, size: Size | None) -> Cost:
    if (seconds := pipeline.steps.seconds(name)) is not None:
        return Cost(seconds, 0.0, "measured: this step, on this machine")
    if name == "rows":
        return Cost(1.0, 0.005, "a file")
    if size is None:
        return Cost(None, 0.0, "the model's size is not known: give [size] in the preset")
    if name in pipeline.pairs:
        return _training(pipeline, pipeline.pairs[name], size)
    if name.startswith(tuple(prefix for _, prefix in CONTRASTS)):
        texts = _count(pipeline, pipeline.world.safety.prompts)
        return _writing(pipeline, texts, pipeline.world.contrast_tokens, size, judged=0)
    return _experiment(pipeline, name, size)


def _training(pipeline: Pipeline, pair: Pair, size: Size) -> Cost:
    kind = "dpo" if pair.sft else "sft"
    disk = 0.002 if size.parameters < 1e11 else 0.02  # IA3's vectors, their optimizer's moments, a table and a plot
    tokens = _tokens(pipeline, pipeline.preset.training.data[pair.rows])
    if tokens is None:
        return Cost(None, disk, "rows of unknown size")
    tokens *= pair.settings.epochs
    measured = _measured(pipeline)
    if measured:
        other, rate = measured
        rate *= PASSES[_kind(pipeline, other)] / PASSES[kind]
        return Cost(tokens / rate, disk, f"measured: {rate:.0f} tokens/s, by {other}")
    rate = TRAIN_FLOPS / (2 * size.parameters * PASSES[kind])
    return Cost(tokens / rate, disk, f"derived: {tokens:.3g} tokens, {rate:.0f} tokens/s at 40 % of the peak")


def _kind(pipeline: Pipeline, name: str) -> str:
    return "dpo" if pipeline.pairs[name].sft else "sft"


def _measured(pipeline: Pipeline) -> tuple[str, float] | None:
    """A training of this folder that is done, and its tokens a second."""
    for name in pipeline.pairs:
        path = pipeline.out / ADAPTERS / name / "training.json"
        if path.is_file():
            figures = json.loads(path.read_text(encoding="utf-8"))["provenance"]["figures"]
            return name, figures["tokens_per_s"]
    return None


def _tokens(pipeline: Pipeline, rows: PromptSet) -> float | None:
    """Of a set to train on: of a file here by its size, of a published set by sizes.toml."""
    path = Path(pipeline.world.place(rows.source))
    known = _sizes().get(rows.source)
    if path.is_file():
        return path.stat().st_size / 4  # a token is about four bytes of text
    if known is None:
        return None
    return min(n for n in (rows.first, rows.sample, known["rows"]) if n is not None) * known["tokens"]


def _writing(pipeline: Pipeline, texts: int, tokens: int, size: Size, judged: int | None = None) -> Cost:
    """Texts of so many tokens, written by twin streams and judged."""
    step = (2 * size.parameters + 2 * BATCH * CONTEXT * size.kv_bytes) / READ_BYTES
    rate = BATCH / step
    seconds = texts * tokens / rate
    if judged != 0:
        seconds += texts * JUDGED * 2 * JUDGE / TRAIN_FLOPS
    by = (
        f"derived: {texts} texts of {tokens} tokens, {rate:.0f} tokens/s, batch of {BATCH} at 60 % of the memory's rate"
    )
    return Cost(seconds, texts * TEXT_BYTES / 1e9, by if texts else "no texts of its own")


def _experiment(pipeline: Pipeline, name: str, size: Size) -> Cost:
    world = pipeline.world
    settings = experiments.settings_of(name, world.settings.get(name, {}))
    texts = TEXTS.get(name, lambda *_: 0)(pipeline, settings)
    cost = _writing(pipeline, texts, world.max_tokens, size)
    if name in ("perplexity", "transfer") and settings.text:
        points = len(world.recipients) * (len(settings.k) if name == "perplexity" else 2) + 1
        seconds = points * WIKITEXT * 2 * 2 * size.parameters / TRAIN_FLOPS
        return Cost(cost.seconds + seconds, cost.disk_gb, f"{cost.by}; {points} perplexities")
    return cost


def _count(pipeline: Pipeline, name: str) -> int:
    """Prompts of a set: as many as the world takes, or that its file has lines."""
    rows, limit = pipeline.world.sets[name], pipeline._lab_arguments["limit"]
    counts = [n for n in (rows.first, rows.sample, limit) if n is not None]
    path = Path(pipeline.world.place(rows.source))
    if path.is_file():
        with open(path, "rb") as file:
            counts.append(sum(1 for _ in file))
    elif not counts:
        counts.append(_sizes().get(rows.source, {"rows": 200})["rows"])
    return min(counts)


def _points(pipeline: Pipeline, windows: int, controls: int) -> int:
    """Texts a prompt of a sweep over windows: each recipient's, and the models unpatched."""
    recipients = len(pipeline.world.recipients)
    return recipients * windows * (1 + controls) + recipients + 1


def _sweep(windows: Callable[[object], int]) -> Callable[[Pipeline, object], int]:
    def texts(pipeline: Pipeline, settings) -> int:
        prompts = _count(pipeline, settings.prompts or pipeline.world.benchmarks[0])
        return prompts * _points(pipeline, windows(settings), settings.controls)

    return texts


def _benchmarks(pipeline: Pipeline, names: Sequence[str]) -> int:
    return sum(_count(pipeline, name) for name in names or pipeline.world.benchmarks)


def _tax(pipeline: Pipeline, settings) -> int:
    sets = settings.prompts or (pipeline.world.benchmarks[0], "helpful")
    return 2 * _benchmarks(pipeline, sets) * (3 + settings.controls)


TEXTS: dict[str, Callable[[Pipeline, object], int]] = {  # of the experiments that write any
    "curve": _sweep(lambda s: len(s.k)),
    "windows": _sweep(lambda s: math.floor(s.last / s.stride) + 1),
    "positions": _sweep(lambda s: len(s.effect_k) * len(POSITIONS)),
    "transfer": lambda p, s: _benchmarks(p, s.benchmarks) * _points(p, 1, s.controls),
    "tax": _tax,
    "guard": lambda p, s: _benchmarks(p, s.prompts),
    "safeguard": lambda p, s: 2 * _benchmarks(p, s.prompts),
}


def _hours(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds / 3600:.2f}"
