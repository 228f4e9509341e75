"""Engine: the synchronous API over requests, contrasts and the executors.

It holds no logic of its own, so that the server, sweeps and the async engine check and build requests the same way.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from snpatch.config import EngineConfig
from snpatch.engine import contrast as contrasts
from snpatch.engine.base import BaseEngine
from snpatch.engine.prompt_guard import PromptGuard
from snpatch.engine.requests import Completion, Prompt, listed
from snpatch.errors import SnpatchError, SpoiledEngineError
from snpatch.executors.base import Executor, Logprobs, Output, Request
from snpatch.patching.patch import Patch, recipient_name
from snpatch.ranking.ranking import Ranking
from snpatch.sampling import CONTRAST, GREEDY, Sampling
from snpatch.utils.optional import require
from snpatch.utils.progress import Progress, announced, open_progress


@dataclass(frozen=True)
class _GenerationJob:
    """One completion to generate. harm: a guard's probability; refusal: the guard's answer in place of the model's."""

    request: Request
    harm: float | None = None
    refusal: str | None = None


class Engine(BaseEngine):
    """A model and its adapters, ready to run as recipients and donors. Use it from one thread.

    Args:
        model: Hugging Face folder or name; name@revision is one commit, tag or branch.
        adapters: Name -> PEFT IA3 folder, or folders stacked in order. "base" is the model without adapters.
        arguments: Other fields of EngineConfig (backend, models, template, dtype, ...) and of Capacity, and vLLM's own
            engine arguments (tensor_parallel_size, max_model_len, ...).

    Example:
        with Engine("Qwen/Qwen3-4B", models={"safe": "Qwen/Qwen3-4B-SafeRL"}) as engine:
            ranking = engine.contrast(chats, recipient="base", donor="safe")
            completions = engine.generate(chats, Patch("base", "safe", ranking, 20_000))
    """

    def _open(self, config: EngineConfig) -> None:
        super()._open(config)
        self._start()

    def _start(self) -> None:
        with announced("starting vLLM" if self.backend == "vllm" else "loading the model"):
            self.executor.start(list(self._opened.models.values()))

    def _build_executor(self, config: EngineConfig) -> Executor:
        if self.backend == "vllm":
            from snpatch.executors.vllm.executor import VllmExecutor as Executor
        else:
            from snpatch.executors.transformers.executor import TransformersExecutor as Executor
        return Executor(config, self._opened.text_processors)

    def restart(self) -> None:
        """Restart the executor, for example after an EngineCrashedError. Models and adapters are kept."""
        self.executor.close()
        self.executor = self._build_executor(self.config)
        self._start()

    def close(self) -> None:
        """Free models and processes. The engine cannot be used afterwards.

        `with Engine(...)` closes the engine at its end.
        """
        self.executor.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stream(
        self,
        prompts: Sequence[Prompt],
        patch: Patch | str | Sequence[Patch | str] = "base",
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        guard: PromptGuard | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Generate completions and yield each as it finishes. Requests end if the caller stops iterating.

        Args:
            prompts: See `generate`.
            patch: See `generate`.
            sampling: See `generate`.
            guard: See `generate`.

        Yields:
            (index, Completion), where the index is the completion's position in the result of `generate`.

        Raises:
            ReceiptError: See `generate`.
            OverflowedError: See `generate`.
            SnpatchError: See `generate`.
        """
        return self._stream(self._build_jobs(prompts, patch, sampling, guard))

    def generate(
        self,
        prompts: Sequence[Prompt],
        patch: Patch | str | Sequence[Patch | str] = "base",
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        progress: Progress | bool | None = None,
        guard: PromptGuard | None = None,
    ) -> list[Completion]:
        """Generate a completion per prompt while patching activations (Algorithm 1 of the paper).

        Args:
            prompts: Chats (lists of role/content messages), rows as load_dataset reads them, lists of token ids, or
                strings, which are tokenized as they are, without a chat template.
            patch: A Patch, the name of a model to run unpatched, or one of these per prompt.
            sampling: Sampling parameters, one for all prompts or one per prompt. With `n > 1`, the n completions of a
                prompt are consecutive in the result.
            progress: Called as `progress(done, total)` after each completion. True shows a bar, False none. Default:
                a bar in terminals and notebooks.
            guard: Prompts whose predicted probability of harm exceeds `guard.threshold` get `guard.refusal` instead of
                a completion (`finish_reason == "guard"`).

        Returns:
            Completions in the order of the prompts.

        Raises:
            ReceiptError: The device overwrote another number of neurons than the patch implies.
            OverflowedError: Values of a patched completion overflowed. A SpoiledEngineError, of an unpatched one,
                restarts the engine.
            SnpatchError: Invalid prompts, patches or sampling parameters.
        """
        jobs = self._build_jobs(prompts, patch, sampling, guard)
        completions: dict[int, Completion] = {}
        num_done, num_requests = 0, sum(job.refusal is None for job in jobs)
        with open_progress(progress, "generate") as report:
            for index, completion in self._stream(jobs):
                completions[index] = completion
                if report and jobs[index].refusal is None:
                    num_done += 1
                    report(num_done, num_requests)
        return [completions[index] for index in range(len(jobs))]

    def contrast(
        self,
        prompts: Sequence[Prompt],
        recipient: str,
        donor: str | None = None,
        *,
        generate_with: str = "recipient",
        positions: str = "completion",
        completions: Sequence[str | Sequence[int]] | None = None,
        sampling: Sampling = CONTRAST,
        exclude_layers: Sequence[int] = contrasts.EXCLUDED_LAYERS,
        method: str = "rms",
        progress: Progress | bool | None = None,
    ) -> Ranking:
        """Rank neurons by how much their activations differ between two models on the same text (Eq. 3).

        Args:
            prompts: Strings, chats or lists of token ids.
            recipient: Model to patch.
            donor: Model whose activations are copied. None: observe the recipient alone, also with streams=1. The
                scores are then the root mean square of its own activations.
            generate_with: Model that generates the completions, "recipient" or "donor".
            positions: Positions to compare: "completion" (tokens of the completion, as in the published code),
                "completion_shifted" (positions that predict them, as in the paper's text), "prompt" or
                "last_prompt_token". EOS never counts.
            completions: Completions to read, one per prompt, instead of generated ones.
            sampling: Sampling parameters of the completions. Unused where `positions` are of the prompt.
            exclude_layers: Layers that are not ranked; negative ones count from the end. Default: the last layer.
            method: Score that orders the neurons, see ranking.methods.
            progress: See `generate`.

        Returns:
            A ranking with scores and each model's moments (mean, standard deviation), [L, F] float32.

        Raises:
            SnpatchError: Invalid arguments, or no neuron differs between the two models.
            ReceiptError: Another number of tokens was observed than the texts have.
        """
        with open_progress(progress, "contrast") as report:
            return contrasts.contrast(
                self,
                prompts,
                recipient=recipient,
                donor=donor,
                generate_with=generate_with,
                positions=positions,
                completions=completions,
                sampling=sampling,
                exclude_layers=exclude_layers,
                method=method,
                progress=report or False,
            )

    def capture(
        self,
        prompts: Sequence[Prompt],
        model: str,
        ranking: Ranking,
        k: int,
        *,
        positions: str | int = "last_prompt_token",
        progress: Progress | bool | None = None,
    ) -> Tensor:
        """Read activations of a ranking's first k neurons at one position of each prompt.

        Args:
            prompts: Strings, chats or lists of token ids.
            model: Name of the model that reads them.
            ranking: Order of the neurons.
            k: Number of neurons.
            positions: "last_prompt_token", or an index counted from 0 (negative: from the end of the prompt).
            progress: See `generate`.

        Returns:
            [prompts, k] float32, in rank order.

        Raises:
            SnpatchError: k exceeds the ranking, or a prompt, the model or the position is invalid.
        """
        requests = self.requests.capturing(self.encode(prompts, model), model, ranking, k, positions)
        with open_progress(progress, "capture") as report:
            return torch.cat([require(output.captured) for output in self.execute(requests, report)])

    def logprobs(
        self,
        prompts: Sequence[Prompt],
        patch: Patch | str | Sequence[Patch | str] = "base",
        progress: Progress | bool | None = None,
        *,
        completions: Sequence[str | Sequence[int]] | None = None,
    ) -> list[Logprobs]:
        """Return the log-probability of each token of each prompt but the first, under a patch.

        Args:
            prompts: Strings, chats or lists of token ids.
            patch: A Patch, the name of a model to run unpatched, or one of these per prompt.
            progress: See `generate`.
            completions: One per prompt. Log-probabilities are then of its tokens, and the patch's positions are counted
                as if it had been generated.

        Returns:
            One Logprobs per prompt, with len(prompt_ids) - 1 values, or len(completion) values with completions.

        Raises:
            SnpatchError: Invalid prompts, patches or completions.
            ReceiptError: The device overwrote another number of neurons than the patch implies.
            OverflowedError: See `generate`.
        """
        patches = self.requests.patches(patch, len(listed(prompts)))
        ids = self.encode(prompts, [recipient_name(patch) for patch in patches], room=0)
        completion_ids = None if completions is None else self.requests.completions(completions, len(ids))
        with open_progress(progress, "logprobs") as report:
            outputs = self.execute(self.requests.reading(ids, patches, completion_ids), report)
        logprobs = [require(output.prompt_logprobs) for output in outputs]
        if completion_ids is None:
            return logprobs
        return [values.last(len(completion)) for values, completion in zip(logprobs, completion_ids, strict=True)]

    def execute(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Output]:
        """Return the outputs of requests in their order. Raise OverflowedError if a text overflowed."""
        outputs: dict[int, Output] = {}
        with self._restarted_if_spoiled():
            for done, (index, output) in enumerate(self.run(requests), start=1):
                outputs[index] = _check_usable(output)
                if progress:
                    progress(done, len(requests))
        return [outputs[index] for index in range(len(requests))]

    def run(self, requests: Iterable[Request]) -> Generator[tuple[int, Output], None, None]:
        """Yield (index, output) of each request as it finishes; see Executor.stream.

        A patched text that overflowed has its `error`, and the other requests continue. An unpatched one raises
        SpoiledEngineError: the caller must restart the engine.
        """
        with closing(self.executor.stream(requests)) as outputs:
            for index, output in outputs:
                if output.error is not None:
                    output.error = self._spoilage.judge(output.error)
                    if isinstance(output.error, SpoiledEngineError):
                        raise output.error
                yield index, output

    @contextmanager
    def _restarted_if_spoiled(self) -> Iterator[None]:
        try:
            yield
        except SpoiledEngineError:
            self.restart()
            raise

    def _build_jobs(self, prompts, patch, sampling, guard: PromptGuard | None) -> list[_GenerationJob]:
        if guard is not None and not isinstance(guard, PromptGuard):
            raise SnpatchError(f"guard: expected a Guard, got {guard!r}")
        patches = self.requests.patches(patch, len(listed(prompts)))
        recipients = [recipient_name(one) for one in patches]
        ids = self.encode(prompts, recipients)
        self.requests.warn_of_plain_texts(listed(prompts), recipients)
        requests = self.requests.writing(ids, patches, sampling)
        if guard is None:
            return [_GenerationJob(request) for _, request in requests]
        harm = guard.predict(self, prompts, progress=False).tolist()
        return [
            _GenerationJob(request, harm[index], guard.refusal if harm[index] > guard.threshold else None)
            for index, request in requests
        ]

    def _stream(self, jobs: Sequence[_GenerationJob]) -> Iterator[tuple[int, Completion]]:
        for index, job in enumerate(jobs):
            if job.refusal is not None:
                yield index, Completion.refused(job.request.prompt_ids, job.refusal, job.harm)
        to_run = [index for index, job in enumerate(jobs) if job.refusal is None]
        with self._restarted_if_spoiled(), closing(self.run([jobs[index].request for index in to_run])) as outputs:
            for place, output in outputs:
                job = jobs[to_run[place]]
                yield to_run[place], Completion.of(job.request, _check_usable(output), job.harm)


def _check_usable(output: Output) -> Output:
    if output.error is not None:
        raise output.error
    return output
