"""The command line on the golden model, run inside this process."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from snpatch import Ranking, cli

GOLDEN = Path(__file__).parents[1] / "goldens" / "A"
MODEL, SFT, DPO = (str(GOLDEN / part) for part in ("model", "adapters/sft", "adapters/dpo"))
ADAPTERS = ["-a", f"sft={SFT}", "-a", f"dpo={SFT},{DPO}", "--template", "tulu"]
JUDGE = "some_judge:by_words"
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
    """Return (exit code, stdout, stderr) of a command line."""
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


def write_sweep_file(tmp_path, prompts, ranking, **sweep):
    """Return a sweep's file with two sets, two strengths and an engine of its own."""
    adapters = {"sft": str(GOLDEN / "adapters/sft"), "dpo": [str(GOLDEN / f"adapters/{n}") for n in ("sft", "dpo")]}
    spec = {
        "model": MODEL, "adapters": adapters, "template": "tulu", "engine": {"backend": "transformers"},
        "sets": {"few": {"source": str(prompts), "first": 2}, "more": {"source": str(prompts), "first": 3}},
        "judges": {"cost": {"source": JUDGE}, "refused": {"source": "refusal"}},
        "rankings": {"safety": str(ranking), "own": {"recipient": "sft", "donor": "dpo", "prompts": "few"}},
        "contrast_tokens": 4, "sampling": {"max_tokens": 3},
        "sweep": {"recipients": ["sft"], "donors": ["dpo"], "windows": [0, "10:70"], "strengths": [1, 0.5],
                  "controls": 1, **sweep},
    }  # fmt: skip
    path = tmp_path / "sweep-spec.json"
    path.write_text(json.dumps(spec))
    return path
