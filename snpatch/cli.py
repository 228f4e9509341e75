"""The command line over the Engine: `snpatch contrast | generate | sweep | demo | env`.

Why the imports stand inside the commands: `--help` answers at once, torch takes seconds. Results go to stdout,
progress and errors to stderr; exit codes: 0 done, 2 bad input (one line says what), 130 interrupted.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from snpatch.errors import SnpatchError
from snpatch.sampling import GREEDY

app = typer.Typer(
    help="Find safety neurons, patch them while text is generated, measure what that changes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
demo_app = typer.Typer(help="The demo world: find its safety neurons and sweep k; or build the world anew.")
app.add_typer(demo_app, name="demo")

Model = Annotated[str, typer.Argument(help="Hugging Face folder or model name.")]
Prompts = Annotated[Path, typer.Argument(help="JSONL with `prompt` or `messages` on each line.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", help="name=folder, or name=folder,folder stacked in order. May be repeated."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
Template = Annotated[str, typer.Option(help="How chats become text: auto, tokenizer or tulu.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Backend = Annotated[str, typer.Option(help="auto, vllm or transformers. auto: vllm where it is installed.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ... (transformers only).")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Most sequences of a batch (vllm: its max_num_seqs).")]
EngineSettings = Annotated[
    list[str] | None,
    typer.Option("--engine", help="name=value for the backend, as tensor_parallel_size=2. May be repeated."),
]
Untested = Annotated[bool, typer.Option("--allow-untested", help="Try architectures that were not tested.")]


@app.command()
def contrast(
    model: Model,
    prompts: Prompts,
    generator: Annotated[str, typer.Option(help="The model that writes the completions (the recipient).")],
    against: Annotated[str, typer.Option(help="The model it is compared with (the donor).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the ranking goes (.safetensors).")],
    adapter: Adapters = None,
    at: Annotated[str, typer.Option(help="Positions: emitted, emitting, prompt or prompt_last.")] = "emitted",
    completions: Annotated[
        Path | None, typer.Option(help="JSONL with the `completion` of each prompt, instead of generated ones.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of a completion.")] = 256,
    exclude_layer: Annotated[
        list[int] | None, typer.Option(help="A layer to leave out, -1 is the last. May be repeated. Default: -1.")
    ] = None,
    keep_all_layers: Annotated[bool, typer.Option("--keep-all-layers", help="Leave no layer out.")] = False,
    limit: Limit = None,
    template: Template = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    device: Device = "auto",
    batch_size: BatchSize = None,
    setting: EngineSettings = None,
    allow_untested: Untested = False,
    as_json: AsJson = False,
) -> None:
    """Rank neurons by how differently two models activate them on the same text."""
    from snpatch.data import read_completions, read_prompts
    from snpatch.files import check_writable
    from snpatch.sampling import Sampling

    chats = read_prompts(prompts, limit)
    given = read_completions(completions, limit) if completions else None
    check_writable(out)
    engine = _engine(model, adapter, template, dtype, backend, device, batch_size, setting, allow_untested)
    with engine, _progress("contrast") as progress:
        ranking = engine.contrast(
            chats,
            generator,
            against,
            at=at,
            completions=given,
            sampling=Sampling(max_tokens=max_tokens),
            exclude_layers=[] if keep_all_layers else (exclude_layer or [-1]),
            progress=progress,
        )
    ranking.save(out)
    top = min(20, len(ranking))
    summary = {
        "ranking": str(out),
        "neurons": len(ranking),
        **{key: ranking.meta[key] for key in ("generator", "against", "at", "tokens", "prompts")},
        "top": [[*neuron, ranking.scores[tuple(neuron)].item()] for neuron in ranking.top(top).tolist()],
    }
    if as_json:
        print(json.dumps(summary))
        return
    print(f"{len(ranking)} neurons ranked over {summary['tokens']} tokens of {summary['prompts']} prompts -> {out}")
    for layer, neuron, score in summary["top"][:10]:
        print(f"  layer {layer:3d}  neuron {neuron:6d}  change score {score:.4f}")


@app.command()
def generate(
    model: Model,
    prompts: Prompts,
    recipient: Annotated[str, typer.Option(help="The model that speaks.")] = "base",
    donor: Annotated[
        str | None,
        typer.Option(
            help="What overwrites: a model, or zero, mean:recipient, mean:donor, noise:N (N standard deviations). "
            "None: unpatched."
        ),
    ] = None,
    ranking: Annotated[Path | None, typer.Option(help="Ranking file; needed with --donor.")] = None,
    window: Annotated[
        str | None, typer.Option("--window", "-k", help="k for the top k, or LO:HI; needed with --donor.")
    ] = None,
    where: Annotated[str, typer.Option(help="all, prompt, generated, or a position to start from.")] = "all",
    adapter: Adapters = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write JSONL there instead of to stdout.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = GREEDY.max_tokens,
    min_tokens: Annotated[int, typer.Option(min=0)] = GREEDY.min_tokens,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = GREEDY.temperature,
    top_p: Annotated[float, typer.Option()] = GREEDY.top_p,
    top_k: Annotated[int, typer.Option(help="0: all tokens.")] = GREEDY.top_k,
    seed: Annotated[int | None, typer.Option(help="Of the sampling, and of the noise (there 0 by default).")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text. May be repeated.")] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Report each token's log-probability.")] = False,
    limit: Limit = None,
    template: Template = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    device: Device = "auto",
    batch_size: BatchSize = None,
    setting: EngineSettings = None,
    allow_untested: Untested = False,
    as_json: AsJson = False,
) -> None:
    """Write completions, patched while they are written or not."""
    from snpatch.data import question, read_prompts
    from snpatch.files import check_writable, write_text
    from snpatch.sampling import Sampling

    chats = read_prompts(prompts, limit)
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=tuple(stop or ()),
        seed=seed,
        logprobs=logprobs,
    )
    if out:
        check_writable(out)
    if donor is None and (ranking or window or where != "all"):
        raise SnpatchError("--ranking, --window and --where need --donor")
    patch = _patch(recipient, donor, ranking, window, where, seed) if donor else recipient
    engine = _engine(model, adapter, template, dtype, backend, device, batch_size, setting, allow_untested)
    with engine, _progress("generate") as progress:
        completions = engine.generate(chats, patch, sampling, progress)
    rows = [
        {
            "prompt": question(chat),
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "overwrites": completion.overwrites,
            "token_ids": completion.token_ids,
            **({"logprobs": completion.logprobs} if logprobs else {}),
        }
        for chat, completion in zip(chats, completions, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out:
        write_text(out, lines)
    if as_json or not out:
        sys.stdout.write(lines if as_json else "".join(f"> {r['prompt']}\n{r['completion']}\n\n" for r in rows))
    else:
        print(f"{len(rows)} completions -> {out}")


@app.command()
def sweep(
    model: Model,
    prompts: Prompts,
    ranking: Annotated[list[str], typer.Option(help="Ranking file, or name=file. May be repeated.")],
    donor: Annotated[str, typer.Option(help="The model whose activations are copied.")],
    judge: Annotated[str, typer.Option(help="Cost model folder, or `refusal` for refusal words.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the table, plot and completions.")],
    recipient: Annotated[list[str], typer.Option(help="A model to patch. May be repeated.")],
    window: Annotated[str, typer.Option("--windows", "-k", help="Comma-separated k or LO:HI.")],
    adapter: Adapters = None,
    controls: Annotated[int, typer.Option(min=0, help="Random controls of each ranking.")] = 3,
    control_kind: Annotated[str, typer.Option(help="per_layer, last_layer or everywhere.")] = "per_layer",
    overlapping_controls: Annotated[
        bool, typer.Option("--overlapping-controls", help="Controls may hold the ranking's own neurons.")
    ] = False,
    where: Annotated[str, typer.Option(help="all, prompt, generated, or a position to start from.")] = "all",
    max_tokens: Annotated[int, typer.Option(min=1)] = GREEDY.max_tokens,
    judge_format: Annotated[
        str | None, typer.Option(help="Input of the cost model: tulu (default: the paper's code) or beaver.")
    ] = None,
    limit: Limit = None,
    template: Template = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    device: Device = "auto",
    batch_size: BatchSize = None,
    setting: EngineSettings = None,
    allow_untested: Untested = False,
    as_json: AsJson = False,
) -> None:
    """Patch every window into every recipient, judge the texts, and draw cost against k. Continues if killed."""
    from snpatch.data import read_prompts
    from snpatch.files import check_writable
    from snpatch.ranking import Ranking
    from snpatch.sampling import Sampling
    from snpatch.sweep import SweepConfig
    from snpatch.sweep import sweep as run_sweep

    chats = read_prompts(prompts, limit)
    named = [entry.rpartition("=")[::2] for entry in ranking]
    names = [name or Path(path).stem for name, path in named]
    if len(set(names)) < len(names):
        raise SnpatchError(f"two rankings have one name ({', '.join(names)}): give them as name=file")
    rankings = {name: Ranking.load(path) for name, (_, path) in zip(names, named, strict=True)}
    config = SweepConfig(
        tuple(recipient),
        donor,
        tuple(_window(part) for part in window.split(",")),
        controls=controls,
        control_kind=control_kind,
        disjoint=not overlapping_controls,
        where=_where(where),
        sampling=Sampling(max_tokens=max_tokens),
    )
    check_writable(out / "table.csv")
    score = _judge(judge, judge_format, device)
    engine = _engine(model, adapter, template, dtype, backend, device, batch_size, setting, allow_untested)
    with engine, _progress("sweep") as progress:
        result = run_sweep(engine, chats, rankings, score, config, store=out, progress=progress)
    _show(result, out, as_json)


@demo_app.callback(invoke_without_command=True)
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the table and the plot.")] = Path("snpatch-demo"),
    backend: Backend = "auto",
    as_json: AsJson = False,
) -> None:
    """Contrast SFT with DPO, rank, sweep k for SFT and Base, judge; table and plot."""
    if context.invoked_subcommand:
        return
    from snpatch.demo.run import run
    from snpatch.files import check_writable

    check_writable(out / "table.csv")
    _show(run(out, _progress, backend), out, as_json)


@demo_app.command("build")
def demo_build(
    out: Annotated[Path, typer.Argument(help="Folder for the new world; must not exist or be empty.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make the demo world from nothing: language, base, SFT, DPO, cost model. Takes minutes."""
    try:
        from snpatch.demo.build import build
    except ImportError as error:  # it names the extra to install
        raise SnpatchError(str(error)) from error
    build(out, seed)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Versions, device, and which implementation serves each op."""
    from snpatch.environment import describe

    found = describe()
    if as_json:
        print(json.dumps(found))
        return
    for group, entries in found.items():
        print(group)
        for name, value in entries.items():
            print(f"  {name:20s} {value}")


def main() -> None:
    """Entry point: a SnpatchError is one line and exit code 2."""
    try:
        app()
    except SnpatchError as error:
        sys.exit(_failed(f"snpatch: error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_failed("snpatch: interrupted", 130))


def _failed(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _engine(model, adapter, template, dtype, backend, device, batch_size, setting, allow_untested):
    import transformers

    from snpatch.engine import Engine, chosen

    transformers.utils.logging.disable_progress_bar()
    adapters = {}
    for entry in adapter or ():
        name, equals, folders = entry.partition("=")
        if not equals or not name or not folders:
            raise SnpatchError(f"--adapter wants name=folder or name=folder,folder; got {entry!r}")
        if name in adapters:
            raise SnpatchError(f"--adapter names {name!r} twice")
        adapters[name] = folders.split(",")
    backend = chosen(backend)
    settings = dict(map(_setting, setting or ()))
    if backend == "transformers":
        settings |= {"device": device}
    elif device != "auto":
        raise SnpatchError("--device is for --backend transformers; vllm runs on its own platform")
    if batch_size is not None:
        settings |= {"batch_size": batch_size}
    return Engine(
        model, adapters, backend=backend, template=template, dtype=dtype, allow_untested=allow_untested, **settings
    )


def _setting(text: str) -> tuple[str, object]:
    """name=value with the value as JSON where it is JSON, else as it stands."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SnpatchError(f"--engine wants name=value, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _patch(recipient: str, donor: str, ranking: Path | None, window: str | None, where: str, seed: int | None):
    from snpatch.patch import Constant, Noise, Patch
    from snpatch.ranking import Ranking

    if ranking is None or window is None:
        raise SnpatchError("--donor needs --ranking and --window")
    loaded = Ranking.load(ranking)
    kind, _, argument = donor.partition(":")
    if donor == "zero":
        source = Constant.zero(loaded)
    elif kind == "mean" and argument in ("recipient", "donor"):
        source = Constant.mean(loaded, argument)
    elif kind == "noise" and argument:
        source = Noise.of_std(loaded, _number(argument, float, "--donor noise:N"), seed=seed or 0)
    else:
        source = donor
    return Patch(recipient, source, loaded, _window(window), _where(where))


