"""`snpatch guard fit | eval | apply`: refuse prompts before anything is generated."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli.dataclass_options import DatasetOptions, EngineOptions, FieldOptions, Fields, Prompts, with_options
from snpatch.cli.generate import write_completions
from snpatch.config import EngineConfig
from snpatch.guard.config import GuardConfig
from snpatch.sampling import GREEDY, Sampling

ENGINE, ANSWERS = EngineOptions(), FieldOptions(GREEDY, ("max_tokens",))

app = typer.Typer(
    help="A guard tells from the safety neurons at a prompt's last token whether the answer would be harmful.",
    no_args_is_help=True,
)

GuardFile = Annotated[Path, typer.Option("--guard", help="What `snpatch guard fit` wrote.")]
Above = Annotated[float, typer.Option("--harm-threshold", help="The cost above which an answer is harmful.")]
Judge = Annotated[str, typer.Option(help="Folder or hub name of a cost model, `refusal`, or module:function.")]


@app.command()
@with_options(
    config=ENGINE,
    prompts=DatasetOptions(),
    answers=ANSWERS,
    fitted=FieldOptions(GuardConfig, ("folds", "threshold", "refusal")),
)
def fit(
    config: EngineConfig,
    prompts: Prompts,
    model_name: Annotated[
        str, typer.Option("--model", help="The model whose neurons are read and whose answers are judged.")
    ],
    ranking: Annotated[Path, typer.Option(help="Ranking file.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many of its first neurons.")],
    judge: Judge,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the guard goes (.safetensors).")],
    answers: Fields,
    fitted: Fields,
    judge_format: o.JudgeFormat = None,
    harm_threshold: Above = 0.0,
    strengths: Annotated[
        str,
        typer.Option("--C", help="Inverse strength of the penalty; of several (0.01,0.1,1) cross-validation chooses."),
    ] = ",".join(map(str, GuardConfig().C)),
    balanced: Annotated[bool, typer.Option("--balanced", help="Both classes count the same.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """Let a model answer, judge the answers, and fit a classifier that tells them from the prompts alone."""
    from snpatch.guard.fitting import predict_out_of_fold
    from snpatch.guard.guard import Guard
    from snpatch.guard.labels import deduplicate
    from snpatch.guard.scores import evaluate
    from snpatch.models.checkpoint import load_model_shape
    from snpatch.patching import spec
    from snpatch.ranking.ranking import Ranking
    from snpatch.utils.files import check_writable

    order = Ranking.load(ranking, partial(load_model_shape, config.model, config.allow_untested))
    settings = GuardConfig(
        tuple(spec.parse_number(part, float, "--C") for part in strengths.split(",")),
        "balanced" if balanced else None,
        **fitted,
    )
    check_writable(out)
    prompts_once = deduplicate(prompts.data.prompts)
    if len(prompts_once) < len(prompts.data):
        o.echo(f"{prompts.name}: {len(prompts.data) - len(prompts_once)} repeated prompts count once", is_error=True)
    engine = o.open_engine(config)
    with engine:
        known = _labelled(engine, prompts_once, model_name, judge, judge_format, answers, harm_threshold)
        features = engine.capture(known.prompts, model_name, order, k)
        fingerprint = engine.fingerprint(model_name)
        meta = {"judge": judge, "harm_threshold": harm_threshold, "prompts": prompts.data.source}
        guard = Guard.fit(
            features, known.labels, order, model=model_name, fingerprint=fingerprint, config=settings, meta=meta
        )
        scores = evaluate(
            predict_out_of_fold(features.numpy(), known.labels, settings), known.labels, threshold=settings.threshold
        )
    guard.save(out)
    _tell(scores, {"guard": str(out), "C": guard.meta["C"], "k": k}, "by cross-validation", as_json)


@app.command("eval")
@with_options(config=ENGINE, prompts=DatasetOptions(), answers=ANSWERS)
def evaluate_guard(
    config: EngineConfig,
    prompts: Prompts,
    guard: GuardFile,
    judge: Judge,
    answers: Fields,
    judge_format: o.JudgeFormat = None,
    harm_threshold: Above = 0.0,
    as_json: o.AsJson = False,
) -> None:
    """Compare a guard's verdicts on other prompts with what its model's own answers cost."""
    from snpatch.guard.guard import Guard
    from snpatch.guard.scores import evaluate

    chats = prompts.data.prompts
    one = Guard.load(guard)
    engine = o.open_engine(config)
    with engine:
        probabilities = one.predict(engine, chats)
        known = _labelled(engine, chats, one.model, judge, judge_format, answers, harm_threshold)
    _tell(evaluate(probabilities, known.labels, threshold=one.threshold), {"guard": str(guard)}, prompts.name, as_json)


@app.command()
@with_options(config=ENGINE, prompts=DatasetOptions(), answers=ANSWERS)
def apply(
    config: EngineConfig,
    prompts: Prompts,
    guard: GuardFile,
    recipient: Annotated[str, typer.Option(help="The model that answers what is let through.")],
    answers: Fields,
    out: o.Out = None,
    as_json: o.AsJson = False,
) -> None:
    """Answer prompts with a guard in front: one that it refuses costs a prefill and gets its refusal."""
    from snpatch.guard.guard import Guard
    from snpatch.utils.files import check_writable

    chats = prompts.data.prompts
    one = Guard.load(guard)
    if out:
        check_writable(out)
    engine = o.open_engine(config)
    with engine, o.progress_bar("generate") as progress:
        completions = engine.generate(chats, recipient, Sampling(**answers), progress, guard=one)
    more = [{"harm": completion.harm} for completion in completions]
    write_completions(chats, completions, more, out, as_json)


def _labelled(engine, chats, model, judge, judge_format, answers, harm_threshold):
    from snpatch.guard.labels import label_answers

    with o.open_judges([judge], judge_format, engine.config) as judges, o.progress_bar("answers") as progress:
        return label_answers(
            engine,
            chats,
            model,
            *judges.values(),
            sampling=Sampling(**answers),
            threshold=harm_threshold,
            progress=progress,
        )


def _tell(scores, named: dict, where: str, as_json: bool) -> None:
    from snpatch.report.formatting import format_interval, format_value

    figures = asdict(scores)
    if as_json:
        o.echo(json.dumps({**named, **figures}))
        return
    for name, value in named.items():
        o.echo(f"{name}: {value}")
    o.echo(f"{scores.n} prompts, {scores.harmful} harmful; {where}:")
    for name in ("accuracy", "balanced_accuracy", "auc", "brier", "calibration_error", "majority"):
        is_defined = figures[name] is not None
        interval = f"  ({format_interval(figures, name)})" if is_defined else "  undefined: one class only"
        o.echo(f"  {name:18s} {format_value(figures[name])}{interval}")
