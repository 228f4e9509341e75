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
from snpatch.errors import SnpatchError
from snpatch.guard.config import GuardConfig
from snpatch.sampling import GREEDY, Sampling

ENGINE, COMPLETION_OPTIONS = EngineOptions(), FieldOptions(GREEDY, ("max_tokens",))
FIT_OPTIONS = FieldOptions(GuardConfig, ("folds", "threshold", "refusal"))

app = typer.Typer(
    help="Fit, test and apply guards: classifiers that predict a harmful completion from the prompt.",
    no_args_is_help=True,
)

GuardFile = Annotated[Path, typer.Option("--guard", help="Guard file of `snpatch guard fit` (.safetensors).")]
HarmThreshold = Annotated[float, typer.Option("--harm-threshold", help="Completions with a higher cost are harmful.")]
Judge = Annotated[str, typer.Option(help="Cost model (folder or hub name), `refusal`, or module:function.")]


@app.command()
@with_options(config=ENGINE, prompts=DatasetOptions(), answers=COMPLETION_OPTIONS, guard_fields=FIT_OPTIONS)
def fit(
    config: EngineConfig,
    prompts: Prompts,
    model_name: Annotated[
        str, typer.Option("--model", help="Model whose neurons are read and whose completions are judged.")
    ],
    ranking: Annotated[Path, typer.Option(help="Ranking file.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Number of top neurons to read.")],
    judge: Judge,
    out: Annotated[Path, typer.Option("--out", "-o", help="Guard file to write (.safetensors).")],
    answers: Fields,
    guard_fields: Fields,
    judge_format: o.JudgeFormat = None,
    harm_threshold: HarmThreshold = 0.0,
    strengths: Annotated[
        str,
        typer.Option("--C", help="Inverse L2 penalty. Of several (0.01,0.1,1), cross-validation chooses one."),
    ] = ",".join(map(str, GuardConfig().strengths)),
    balanced: Annotated[bool, typer.Option("--balanced", help="Weight both classes equally.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """Complete prompts, judge the completions, and fit a classifier of harm from the prompts alone."""
    from snpatch.guard.fitting import predict_out_of_fold
    from snpatch.guard.guard import Guard
    from snpatch.guard.labels import deduplicate
    from snpatch.guard.scores import evaluate, warn_of_few_prompts
    from snpatch.models.checkpoint import load_model_shape
    from snpatch.patching import spec
    from snpatch.ranking.ranking import Ranking
    from snpatch.utils.files import check_writable

    ranking_data = Ranking.load(ranking, partial(load_model_shape, config.model, config.allow_untested))
    settings = GuardConfig(
        tuple(spec.parse_number(part, float, "--C") for part in strengths.split(",")),
        "balanced" if balanced else None,
        **guard_fields,
    )
    check_writable(out)
    unique_prompts = deduplicate(prompts.data.prompts)
    if num_repeated := len(prompts.data) - len(unique_prompts):
        _echo_warnings([f"{prompts.name}: {num_repeated} repeated prompts are left out"])
    engine = o.open_engine(config)
    with engine:
        labeled = _label_prompts(engine, unique_prompts, model_name, judge, judge_format, answers, harm_threshold)
        features = engine.capture(labeled.prompts, model_name, ranking_data, k)
        guard = Guard.fit(
            features,
            labeled.labels,
            ranking_data,
            prompts=labeled.prompts,
            model=model_name,
            fingerprint=engine.fingerprint(model_name),
            config=settings,
            meta={"judge": judge, "harm_threshold": harm_threshold, "prompts": prompts.data.source},
        )
        probabilities = predict_out_of_fold(features.numpy(), labeled.labels, settings)
        scores = evaluate(probabilities, labeled.labels, threshold=settings.threshold)
    guard.save(out)
    _echo_warnings(warn_of_few_prompts(prompts.name, labeled.labels))
    _print_scores(scores, {"guard": str(out), "C": guard.meta["C"], "k": k}, "by cross-validation", as_json)


@app.command("eval")
@with_options(config=ENGINE, prompts=DatasetOptions(), answers=COMPLETION_OPTIONS)
def evaluate_guard(
    config: EngineConfig,
    prompts: Prompts,
    guard: GuardFile,
    judge: Judge,
    answers: Fields,
    judge_format: o.JudgeFormat = None,
    harm_threshold: Annotated[
        float | None,
        typer.Option("--harm-threshold", help="Completions with a higher cost are harmful. Default: the guard's own."),
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Test a guard on other prompts, labeled by the judged completions of its model.

    Prompts that the guard was fitted on are left out.
    """
    from snpatch.guard.guard import Guard
    from snpatch.guard.labels import deduplicate
    from snpatch.guard.scores import evaluate, warn_of_few_prompts

    loaded = Guard.load(guard)
    if harm_threshold is None:
        harm_threshold = _read_harm_threshold(loaded.meta)
    distinct = deduplicate(prompts.data.prompts)
    chats = [distinct[i] for i in loaded.find_unseen(distinct, prompts.name)]
    num_repeated, num_fitted = len(prompts.data) - len(distinct), len(distinct) - len(chats)
    engine = o.open_engine(config)
    with engine:
        probabilities = loaded.predict(engine, chats)
        labeled = _label_prompts(engine, chats, loaded.model, judge, judge_format, answers, harm_threshold)
    scores = evaluate(probabilities, labeled.labels, threshold=loaded.threshold)
    warnings = [
        *([f"{prompts.name}: {num_fitted} prompts that the guard was fitted on are left out"] if num_fitted else []),
        *([f"{prompts.name}: {num_repeated} repeated prompts are left out"] if num_repeated else []),
        *_compare_judges(loaded.meta, judge),
        *warn_of_few_prompts(prompts.name, labeled.labels),
    ]
    _echo_warnings(warnings)
    facts = {"guard": str(guard), "harm_threshold": harm_threshold, "left_out": num_fitted + num_repeated}
    _print_scores(scores, facts, prompts.name, as_json)


@app.command()
@with_options(config=ENGINE, prompts=DatasetOptions(), answers=COMPLETION_OPTIONS)
def apply(
    config: EngineConfig,
    prompts: Prompts,
    guard: GuardFile,
    recipient: Annotated[str, typer.Option(help="Model that completes the prompts that are not refused.")],
    answers: Fields,
    out: o.Out = None,
    as_json: o.AsJson = False,
) -> None:
    """Complete prompts behind a guard. A refused prompt costs one prefill and gets the guard's refusal."""
    from snpatch.guard.guard import Guard
    from snpatch.utils.files import check_writable

    chats = prompts.data.prompts
    loaded = Guard.load(guard)
    if out:
        check_writable(out)
    engine = o.open_engine(config)
    with engine, o.progress_bar("generate") as progress:
        completions = engine.generate(chats, recipient, Sampling(**answers), progress, guard=loaded)
    columns = [{"harm": completion.harm} for completion in completions]
    write_completions(chats, completions, columns, out, as_json)


def _read_harm_threshold(meta: dict) -> float:
    value = meta.get("harm_threshold")
    if not isinstance(value, int | float):
        raise SnpatchError("guard: expected the harm threshold of its labels, got none. Add --harm-threshold.")
    return float(value)


def _compare_judges(meta: dict, judge: str) -> list[str]:
    fitted = meta.get("judge", judge)
    return [] if fitted == judge else [f"the guard was fitted to labels of the judge {fitted}, not of {judge}"]


def _echo_warnings(warnings: list[str]) -> None:
    for warning in warnings:
        o.echo(warning, is_error=True)


def _label_prompts(engine, chats, model, judge, judge_format, answers, harm_threshold):
    from snpatch.guard.labels import label_answers

    with o.open_judges([judge], judge_format, engine.config) as judges, o.progress_bar("completions") as progress:
        return label_answers(
            engine,
            chats,
            model,
            *judges.values(),
            sampling=Sampling(**answers),
            threshold=harm_threshold,
            progress=progress,
        )


def _print_scores(scores, facts: dict, tested_on: str, as_json: bool) -> None:
    from snpatch.report.formatting import format_interval, format_value

    values = asdict(scores)
    if as_json:
        o.echo(json.dumps({**facts, **values}))
        return
    for name, value in facts.items():
        o.echo(f"{name}: {value}")
    o.echo(f"{scores.n} prompts, {scores.harmful} harmful; {tested_on}:")
    for name in ("accuracy", "balanced_accuracy", "auc", "brier", "calibration_error", "majority"):
        is_defined = values[name] is not None
        interval = f"  ({format_interval(values, name)})" if is_defined else "  undefined: one class only"
        o.echo(f"  {name:18s} {format_value(values[name])}{interval}")
