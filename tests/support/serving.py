"""A server for all tests, its models and patches, and the offline engine's completions of them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jobs import EXTENDED_JOBS, FULL_PATCH_JOB, IDS, INTERVENTION_JOBS, JOBS, PATCHED_JOB, RANKINGS, SHAPE, VALUES, Job
from served import Server

from snpatch import Constant, Engine, Guard, Sampling
from snpatch.guard.config import GuardConfig

SMALL_ENGINE = ["--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "64", "--block-size", "32"]
CAPACITY_OPTIONS = ["--engine-arg", "max_interventions=3", "--engine-arg", "max_rankings=4"]
CONSTANTS = {"values": VALUES, "half": 0.5 * VALUES, "zeros": torch.zeros(SHAPE)}
SAFE = {"recipient": "sft", "donor": "dpo", "ranking": "first", "window": 60}
WORDS = "bala bama bana bara"  # of the tiny model's language
CHAT = [{"role": "user", "content": WORDS}]


def patch_json(job: Job) -> dict:
    """Return a job as the object `snpatch` of a request."""
    if not job.is_patched:
        return {"recipient": job.recipient}
    first, *further = (_intervention(part) for part in (job, *job.further))
    return {"recipient": job.recipient, **({"interventions": [first, *further]} if further else first)}


def _intervention(job: Job) -> dict:
    donor = job.donor
    if job.factor is not None:
        donor = f"scale:{job.factor}"
    elif isinstance(donor, torch.Tensor):
        name = next(name for name, values in CONSTANTS.items() if torch.equal(values, donor))
        donor = f"{'add:' if job.mode == 'add' else ''}constant:{name}"
    ranking = ("first", "second")[job.order]
    return {
        "donor": donor,
        "ranking": ranking,
        "window": [*job.window],
        "positions": job.positions,
        "strength": job.strength,
    }


SERVED = [
    job
    for job in (*JOBS, *EXTENDED_JOBS, *INTERVENTION_JOBS)
    if not any(part.seed is not None for part in (job, *job.further))
]
SIXTEEN = [job for job in SERVED if job.is_patched][:16]
MANY = [replace(job, prompt=(i + i // 16) % 8) for i, job in enumerate(SIXTEEN * 4)]


LEAK = "leaked"  # what nanobind prints for each object that is left at exit
RUNNING: list[Server] = []  # servers that conftest.py stops


@pytest.fixture(scope="session")
def offline(zoo, tmp_path_factory):
    """Return the tiny model's files, the offline engine's completions (of MANY, seeded, of a chat), and a guard."""
    tiny_model, folder = zoo("llama"), tmp_path_factory.mktemp("served")
    for name, ranking in zip(("first", "second"), RANKINGS, strict=True):
        ranking.save(folder / f"{name}.safetensors")
    for name, values in CONSTANTS.items():
        Constant(values).save(folder / f"{name}.safetensors")
    options = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64, "block_size": 32, "max_interventions": 3}
    with Engine(tiny_model.folder, tiny_model.adapters, template="tulu", max_rankings=4, **options) as engine:
        sampling = Sampling(max_tokens=10)
        completions = engine.generate([job.ids for job in MANY], [job.patch for job in MANY], sampling)
        seeded_completions = engine.generate(
            [IDS[2]], PATCHED_JOB.patch, replace(sampling, temperature=1.0, seed=5, n=3)
        )
        chat = engine.generate([CHAT], FULL_PATCH_JOB.patch, sampling)
        identity = {"prompts": IDS, "model": "sft", "fingerprint": engine.fingerprint("sft")}
        features, labels = engine.capture(IDS, "sft", RANKINGS[0], 5), np.array([True, False] * 4)
        guard = Guard.fit(features, labels, RANKINGS[0], **identity, config=GuardConfig(folds=2))
        harm = guard.predict(engine, IDS)
    guard = replace(guard, threshold=float(np.median(harm)))
    guard.save(folder / "guard.safetensors")
    return SimpleNamespace(
        tiny_model=tiny_model,
        folder=folder,
        completions=completions,
        seeded_completions=seeded_completions,
        chat=chat[0],
        guard=guard,
        harm=harm,
    )


def serve_options(tiny_model, folder) -> list[str]:
    """Return the options of a server of the tiny model, with files in a folder."""
    adapters = [f"-a{name}={','.join(map(str, folders))}" for name, folders in tiny_model.adapters.items()]
    files = [f"--ranking={folder / name}.safetensors" for name in ("first", "second")]
    files += [f"--constant={folder / name}.safetensors" for name in CONSTANTS]
    return [str(tiny_model.folder), "--template", "tulu", *adapters, *files, *SMALL_ENGINE]


@pytest.fixture(scope="session")
def server(offline, tmp_path_factory):
    """Yield a server with every file and patch that the tests name; it must exit without errors."""
    folder = tmp_path_factory.mktemp("server")
    patches = ["--patch=safe=recipient=sft,donor=dpo,ranking=first,k=60", "--patch=kept=recipient=sft,guard=guard"]
    guard = [f"--guard={offline.folder / 'guard.safetensors'}"]
    limits = ["--allow-upload", folder / "uploads", "--max-sweep-completions", 200, *CAPACITY_OPTIONS]
    running_server = Server(folder, *serve_options(offline.tiny_model, offline.folder), *patches, *guard, *limits)
    running_server.folder = folder
    RUNNING.append(running_server)
    yield running_server
    assert running_server.end() == 0, running_server.read_log()
    assert LEAK not in running_server.read_log(), running_server.read_log()


@pytest.fixture(scope="session")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(client, job: Job, **options):
    """Return the answer to a job, with token ids."""
    body = {"return_token_ids": True, "snpatch": patch_json(job)}
    arguments = {"model": "base", "prompt": job.ids, "max_tokens": 10, "temperature": 0, **options}
    return client.completions.create(**arguments, extra_body=body)
