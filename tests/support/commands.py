"""The command line on the golden model, inside this process."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from snpatch import Ranking, cli

GOLDEN = Path(__file__).parents[1] / "goldens" / "A"
MODEL, SFT, DPO = (str(GOLDEN / part) for part in ("model", "adapters/sft", "adapters/dpo"))
ADAPTERS = ["-a", f"sft={SFT}", "-a", f"dpo={SFT},{DPO}", "--template", "tulu"]
PAIR = [*ADAPTERS, "--backend", "transformers"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = json.loads((GOLDEN / "prompts.json").read_text())["prompts"]
    path.write_text("".join(json.dumps({"id": i, "prompt": row["content"]}) + "\n" for i, row in enumerate(rows)))
    return str(path)


@pytest.fixture(scope="module")
def ranking(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranking") / "golden.safetensors"
    order = load_file(GOLDEN / "contrast.safetensors")["completion.batch5.neuron_ranks"]
    Ranking.from_order(order, (4, 352)).save(path)
    return str(path)


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of one command line."""
    capsys.readouterr()
    argv, sys.argv = sys.argv, ["snpatch", *map(str, arguments)]
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
    out, err = capsys.readouterr()
    return code, out, err
