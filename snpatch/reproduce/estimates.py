"""What a reproduction costs before it is run: downloads, hours, disk, each step by itself.

Why two rates and no table of GPUs: training is bound by matrix products, writing by reading weights and keys from
memory. Both are reckoned for one H100, at a share of its peaks that such programs commonly reach, until a training of
this very folder was measured: then the others are reckoned by that.
"""

import json
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from snpatch import experiments
from snpatch.data import DATASETS
from snpatch.data.prompt_set import PromptSet
from snpatch.judges.factory import is_model_judge
from snpatch.models.checkpoint import load_config
from snpatch.names import POSITIONS
from snpatch.report.report import TableView
from snpatch.reproduce.pipeline import ADAPTERS, CONTRASTS, Pair, Pipeline
from snpatch.reproduce.preset import NAMES, Size

TRAIN_FLOPS = 0.4 * 989e12  # of an H100's dense bfloat16 products
READ_BYTES = 0.6 * 3.35e12  # a second, of its memory
BATCH = 128  # pairs of rows that are written at once
CONTEXT = 400  # tokens that a row has read on average
PASSES = {"sft": 3, "dpo": 4}  # forward, again, backward through frozen weights; DPO: and the reference's forward
JUDGE = 6.7e9  # parameters of the paper's judges
JUDGED = 200  # tokens of a judged text besides the answer
TRAINED_GB = 0.002  # an IA3 adapter of a 7B model (1.4 MB), its table and plot
RANKED_GB = 0.01  # a ranking of a 7B model: scores, means and deviations of 352,256 neurons
TEXT_BYTES, TOKEN_BYTES = 700, 6  # of a text with its labels and scores in the store, and of each of its tokens
WIKITEXT = 341_469  # tokens of Wikitext-2's test


@dataclass(frozen=True)
class Cost:
    """Of a step. seconds: None where the size of what it reads is not known before it is loaded. by: how it was
    reckoned."""

    seconds: float | None = 0.0
    disk_gb: float = 0.0
    by: str = ""


def plan(pipeline: Pipeline, only: Sequence[str] = (), start: str | None = None) -> TableView:
    """A row a step: why it runs or that it does not, what it costs, how that is known; the sums last."""
    size = _size(pipeline)
    rows, seconds, disk, unknown, running = [], 0.0, 0.0, 0, set()
    asked = pipeline.chosen(tuple(only), start)
    for name in pipeline.steps.steps:
        reason = _reason(pipeline, name, running) or ("asked for again" if name in asked else None)
        if only and name not in only:
            reason = None
        if reason:
            running.add(name)
            cost = _cost(pipeline, name, size)
            seconds += cost.seconds or 0
            disk += cost.disk_gb
            unknown += cost.seconds is None
        else:
            cost = Cost(pipeline.steps.seconds(name), by="measured: this step, in this folder")
        state = reason or ("not asked for" if only and name not in only else "done")
        rows.append((name, state, _hours(cost.seconds), f"{cost.disk_gb:.3f}", cost.by))
    note = f"{unknown} steps of unknown size not counted" if unknown else ""
    rows.append(("all that is to run", "", _hours(seconds), f"{disk:.3f}", note))
    return TableView(("step", "state", "GPU hours (or as named)", "disk in the folder, GB", "reckoned by"), tuple(rows))


def downloads(pipeline: Pipeline) -> TableView:
    """What has to be fetched: models and data sets that are no files here, with their sizes where they are known."""
    size, config, known = _size(pipeline), pipeline.config, _sizes()
    # The alignment tax alone reads further judges and the prompts for helpfulness.
    taxed = "alignment_tax" in pipeline.steps.steps
    weights = [config.engine.model, *(s.checkpoint for s in config.engine.sources.values() if s.checkpoint)]
    judges = [one["source"] for name, one in config.judges.items() if (taxed or name == config.cost)]
    sets = [one for name, one in config.sets.items() if taxed or name != "helpful"]
    if pipeline.preset.training:
        sets += [pipeline.preset.training.data[p.rows] for n, p in pipeline.pairs.items() if n in pipeline.steps.steps]
    rows = [(one, "model", f"{2 * size.parameters / 1e9:.1f}" if size else "?") for one in dict.fromkeys(weights)]
    rows += [(one, "judge", f"{2 * JUDGE / 1e9:.1f}") for one in dict.fromkeys(judges) if is_model_judge(one)]
    sources = dict.fromkeys(one.source for one in sets if one.source in DATASETS)
    rows += [(name, "data", str(known.get(name, {}).get("gb", "?"))) for name in sources]
    missing = tuple(row for row in rows if not Path(config.resolve_path(row[0])).exists())
    return TableView(("from the hub, if it is not in its cache", "what", "GB"), missing)