def _window(text: str):
    from snpatch.patch import Window

    lo, colon, hi = text.strip().partition(":")
    if not colon:
        return Window(0, _number(lo, int, "a window"))
    return Window(_number(lo, int, "a window"), _number(hi, int, "a window"))


def _where(text: str) -> str | int:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _number(text: str, kind: Callable, what: str):
    try:
        return kind(text)
    except ValueError:
        raise SnpatchError(f"{what}: {text!r} is not a number") from None


def _judge(name: str, form: str | None, device: str):
    from snpatch.executors.transformers import pick_device
    from snpatch.judge import CostModel, RefusalWords

    if name != "refusal":
        return CostModel(name, format=form or "tulu", device=pick_device(device))
    if form is not None:
        raise SnpatchError("--judge-format is for a cost model")
    return RefusalWords()


def _show(result, out: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from snpatch.report import headline, table_of, write_report

    paths = write_report(result, out)
    sentences = [*headline(result), *result.notes]
    if as_json:
        rows = [asdict(row) for row in result.rows]
        print(json.dumps({"rows": rows, "headline": sentences, "files": [str(path) for path in paths]}))
        return
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table_of(result))
    for sentence in sentences:
        console.print(sentence, highlight=False, soft_wrap=True)
    console.print("wrote " + ", ".join(str(path) for path in paths), highlight=False, soft_wrap=True)


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; where that is no terminal, a line at the start of each tenth."""
    if not sys.stderr.isatty():
        told = -1

        def tell(done: int, total: int) -> None:
            nonlocal told
            if done * 10 // total > told:
                told = done * 10 // total
                print(f"{name}: {done}/{total}", file=sys.stderr, flush=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
