"""Prompts and patches that both executors are tested with, as the product and as the oracle take them."""

import os
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import oracle
import pytest
import tiny
import torch
import transformers

from snpatch import Constant, Intervention, Noise, Patch, Ranking, Sampling, Scale

ORACLE_CACHE = Path(__file__).parents[2] / "build" / "oracle"
SHAPE = (tiny.LAYERS, tiny.NEURONS)
ALL = tiny.LAYERS * tiny.NEURONS
ENCODE = tiny.tokenizer()
IDS = [list(ENCODE(prompt)["input_ids"]) for prompt in tiny.PROMPTS]
GREEDY = Sampling(max_tokens=10, logprobs=True)
LOGPROB = 1e-4  # largest allowed error of a float32 log-probability
MIN_LOGIT_GAP = 3e-5  # between the two largest logits; below it rounding decides the token


def random_order(seed: int) -> list[tuple[int, int]]:
    """Return all neurons in a random order."""
    order = torch.randperm(ALL, generator=torch.Generator().manual_seed(seed)).tolist()
    return [(flat // tiny.NEURONS, flat % tiny.NEURONS) for flat in order]


ORDERS = [random_order(0), random_order(1)]
RANKINGS = [Ranking.from_order(torch.tensor(order), SHAPE) for order in ORDERS]
VALUES = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True, eq=False)
class Job:
    """A prompt and its patch, convertible to the product's and to the oracle's patch."""

    prompt: int
    recipient: str
    donor: str | torch.Tensor | None = None  # a model, a constant's values, or a noise's standard deviations
    window: tuple[int, int] = (0, 0)
    positions: str | int = "all"
    order: int = 0
    seed: int | None = None  # of noise
    strength: float = field(default=1.0, kw_only=True)
    mode: str = field(default="replace", kw_only=True)  # of a constant
    factor: float | None = field(default=None, kw_only=True)  # the source is the recipient's own value times this
    further: "tuple[Job, ...]" = field(default=(), kw_only=True)  # interventions on the same prompt and recipient
    suffix: str = field(default="", kw_only=True)  # appended to adapter names

    @property
    def ids(self) -> list[int]:
        return IDS[self.prompt]

    @property
    def recipient_name(self) -> str:
        return self.recipient if self.recipient == "base" else self.recipient + self.suffix

    @property
    def patch(self) -> Patch | str:
        if not self.is_patched:
            return self.recipient_name
        if self.factor is not None:
            donor = Scale(self.factor)
        elif self.seed is not None:
            donor = Noise(self.donor, seed=self.seed)
        else:
            donor = self.donor + self.suffix if isinstance(self.donor, str) else Constant(self.donor, self.mode)
        intervention = Intervention(donor, RANKINGS[self.order], self.window, self.positions, self.strength)
        further = [job.within(self).patch.interventions[0] for job in self.further]
        return Patch(self.recipient_name, interventions=[intervention, *further])

    def within(self, job: "Job") -> "Job":
        """Return a further intervention as a job of its own."""
        return replace(self, prompt=job.prompt, recipient=job.recipient)

    @property
    def is_patched(self) -> bool:
        return self.donor is not None or self.factor is not None

    @property
    def span(self) -> tuple[int, int]:
        """Patched positions [start, stop), by the definition of `positions`."""
        n = len(self.ids)
        if isinstance(self.positions, int):
            return (self.positions if self.positions >= 0 else n + self.positions), 10**6
        return {"all": (0, 10**6), "prompt": (0, n), "completion": (n, 10**6)}[self.positions]

    def oracle(self, tiny_model) -> tuple[oracle.Model, oracle.Patch | None]:
        recipient = oracle.model(*tiny_model.checkpoints[self.recipient_name])
        if not self.is_patched:
            return recipient, None
        mask = oracle.build_mask(ORDERS[self.order][slice(*self.window)], SHAPE)
        start, stop = self.span
        if isinstance(self.donor, str):
            values = {"donor": oracle.model(*tiny_model.checkpoints[self.donor + self.suffix])}
        elif self.factor is not None:
            values = {"constant": torch.zeros(SHAPE)}
        else:
            values = {"constant": self.donor} if self.seed is None else {"deviation": self.donor, "seed": self.seed}
        is_added = self.seed is not None or self.mode == "add"
        keep, take = 1.0 if is_added else 1 - self.strength, self.strength
        if self.factor is not None:
            keep = 1 - self.strength + self.strength * self.factor
        further_patches = tuple(job.within(self).oracle(tiny_model)[1] for job in self.further)
        return recipient, oracle.Patch(
            mask, **values, start=start, stop=stop, keep=keep, take=take, further=further_patches
        )

    def overwrites(self, num_tokens: int) -> int:
        """Return neurons x patched positions; the last generated token is never read."""
        start, stop = self.span
        positions = max(0, min(stop, len(self.ids) + num_tokens - 1) - start)
        count = (self.window[1] - self.window[0]) * positions if self.is_patched else 0
        return count + sum(job.within(self).overwrites(num_tokens) for job in self.further)


JOBS = [
    Job(0, "base"),
    Job(1, "sft", "dpo", (0, 0)),
    Job(2, "sft", "dpo", (0, 29)),
    Job(3, "sft", "dpo", (0, ALL)),
    Job(4, "base", "dpo", (20, 90)),
    Job(5, "base", "dpo", (0, 150), order=1),
    Job(6, "base", "dpo", (0, ALL)),
    Job(7, "sft", "dpo", (0, 200), "prompt"),
    Job(0, "base", "dpo", (0, 200), "completion", order=1),
    Job(2, "sft", "dpo", (0, 200), -2),
    Job(4, "base", "dpo", (0, 200), 3),
    Job(1, "dpo"),
    Job(3, "base", torch.zeros(SHAPE), (0, 40)),
    Job(6, "sft", VALUES, (10, 60), order=1),
    Job(7, "dpo", 0.2 * VALUES.abs(), (0, 60), seed=7),
    Job(5, "base", VALUES, (0, 60), "completion"),
]
PATCHED_JOB, FULL_PATCH_JOB = JOBS[2], JOBS[3]  # of 29 and of all neurons
DONOR_JOBS = JOBS[2:6]  # patched from dpo at all positions

# Strengths, added constants, scales, and recipients and donors swapped.
EXTENDED_JOBS = [
    Job(2, "sft", "dpo", (0, 150), strength=0.5),
    Job(4, "base", "dpo", (20, 120), order=1, strength=1.5),
    Job(0, "base", "dpo", (0, 90), strength=-0.5),
    Job(3, "sft", 0.5 * VALUES, (0, 80), mode="add"),
    Job(6, "base", VALUES, (0, 80), "completion", strength=0.25),
    Job(7, "sft", 0.2 * VALUES.abs(), (0, 60), seed=3, strength=2.0),
    Job(5, "dpo", None, (0, 100), factor=1.75),
    Job(1, "base", None, (10, 200), factor=0.0),
    Job(2, "dpo", "sft", (0, 70)),
    Job(5, "dpo", "base", (30, 140), -3, order=1, strength=1.25),
]

# With secondary weights: both models of a patch on one set of weights, and adapters on the secondary weights.
SAME_WEIGHTS_JOBS = [
    Job(3, "tuned", "dpo", (0, 120)),
    Job(6, "dpo", "tuned", (20, 90)),
    Job(4, "dpo", "dpo", (0, 50)),
    Job(0, "sft", "base", (0, 200), "completion"),
    Job(1, "tuned", "sft", (0, ALL)),
]

# Several interventions: a constant and a donor, windows that overlap, other positions, noise, a scaled copy.
INTERVENTION_JOBS = [
    Job(2, "sft", "dpo", (0, 90), further=(Job(0, "", VALUES, (60, 140), order=1),)),
    Job(0, "base", "dpo", (0, 60), "prompt", further=(Job(0, "", "dpo", (60, 200), "completion", strength=0.5),)),
    Job(4, "sft", 0.2 * VALUES.abs(), (0, 50), seed=5, further=(Job(0, "", "dpo", (20, 80), order=1),)),
    Job(
        7,
        "base",
        "dpo",
        (0, 80),
        further=(Job(0, "", None, (0, 80), factor=2.0), Job(0, "", VALUES, (0, 9), mode="add")),
    ),
    Job(3, "dpo", "sft", (0, 0), further=(Job(0, "", "sft", (0, 150), -2, strength=1.5), Job(0, "", VALUES, (5, 5)))),
    Job(6, "base", VALUES, (0, 40), 3, further=(Job(0, "", torch.zeros(SHAPE), (30, 70), order=1),)),
]


def generate(engine, jobs, sampling=GREEDY):
    return engine.generate([job.ids for job in jobs], [job.patch for job in jobs], sampling)


def completion_data(completions) -> list[tuple]:
    return [(c.token_ids, c.text, c.finish_reason, c.stop_reason, c.overwrites) for c in completions]


@cache
def oracle_completion(tiny_model: tiny.TinyModel, job: Job) -> oracle.Generation:
    """Return the oracle's completion of 10 tokens, from build/oracle if an earlier run computed it.

    SNPATCH_ORACLE=fresh computes all of them again.
    """
    path = ORACLE_CACHE / f"{sha256(_model_key(tiny_model) + _job_key(job)).hexdigest()[:32]}.pt"
    if path.exists() and os.environ.get("SNPATCH_ORACLE") != "fresh":
        return oracle.Generation(**torch.load(path, weights_only=True))
    recipient, patch = job.oracle(tiny_model)
    generation = oracle.generate(recipient, job.ids, 10, patch)
    ORACLE_CACHE.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    torch.save(vars(generation), temporary)
    temporary.replace(path)
    return generation


@cache
def _model_key(tiny_model: tiny.TinyModel) -> bytes:
    """Return what determines the oracle's results besides the job: its code, libraries, weights and adapters."""
    key = f"{torch.__version__} {transformers.__version__} {torch.get_num_threads()}".encode()
    key += b"".join(sha256(Path(file).read_bytes()).digest() for file in (oracle.__file__, __file__))
    for name, source in sorted(tiny_model.checkpoints.items()):
        if not isinstance(source, dict):  # the oracle runs none that is an engine's table
            folder, adapters = source
            key += name.encode() + b"".join(map(_hash_folder, (folder, *adapters)))
    return key


@cache
def _hash_folder(folder: Path) -> bytes:
    return sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())).digest()


