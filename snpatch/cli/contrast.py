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
from snpatch.sampling import CONTRAST

SHOWN, TOLD = 10, 20  # of the first neurons, as text and as JSON


@generated(config=Engine(), prompts=Data(), sampling=Some(CONTRAST, ("max_tokens",)))
def contrast(
    config: EngineConfig,
    prompts: Prompts,
    generator: Annotated[str, typer.Option(help="The model that writes the completions (the recipient).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the ranking goes (.safetensors).")],
    sampling: Fields,
    against: Annotated[
        str | None,
        typer.Option(help="The model it is compared with (the donor). Without one: by the generator's own size."),
    ] = None,
    at: Annotated[str, typer.Option(help="Positions: emitted, emitting, prompt or prompt_last.")] = "emitted",
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
    from snpatch.contrast import EXCLUDED
    from snpatch.data import read_completions
    from snpatch.files import check_writable

    chats = prompts.data.prompts
    if completions and not at.startswith("emit"):
        raise SnpatchError(f"--completions is for --at emitted or emitting, got {at}")
    given = read_completions(completions, prompts.limit, chats) if completions else None
    check_writable(out)
    with o.open_engine(config) as engine, o.progress_bar("contrast") as progress:
        ranking = engine.contrast(
            chats,
            generator,
            against,
            at=at,
            completions=given,
            sampling=replace(CONTRAST, **sampling),
            exclude_layers=[] if no_exclude_layers else (exclude_layer or EXCLUDED),
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
        **{key: ranking.meta[key] for key in ("generator", "against", "at", "tokens", "prompts", "empty")},
        "top": [
            [*neuron, ranking.scores[tuple(neuron)].item()] for neuron in ranking.top(min(TOLD, len(ranking))).tolist()
        ],
    }
    if as_json:
        o.tell(json.dumps(summary))
        return
    o.tell(f"{len(ranking)} neurons ranked over {summary['tokens']} tokens of {summary['prompts']} prompts -> {out}")
    for layer, neuron, score in summary["top"][:SHOWN]:
        o.tell(f"  layer {layer:3d}  neuron {neuron:6d}  change score {score:.4f}")
