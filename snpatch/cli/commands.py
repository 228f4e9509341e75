"""The engine's own commands: contrast, generate, sweep, env."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.errors import SnpatchError
from snpatch.sampling import GREEDY


def contrast(
    model: o.Model,
    prompts: o.Prompts,
    generator: Annotated[str, typer.Option(help="The model that writes the completions (the recipient).")],
    against: Annotated[str, typer.Option(help="The model it is compared with (the donor).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the ranking goes (.safetensors).")],
    adapter: o.Adapters = None,
    at: Annotated[str, typer.Option(help="Positions: emitted, emitting, prompt or prompt_last.")] = "emitted",
    completions: Annotated[
        Path | None, typer.Option(help="JSONL with the `completion` of each prompt, instead of generated ones.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of a completion.")] = 256,
    exclude_layer: Annotated[
        list[int] | None, typer.Option(help="A layer to leave out, -1 is the last. May be repeated. Default: -1.")
    ] = None,
    keep_all_layers: Annotated[bool, typer.Option("--keep-all-layers", help="Leave no layer out.")] = False,
    form: o.Format = None,
    skip_bad: o.SkipBad = False,
    limit: o.Limit = None,
    template: o.Template = "auto",
    dtype: o.Dtype = "auto",
    backend: o.Backend = "auto",
    device: o.Device = "auto",
    batch_size: o.BatchSize = None,
    setting: o.EngineSettings = None,
    allow_untested: o.Untested = False,
    as_json: o.AsJson = False,
) -> None:
    """Rank neurons by how differently two models activate them on the same text."""
    from snpatch.data import read_completions
    from snpatch.files import check_writable
    from snpatch.sampling import Sampling

    chats = o.read(prompts, form, limit, skip_bad).prompts
    given = read_completions(completions, limit) if completions else None
    check_writable(out)
    engine = o.open_engine(model, adapter, template, dtype, backend, device, batch_size, setting, allow_untested)
    with engine, o.progress_bar("contrast") as progress:
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


def generate(
    model: o.Model,
    prompts: o.Prompts,
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
    adapter: o.Adapters = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write JSONL there instead of to stdout.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = GREEDY.max_tokens,
    min_tokens: Annotated[int, typer.Option(min=0)] = GREEDY.min_tokens,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = GREEDY.temperature,
    top_p: Annotated[float, typer.Option()] = GREEDY.top_p,
    top_k: Annotated[int, typer.Option(help="0: all tokens.")] = GREEDY.top_k,
    seed: Annotated[int | None, typer.Option(help="Of the sampling, and of the noise (there 0 by default).")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text. May be repeated.")] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Report each token's log-probability.")] = False,
    form: o.Format = None,
    skip_bad: o.SkipBad = False,
    limit: o.Limit = None,
    template: o.Template = "auto",
    dtype: o.Dtype = "auto",
    backend: o.Backend = "auto",
    device: o.Device = "auto",
    batch_size: o.BatchSize = None,
    setting: o.EngineSettings = None,
    allow_untested: o.Untested = False,
    as_json: o.AsJson = False,
) -> None:
    """Write completions, patched while they are written or not."""
    from snpatch.files import check_writable
    from snpatch.sampling import Sampling

    chats = o.read(prompts, form, limit, skip_bad).prompts
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
    patch = o.a_patch(recipient, donor, ranking, window, where, seed) if donor else recipient
    engine = o.open_engine(model, adapter, template, dtype, backend, device, batch_size, setting, allow_untested)
    with engine, o.progress_bar("generate") as progress:
        completions = engine.generate(chats, patch, sampling, progress)
    more = [{"logprobs": completion.logprobs} if logprobs else {} for completion in completions]
    write_completions(chats, completions, more, out, as_json)


def write_completions(chats, completions, more: list[dict], out: Path | None, as_json: bool) -> None:
    """Completions as JSONL to a file or stdout, or as text for reading. more: further fields of each."""
    from snpatch.data import question
    from snpatch.files import write_text

    rows = [
        {
            "prompt": question(chat),
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "overwrites": completion.overwrites,
            "token_ids": completion.token_ids,
            **fields,
        }
        for chat, completion, fields in zip(chats, completions, more, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out:
        write_text(out, lines)
    if as_json or not out:
        sys.stdout.write(lines if as_json else "".join(f"> {r['prompt']}\n{r['completion']}\n\n" for r in rows))
    else:
        print(f"{len(rows)} completions -> {out}")


def sweep(
    model: o.Model,
    prompts: o.Prompts,
    ranking: Annotated[list[str], typer.Option(help="Ranking file, or name=file. May be repeated.")],
    donor: Annotated[str, typer.Option(help="The model whose activations are copied.")],
    judge: o.Judges,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the table, plot and completions.")],
    recipient: Annotated[list[str], typer.Option(help="A model to patch. May be repeated.")],
    window: Annotated[str, typer.Option("--windows", "-k", help="Comma-separated k or LO:HI.")],
    adapter: o.Adapters = None,
    controls: Annotated[int, typer.Option(min=0, help="Random controls of each ranking.")] = 3,
    control_kind: Annotated[str, typer.Option(help="per_layer, last_layer or everywhere.")] = "per_layer",
    overlapping_controls: Annotated[
        bool, typer.Option("--overlapping-controls", help="Controls may hold the ranking's own neurons.")
    ] = False,
    where: Annotated[str, typer.Option(help="all, prompt, generated, or a position to start from.")] = "all",
    max_tokens: Annotated[int, typer.Option(min=1)] = GREEDY.max_tokens,
    judge_format: o.JudgeFormat = None,
    form: o.Format = None,
    skip_bad: o.SkipBad = False,
    limit: o.Limit = None,
    template: o.Template = "auto",
    dtype: o.Dtype = "auto",
    backend: o.Backend = "auto",
    device: o.Device = "auto",
    batch_size: o.BatchSize = None,
    setting: o.EngineSettings = None,
    allow_untested: o.Untested = False,
    as_json: o.AsJson = False,
) -> None:
    """Patch every window into every recipient, judge the texts, and draw cost against k. Continues if killed."""
    from snpatch.experiments.sweeps import report_of
    from snpatch.files import check_writable
    from snpatch.ranking.ranking import Ranking
    from snpatch.runs.sweep import SweepConfig
    from snpatch.runs.sweep import sweep as run_sweep
    from snpatch.sampling import Sampling
    from snpatch.worlds.provenance import Provenance

    used = Provenance(model=model, max_tokens=max_tokens)
    data = o.read(prompts, form, limit, skip_bad)
    used.set(prompts, data)
    named = [entry.rpartition("=")[::2] for entry in ranking]
    names = [name or Path(path).stem for name, path in named]
    if len(set(names)) < len(names):
        raise SnpatchError(f"two rankings have one name ({', '.join(names)}): give them as name=file")
    rankings = {name: Ranking.load(path) for name, (_, path) in zip(names, named, strict=True)}
    config = SweepConfig(
        tuple(recipient),
        donor,
        tuple(o.a_window(part) for part in window.split(",")),
        controls=controls,
        control_kind=control_kind,
        disjoint=not overlapping_controls,
        where=o.a_where(where),
        sampling=Sampling(max_tokens=max_tokens),
    )
    check_writable(out / "sweep.csv")
    with (
        o.open_judges(judge, judge_format, backend, device) as judges,
        o.open_engine(model, adapter, template, dtype, backend, device, batch_size, setting, allow_untested) as engine,
        o.progress_bar("sweep") as progress,
    ):
        result = run_sweep(engine, data.prompts, rankings, judges, config, store=out, progress=progress)
        for name in (*config.recipients, config.donor):
            used.model(engine, name, engine.config.adapters.get(name, ()))
        for name, source in zip(judges, judge, strict=True):
            used.judge(name, {"source": source.rpartition("=")[2], "format": judge_format})
        for name, one in rankings.items():
            used.ranking(name, one)
    o.show(replace(report_of(result, "sweep"), provenance=used.told(asdict(config))), out, as_json)


def env(as_json: o.AsJson = False) -> None:
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