def _job_key(job: Job) -> bytes:
    """Return a job's fields, with tensors and further jobs by their content."""
    values = {**vars(job), "further": [_job_key(further) for further in job.further]}.values()
    return repr([v.numpy().tobytes() if isinstance(v, torch.Tensor) else v for v in values]).encode()


def assert_equals_oracle(tiny_model, jobs, completions):
    for job, completion in zip(jobs, completions, strict=True):
        expected = oracle_completion(tiny_model, job)
        assert expected.gap > MIN_LOGIT_GAP, f"{job}: logits too close, choose other weights"
        assert completion.token_ids == expected.ids, job
        assert completion.logprobs == pytest.approx(expected.logprobs, abs=LOGPROB)
        assert completion.overwrites == job.overwrites(10), job
        assert completion.prompt_ids == job.ids
        assert completion.finish_reason == "length"


def assert_logprobs_equal_generation(engine, tiny_model, jobs):
    """Compare logprobs of the oracle's texts, given as completions, with those of their generation.

    `positions` distinguishes completions from prompts. Every token but a wrong last one is greedy.
    """
    expected = [oracle_completion(tiny_model, job) for job in jobs]
    wrong_completions = [[*generation.ids[:-1], (generation.ids[-1] + 1) % 90 + 10] for generation in expected]
    prompts, patches = [job.ids for job in jobs], [job.patch for job in jobs]
    results = engine.logprobs(prompts, patches, completions=[generation.ids for generation in expected])
    for generation, result in zip(expected, results, strict=True):
        assert result.values.dtype == torch.float32
        assert result.values.tolist() == pytest.approx(generation.logprobs, abs=LOGPROB)
        assert result.is_greedy.all()
    for result in engine.logprobs(prompts, patches, completions=wrong_completions):
        assert result.is_greedy.tolist() == [True] * 9 + [False]


