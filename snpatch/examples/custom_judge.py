"""Judge completions with a function of your own.

    python custom_judge.py

A judge is any callable (prompts, completions) -> one number per completion. On the command line it is
`--judge words=custom_judge:count_words`.
"""

from snpatch import Engine, Sampling, SweepConfig, load_dataset, open_judge, sweep
from snpatch.demo import DEMO_MODEL as DEMO


def count_words(prompts: list[str], completions: list[str]) -> list[float]:
    """Return the number of words of each completion."""
    return [float(len(completion.split())) for completion in completions]


def main() -> None:
    ranking_prompts = load_dataset(DEMO / "contrast.jsonl").prompts[:50]
    prompts = load_dataset(DEMO / "eval/harmbench.jsonl").prompts[:10]
    judges = {"words": count_words, "refusal": open_judge("refusal")}
    sampling = Sampling(max_tokens=32)
    with Engine(DEMO / "base", {"sft": DEMO / "sft", "dpo": [DEMO / "sft", DEMO / "dpo"]}, template="tulu") as engine:
        ranking = engine.contrast(ranking_prompts, recipient="sft", donor="dpo", sampling=sampling)
        config = SweepConfig(("sft",), "dpo", (0, len(ranking) // 10), controls=0, sampling=sampling)
        result = sweep(engine, prompts, {"safety": ranking}, judges, config)
    for row in result.rows:
        name = f"{row.recipient}, k = {row.rank_hi}" if row.ranking else f"{row.recipient}, unpatched"
        print(f"{row.judge:8s} {name:16s} {row.mean:6.2f}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
