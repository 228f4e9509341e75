"""Third-party clients of `snpatch serve`, as in the README: the examples, lm-eval, the report."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import tiny
import yaml
from commands import run

import snpatch.server

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine

EXAMPLES = Path(snpatch.server.__file__).parent / "examples"


@pytest.fixture(scope="module")
def patch_server(offline, server):
    """Yield the server with the ranking `safety`, which the examples use."""
    body = (offline.folder / "first.safetensors").read_bytes()
    assert httpx.put(f"{server.url}/v1/snpatch/rankings/safety", content=body).status_code == 201
    yield server
    httpx.delete(f"{server.url}/v1/snpatch/rankings/safety")


def test_five_lines_example_prints_verified_answer(patch_server):
    result = subprocess.run(
        [sys.executable, EXAMPLES / "five_lines.py", patch_server.url], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "'verified': True" in result.stdout
    lines = (EXAMPLES / "five_lines.py").read_text().split("-> None:\n")[1].split("\n\n")[0].splitlines()
    assert len(lines) == 5


def test_curl_example_prints_named_streamed_and_inline_answers(patch_server):
    result = subprocess.run(["sh", EXAMPLES / "curl.sh", patch_server.url], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    listing, answer, *chunks, inline = [line for line in result.stdout.splitlines() if line]
    assert "safe" in json.loads(listing)["patches"]
    assert json.loads(answer)["snpatch"]["patch"] == "safe"
    assert json.loads(chunks[-2].removeprefix("data: "))["snpatch"] == json.loads(answer)["snpatch"]
    assert chunks[-1] == "data: [DONE]"
    assert json.loads(inline)["snpatch"]["overwrites"] > 0


def test_curve_example_writes_plot_and_report(patch_server, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in tiny.PROMPTS[:4]))
    words = [
        "--url",
        patch_server.url,
        "--recipient=sft",
        "--donor=dpo",
        "--ranking=safety",
        "-k",
        "0,50,288",
        "--max-tokens=6",
    ]
    command = [sys.executable, EXAMPLES / "curve.py", prompts, *words, "-o", tmp_path / "curve"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len([line for line in result.stdout.splitlines() if "changed" in line and line.startswith("sft, dpo")]) == 4
    assert (tmp_path / "curve" / "sweep.png").stat().st_size > 5000
    code, _, error = run(capsys, "report", tmp_path / "curve")
    assert code == 0, error
    page = (tmp_path / "curve" / "report.html").read_text()
    assert '"recipient":"sft"' in page.replace(" ", "")
    refused = subprocess.run([*command[:-2], "--judge", "nobody"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "judge: expected one of refusal" in refused.stderr


def test_lm_eval_gets_completions_from_server(patch_server, client, tmp_path):
    """`--model local-chat-completions` with a patch's name: its answers are the server's own to the same chats."""
    rows = [{"text": prompt, "target": "nothing"} for prompt in tiny.PROMPTS[:4]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "served_text", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "doc_to_text": "{{text}}", "doc_to_target": "{{target}}", "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["nowhere"], "max_gen_toks": 6, "temperature": 0},
    }  # fmt: skip
    (tmp_path / "served_text.yaml").write_text(yaml.dump(task))
    arguments = f"model=safe,base_url={patch_server.url}/v1/chat/completions,num_concurrent=4"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-chat-completions", "--model_args", arguments]
    command += ["--tasks", "served_text", "--include_path", tmp_path, "--apply_chat_template"]
    command += ["--output_path", tmp_path / "out", "--log_samples"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        chat = [{"role": "user", "content": sample["doc"]["text"]}]
        patched = client.chat.completions.create(model="safe", messages=chat, max_tokens=6, temperature=0)
        unpatched = client.chat.completions.create(model="sft", messages=chat, max_tokens=6, temperature=0)
        assert sample["resps"][0][0] == patched.choices[0].message.content
        assert patched.choices[0].message.content != unpatched.choices[0].message.content