COMPLETIONS = [[20 + (7 * i + 3 * j) % 80 for j in range(n)] for i, n in enumerate((6, 3, 0, 9, 1, 4, 2, 5))]
MOMENTS = ("recipient_mean", "recipient_std", "donor_mean", "donor_std")


def assert_ranking(ranking, expected, order: bool = True):
    for name in ("scores", *MOMENTS):
        array = ranking.scores if name == "scores" else ranking.moments[name]
        assert (array - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
    assert ranking.meta["tokens"] == expected["tokens"]
    if order:
        scores = expected["scores"].flatten()[ranking.rank.flatten().argsort()][: len(ranking)]
        assert (scores.diff() < 1e-5 * scores.max()).all(), "not ranked by score"


def assert_ranked_by_one_model(ranking, model):
    """Check that a ranking is by the RMS of one model's activations and has only that model's moments."""
    expected = oracle.contrast(model, model, forced_sequences("completion"))
    variance = expected["recipient_std"].square() * (1 - 1 / expected["tokens"])
    size = (expected["recipient_mean"].square() + variance).sqrt()
    assert (ranking.scores - size).abs().max() <= 1e-5 * size.max()
    assert ranking.moments.keys() == {"recipient_mean", "recipient_std"}
    for name, moment in ranking.moments.items():
        assert (moment - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max()
    assert ranking.meta["donor"] is None


def forced_sequences(positions: str) -> list[tuple[list[int], list[int]]]:
    """COMPLETIONS after their prompts, with the positions that `positions` names."""
    return [
        (prompt + text, oracle.scored_positions(positions, len(prompt), len(text)))
        for prompt, text in zip(IDS, COMPLETIONS, strict=True)
    ]


def assert_k_zero_and_all_give_pure_completions(engine):
    """Check promise 1 for down_proj adapters: with all neurons patched, nothing of the recipient is left."""
    for recipient in ("base", "sft"):
        zero_jobs = [Job(i, recipient, "dpo", (0, 0)) for i in range(8)]
        all_jobs = [Job(i, recipient, "dpo", (0, ALL)) for i in range(8)]
        unpatched_jobs = [Job(i, name) for name in (recipient, "dpo") for i in range(8)]
        token_ids = [c.token_ids for c in generate(engine, [*zero_jobs, *all_jobs])]
        assert token_ids == [c.token_ids for c in generate(engine, unpatched_jobs)]


def assert_self_patch_changes_nothing(engine, model):
    """Check promise 2."""
    unpatched_completions = generate(engine, [Job(i, model) for i in range(8)])
    patched_completions = generate(
        engine, [Job(i, model, model, (0, k)) for i, k in enumerate((0, 1, 50, ALL, 7, 100, ALL, 3))]
    )
    assert [c.token_ids for c in patched_completions] == [c.token_ids for c in unpatched_completions]
    for completion, unpatched in zip(patched_completions, unpatched_completions, strict=True):
        assert completion.logprobs == pytest.approx(unpatched.logprobs, abs=1e-5)


def assert_batch_equals_single(batch, singles, logprob: float):
    """Check promise 3: a batch gives what its requests give one by one."""
    assert completion_data(batch) == completion_data(singles)
    for completion, single in zip(batch, singles, strict=True):
        assert (completion.logprobs is None) == (single.logprobs is None)
        assert completion.logprobs is None or completion.logprobs == pytest.approx(single.logprobs, abs=logprob)