def _reason(pipeline: Pipeline, name: str, running: set[str]) -> str | None:
    """Why a step has to run, also for what runs before it. running: the steps that do."""
    if reason := pipeline.steps.reason(name):
        return reason
    adapters = pipeline.config.engine.adapters
    for read in pipeline.steps.read_by(name):
        kind, _, rest = read.partition("/")
        folders = adapters.get(rest, ()) if kind == "model" else (rest,) if kind == "adapter" else ()
        for folder in folders:
            if (other := Path(folder).name) in running and folder.startswith(ADAPTERS):
                return f"{other} runs before it"
    return None


@cache
def _sizes() -> dict:
    return tomllib.loads((Path(__file__).parent / "sizes.toml").read_text(encoding="utf-8"))


def _elsewhere(pipeline: Pipeline) -> dict:
    """What a shipped preset took where it was run whole: machine, and seconds by step (make bench-reproduce)."""
    is_whole = pipeline.preset.name in NAMES and pipeline.limit is None and pipeline.preset.size is not None
    return _records().get(pipeline.preset.name, {}) if is_whole else {}


@cache
def _records() -> dict:
    return json.loads((Path(__file__).parent / "measured.json").read_text(encoding="utf-8"))


def _size(pipeline: Pipeline) -> Size | None:
    """Of the model: of its config where it is a folder here, else as the preset says."""
    model = pipeline.config.resolve_path(pipeline.config.engine.model)
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
    other = _elsewhere(pipeline)
    if name in other.get("seconds", {}):
        return Cost(other["seconds"][name], _disk(pipeline, name), f"measured: {other['machine']}")
    if name == "rows":
        return Cost(1.0, _disk(pipeline, name), "files")
    if size is None:
        return Cost(None, 0.0, "the model's size is not known: give [size] in a preset")
    if name in pipeline.pairs:
        return _training(pipeline, pipeline.pairs[name], size)
    if name.startswith(tuple(f"{prefix}-" for _, prefix in CONTRASTS)):
        return _writing(pipeline, _contrast(pipeline), 0, pipeline.config.contrast_tokens, size, RANKED_GB)
    return _experiment(pipeline, name, size)


def _disk(pipeline: Pipeline, name: str) -> float:
    """Of a step whose time was measured."""
    if name == "rows":
        return 0.005
    if name in pipeline.pairs:
        return TRAINED_GB
    if name in experiments.NAMES:
        return _kept(_texts(pipeline, name)[0], pipeline.config.max_tokens)
    return RANKED_GB


def _training(pipeline: Pipeline, pair: Pair, size: Size) -> Cost:
    kind = "dpo" if pair.sft else "sft"
    tokens = _tokens(pipeline, pair.rows, pipeline.preset.training.data[pair.rows])
    if tokens is None:
        return Cost(None, TRAINED_GB, "rows of unknown size")
    tokens *= pair.settings.epochs
    if measured := _measured(pipeline):
        other, rate, processes = measured
        rate *= PASSES["dpo" if pipeline.pairs[other].sft else "sft"] / PASSES[kind]
        by = f"measured: {rate:.0f} tokens/s, by {other}" + (f", {processes} processes" if processes > 1 else "")
        return Cost(processes * tokens / rate, TRAINED_GB, by)
    rate = TRAIN_FLOPS / (2 * size.parameters * PASSES[kind])
    by = f"derived for an H100: {tokens:.3g} tokens, {rate:.0f} a second at 40 % of its peak"
    return Cost(tokens / rate, TRAINED_GB, by)


def _measured(pipeline: Pipeline) -> tuple[str, float, int] | None:
    """A training of this folder that is done, its tokens a second, and on how many processes."""
    for name in pipeline.pairs:
        path = pipeline.out / ADAPTERS / name / "training.json"
        if name in pipeline.steps.steps and pipeline.steps.reason(name) is None:
            figures = json.loads(path.read_text(encoding="utf-8"))["provenance"]["figures"]
            if not figures["resumed_at"]:  # else its rate is of the rest alone
                return name, figures["tokens_per_s"], figures["processes"]
    return None


def _tokens(pipeline: Pipeline, name: str, rows: PromptSet) -> float | None:
    """Of rows to train on: of a file here by its size, of a published set by sizes.toml."""
    path = Path(pipeline.config.resolve_path(rows.source))
    wanted = [n for n in (rows.first, rows.sample) if n is not None]
    if path.is_file():
        lines = _lines(path)
        return path.stat().st_size / 4 * min([lines, *wanted]) / max(lines, 1)  # a token is about four bytes of text
    known = _sizes().get(name) or _sizes().get(rows.source)
    return None if known is None else min([known["rows"], *wanted]) * known["tokens"]


