"""`snpatch contrast`: neurons ranked by how differently two models activate them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli.generated import Data, Engine, Fields, Prompts, Some, generated
from snpatch.config import EngineConfig
from snpatch.errors import SnpatchError
from snpatch.names import CONTRAST_POSITIONS
from snpatch.sampling import CONTRAST

SUMMARY = ("recipient", "donor", "generate_with", "positions", "tokens", "prompts", "empty")  # of a ranking's meta
NEURONS_PRINTED, NEURONS_IN_JSON = 10, 20


@generated(config=Engine(), prompts=Data(), sampling=Some(CONTRAST, ("max_tokens",)))
def contrast(
    config: EngineConfig,
    prompts: Prompts,
    recipient: Annotated[str, typer.Option(help="Model that is to be patched.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File of the ranking (.safetensors).")],
    sampling: Fields,
    donor: Annotated[
        str | None, typer.Option(help="Model it is compared with. Default: rank by the recipient's own activations.")
    ] = None,
    generate_with: Annotated[str, typer.Option(help="Who writes the completions: recipient or donor.")] = "recipient",
    positions: Annotated[
        str, typer.Option(help=f"Positions that count: {', '.join(CONTRAST_POSITIONS)}.")
    ] = "completion",
    completions: Annotated[
        Path | None, typer.Option(help="JSONL with the `completion` of each prompt, instead of generated ones.")
    ] = None,
    exclude_layer: Annotated[
        list[int] | None, typer.Option(help="A layer to leave out, -1 is the last. May be repeated. Default: -1.")
    ] = None,
    no_exclude_layers: Annotated[bool, typer.Option("--no-exclude-layers", help="Leave no layer out.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """Rank neurons by how differently two models activate them on the same text."""
    from snpatch.data import read_completions
    from snpatch.engine.contrast import COMPLETION_POSITIONS, EXCLUDED_LAYERS
    from snpatch.utils.files import check_writable

    chats = prompts.data.prompts
    if completions and positions not in COMPLETION_POSITIONS:
        raise SnpatchError(f"--completions is for --positions {' or '.join(COMPLETION_POSITIONS)}, got {positions}")
    given = read_completions(completions, prompts.limit, chats) if completions else None
    check_writable(out)
    with o.open_engine(config) as engine, o.progress_bar("contrast") as progress:
        ranking = engine.contrast(
            chats,
            recipient,
            donor,
            generate_with=generate_with,
            positions=positions,
            completions=given,
            sampling=replace(CONTRAST, **sampling),
            exclude_layers=[] if no_exclude_layers else (exclude_layer or EXCLUDED_LAYERS),
            progress=progress,
        )
    ranking.meta["data"] = prompts.data.provenance
    if given:
        ranking.meta["completions"] = {"path": str(completions), "rows": len(given)}
    if n := ranking.meta["empty"]:
        o.tell(f"{prompts.name}: {n} of {len(chats)} completions are empty, and were not observed", is_error=True)
    ranking.save(out)
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
        o.tell(json.dumps(summary))
        return
    o.tell(f"{len(ranking)} neurons ranked over {summary['tokens']} tokens of {summary['prompts']} prompts -> {out}")
    for layer, neuron, score in summary["top"][:NEURONS_PRINTED]:
        o.tell(f"  layer {layer:3d}  neuron {neuron:6d}  change score {score:.4f}")
