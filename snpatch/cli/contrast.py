"""`snpatch contrast`: rank neurons by how much two models' activations differ."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli.dataclass_options import DatasetOptions, EngineOptions, FieldOptions, Fields, Prompts, with_options
from snpatch.config import EngineConfig
from snpatch.errors import SnpatchError
from snpatch.names import CONTRAST_POSITIONS
from snpatch.sampling import CONTRAST

SUMMARY = ("recipient", "donor", "generate_with", "positions", "tokens", "prompts", "empty")  # of a ranking's meta
NEURONS_PRINTED, NEURONS_IN_JSON = 10, 20


@with_options(config=EngineOptions(), prompts=DatasetOptions(), sampling=FieldOptions(CONTRAST, ("max_tokens",)))
def contrast(
    config: EngineConfig,
    prompts: Prompts,
    recipient: Annotated[str, typer.Option(help="Recipient: the model to patch.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output file for the ranking (.safetensors).")],
    sampling: Fields,
    donor: Annotated[
        str | None,
        typer.Option(help="Donor: the model to compare with. Default: rank by the recipient's own activations."),
    ] = None,
    generate_with: Annotated[
        str, typer.Option(help="Model that generates the completions: recipient or donor.")
    ] = "recipient",
    positions: Annotated[
        str, typer.Option(help=f"Token positions to compare: {', '.join(CONTRAST_POSITIONS)}.")
    ] = "completion",
    completions: Annotated[
        Path | None, typer.Option(help="JSONL file with a `completion` per prompt, used instead of generating.")
    ] = None,
    exclude_layer: Annotated[
        list[int] | None,
        typer.Option(help="Layer to exclude from the ranking; -1 is the last layer. Repeatable. Default: -1."),
    ] = None,
    no_exclude_layers: Annotated[bool, typer.Option("--no-exclude-layers", help="Rank all layers.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """Rank neurons by how much two models' activations differ on the same text.

    The last layer is not ranked by default; --no-exclude-layers ranks all layers.
    """
    from snpatch.data import read_completions
    from snpatch.engine.contrast import COMPLETION_POSITIONS, EXCLUDED_LAYERS
    from snpatch.ranking.ranking import check_ranking_suffix
    from snpatch.utils.files import check_writable

    chats = prompts.data.prompts
    if completions and positions not in COMPLETION_POSITIONS:
        raise SnpatchError(f"--completions: expected --positions {' or '.join(COMPLETION_POSITIONS)}, got {positions}")
    texts = read_completions(completions, prompts.limit, chats, prompts.column) if completions else None
    check_writable(out)
    check_ranking_suffix(out)
    with o.open_engine(config) as engine, o.progress_bar("contrast") as progress:
        ranking = engine.contrast(
            chats,
            recipient,
            donor,
            generate_with=generate_with,
            positions=positions,
            completions=texts,
            sampling=replace(CONTRAST, **sampling),
            exclude_layers=[] if no_exclude_layers else (exclude_layer or EXCLUDED_LAYERS),
            progress=progress,
        )
    ranking.meta["data"] = prompts.data.provenance
    if texts:
        ranking.meta["completions"] = {"path": str(completions), "rows": len(texts)}
    if n := ranking.meta["empty"]:
        o.echo(f"{prompts.name}: {n} of {len(chats)} completions are empty and were not observed", is_error=True)
    ranking.save(out)
    assert ranking.scores is not None
    summary = {
        "ranking": str(out),
        "neurons": len(ranking),
        **{
            key: ranking.meta[key]
            for key in ("recipient", "donor", "generate_with", "positions", "tokens", "prompts", "empty")
        },
        "top": [
            [*neuron, ranking.scores[tuple(neuron)].item()]
            for neuron in ranking.top(min(NEURONS_IN_JSON, len(ranking))).tolist()
        ],
    }
    if as_json:
        o.echo(json.dumps(summary))
        return
    o.echo(f"{len(ranking)} neurons ranked over {summary['tokens']} tokens of {summary['prompts']} prompts -> {out}")
    for layer, neuron, score in summary["top"][:NEURONS_PRINTED]:
        o.echo(f"  layer {layer:3d}  neuron {neuron:6d}  change score {score:.4f}")