def _writing(
    pipeline: Pipeline, texts: int, judged: int, tokens: int, size: Size, disk_gb: float = 0.0, further: int = 0
) -> Cost:
    """Texts of so many tokens, written by twin streams, some of them judged. further: texts that contrasts read."""
    sets = 1 if pipeline.config.engine.secondary is None else 2
    step = (2 * sets * size.parameters + 2 * BATCH * CONTEXT * size.kv_bytes) / READ_BYTES
    rate = BATCH / step
    seconds = (texts * tokens + further * pipeline.config.contrast_tokens) / rate
    seconds += judged * (JUDGED + tokens) * 2 * _judge(pipeline) / TRAIN_FLOPS
    by = f"derived for an H100: {texts} texts of {tokens} tokens, {rate:.0f} a second at 60 % of its memory's rate"
    return Cost(seconds, disk_gb + _kept(judged, tokens), by if texts or further else "no texts of its own")


def _kept(texts: int, tokens: int) -> float:
    """GB of texts in the store."""
    return texts * (TEXT_BYTES + TOKEN_BYTES * tokens) / 1e9


def _judge(pipeline: Pipeline) -> float:
    """Parameters of the cost judge: of its file where it is a folder here (bfloat16), else the paper's."""
    folder = Path(pipeline.config.resolve_path(pipeline.config.judges[pipeline.config.cost]["source"]))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2 or JUDGE


def _experiment(pipeline: Pipeline, name: str, size: Size) -> Cost:
    config = pipeline.config
    settings = experiments.resolve_settings(config, name)
    texts, further = _texts(pipeline, name)
    cost = _writing(pipeline, texts, texts, config.max_tokens, size, further=further)
    if name in ("perplexity", "transfer") and settings.text:
        points = len(config.recipients) * (len(settings.k) if name == "perplexity" else 2) + 1
        seconds = points * WIKITEXT * 2 * 2 * size.parameters / TRAIN_FLOPS
        return Cost(cost.seconds + seconds, cost.disk_gb, f"{cost.by}; {points} perplexities")
    return cost


def _texts(pipeline: Pipeline, name: str) -> tuple[int, int]:
    """How many texts an experiment writes and judges, and how many its own contrasts read."""
    settings = experiments.resolve_settings(pipeline.config, name)
    further = (len(POSITIONS) - 1) * _contrast(pipeline) if name == "positions" else 0
    return TEXTS[name](pipeline, settings) if name in TEXTS else 0, further


def _contrast(pipeline: Pipeline) -> int:
    """Texts that a contrast reads."""
    return _count(pipeline, pipeline.config.safety.prompts)


def _count(pipeline: Pipeline, name: str) -> int:
    """Prompts of a set: as many as the config takes, or that its file has lines."""
    rows = pipeline.config.sets[name]
    counts = [n for n in (rows.first, rows.sample, pipeline.limit) if n is not None]
    path = Path(pipeline.config.resolve_path(rows.source))
    if path.is_file():
        counts.append(_lines(path))
    elif rows.source in _sizes():
        counts.append(_sizes()[rows.source]["rows"])
    return min(counts, default=200)


def _lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _points(pipeline: Pipeline, windows: int, controls: int) -> int:
    """Texts a prompt of a sweep over windows: each recipient's, and the models unpatched."""
    recipients = len(pipeline.config.recipients)
    return recipients * windows * (1 + controls) + recipients + 1


def _sweep(windows: Callable[[object], int]) -> Callable[[Pipeline, object], int]:
    def texts(pipeline: Pipeline, settings) -> int:
        prompts = _count(pipeline, settings.prompts or pipeline.config.benchmarks[0])
        return prompts * _points(pipeline, windows(settings), settings.controls)

    return texts


def _benchmarks(pipeline: Pipeline, names: Sequence[str]) -> int:
    return sum(_count(pipeline, name) for name in names or pipeline.config.benchmarks)


def _tax(pipeline: Pipeline, settings) -> int:
    sets = settings.prompts or (pipeline.config.benchmarks[0], "helpful")
    return 2 * _benchmarks(pipeline, sets) * (3 + settings.controls)


TEXTS: dict[str, Callable[[Pipeline, object], int]] = {  # of the experiments that write any
    "curve": _sweep(lambda s: len(s.k)),
    "sliding_window": _sweep(lambda s: math.floor(s.last / s.stride) + 1),
    "positions": _sweep(lambda s: len(s.effect_k) * len(POSITIONS)),
    "transfer": lambda p, s: _benchmarks(p, s.benchmarks) * _points(p, 1, s.controls),
    "alignment_tax": _tax,
    "guard": lambda p, s: _benchmarks(p, s.prompts),
    "safeguard": lambda p, s: 2 * _benchmarks(p, s.prompts),
}


def _hours(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds / 3600:.2f}"
