"""`snpatch generate`: completions of prompts, patched or not."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli.dataclass_options import DatasetOptions, EngineOptions, FieldOptions, Fields, Prompts, with_options
from snpatch.config import EngineConfig
from snpatch.errors import SnpatchError
from snpatch.names import POSITIONS
from snpatch.sampling import GREEDY, Sampling

SAMPLING = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "seed", "stop", "logprobs")


@with_options(config=EngineOptions(), prompts=DatasetOptions(takes_text=True), sampling=FieldOptions(GREEDY, SAMPLING))
def generate(
    config: EngineConfig,
    prompts: Prompts,
    sampling: Fields,
    recipient: Annotated[str, typer.Option(help="Recipient: the model to patch and to generate with.")] = "base",
    donor: Annotated[
        str | None,
        typer.Option(
            help="Source of activations: a model's name, zero, mean:recipient, mean:donor (add:mean:donor adds it), "
            "noise:N (N standard deviations) or scale:F (F times the recipient's own). Default: unpatched."
        ),
    ] = None,
    ranking: Annotated[Path | None, typer.Option(help="Ranking file; required with --donor.")] = None,
    window: Annotated[
        str | None,
        typer.Option(
            "--window", "-k", help="Neurons to patch: k for the top k, or ranks LO:HI; required with --donor."
        ),
    ] = None,
    positions: Annotated[
        str, typer.Option(help=f"Patched positions: {', '.join(POSITIONS)}, or the index to start from.")
    ] = "all",
    strength: Annotated[
        float,
        typer.Option(
            help="Patch strength: 1 copies the donor's value, 0.5 averages recipient and donor, 2 doubles the "
            "difference, -1 reverses it."
        ),
    ] = 1.0,
    out: o.Out = None,
    as_json: o.AsJson = False,
) -> None:
    """Generate completions, patched or not."""
    from snpatch.patching import spec
    from snpatch.utils.files import check_writable

    chats = prompts.data.prompts
    parameters = Sampling(**sampling)
    if out:
        check_writable(out)
    given = {"--ranking": ranking, "--window": window, "--positions": positions != "all", "--strength": strength != 1}
    patch_options = [name for name, value in given.items() if value]
    if donor is None and patch_options:
        raise SnpatchError(f"--donor: expected with {', '.join(patch_options)}, got none. Pass --donor.")
    if donor and (missing := [name for name in ("--ranking", "--window") if given[name] is None]):
        raise SnpatchError(
            f"--donor: expected {' and '.join(missing)} with it, got none. Pass {' and '.join(missing)}."
        )
    patch = recipient
    if donor:
        from snpatch.models.checkpoint import load_model_shape

        shape = partial(load_model_shape, config.model, config.allow_untested)
        patch = spec.from_text(recipient, donor, ranking, window, positions, parameters.seed, strength, shape)
    with o.open_engine(config) as engine, o.progress_bar("generate") as progress:
        completions = engine.generate(chats, patch, parameters, progress)
    extra_fields = [{"logprobs": completion.logprobs} if parameters.logprobs else {} for completion in completions]
    write_completions(chats, completions, extra_fields, out, as_json)


def write_completions(chats, completions, extra_fields: list[dict], out: Path | None, as_json: bool) -> None:
    """Write completions as JSONL to a file or stdout, or as readable text.

    extra_fields: further fields of each completion.
    """
    from snpatch.data import question
    from snpatch.utils.files import write_text

    rows = [
        {
            "prompt": question(chat),
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "overwrites": completion.overwrites,
            "token_ids": completion.token_ids,
            **fields,
        }
        for chat, completion, fields in zip(chats, completions, extra_fields, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out:
        write_text(out, lines)
    if as_json or not out:
        texts = lines if as_json else "".join(f"> {r['prompt']}\n{r['completion']}\n\n" for r in rows)
        o.write(texts)
    else:
        o.echo(f"{len(rows)} completions -> {out}")
