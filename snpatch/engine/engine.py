"""Engine: a model and its adapters, ready to be patched. The facade over requests, contrast and the executors."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from snpatch.config import EngineConfig
from snpatch.engine import contrast as contrasts
from snpatch.engine.base import BaseEngine
from snpatch.engine.requests import Completion, Prompt, listed
from snpatch.errors import SnpatchError, SpoiledEngineError
from snpatch.executors.base import Executor, Logprobs, Output, Progress, Request
from snpatch.patching.patch import Patch
from snpatch.ranking.ranking import Ranking
from snpatch.sampling import CONTRAST, GREEDY, Sampling


@runtime_checkable
class PromptGuard(Protocol):
    """What stands in front of `generate`: see guard.Guard. Prompts of a higher probability of harm are refused."""

    threshold: float
    refusal: str

    def predict(self, engine: "Engine", prompts: Sequence[Prompt], progress: Progress | None = None) -> np.ndarray: ...


class Engine(BaseEngine):
    """A model and its adapters, ready to run as recipients and donors.

    model: Hugging Face folder or name. adapters: name -> PEFT IA3 folder, or a list of folders stacked in order;
    "base" is always there: the weights alone. arguments: EngineConfig's other fields (backend, template, dtype, ...),
    Capacity's and vLLM's own engine arguments, each by its name. An engine is used from one thread.
    """

    def _open(self, config: EngineConfig) -> None:
        super()._open(config)
        self.executor.start(list(self._opened.models.values()))

    def _build_executor(self, config: EngineConfig) -> Executor:
        if self.backend == "vllm":
            from snpatch.executors.vllm.executor import VllmExecutor as Executor
        else:
            from snpatch.executors.transformers.executor import TransformersExecutor as Executor
        return Executor(config, self._opened.text_processors)

    def restart(self) -> None:
        """Restart what runs the requests, as after an EngineCrashedError; models and adapters stay."""
        self.executor.close()
        self.executor = self._build_executor(self.config)
        self.executor.start(list(self._opened.models.values()))

    def close(self) -> None:
        """Free what the engine holds; it cannot be used afterwards. `with Engine(...)` does it at its end."""
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
        """(index, completion) of each text as it is finished, its receipt checked; arguments: see `generate`.

        index: its place in what `generate` gives. Whoever stops listening ends the requests that run.
        """
        return self._stream(*self._asked(prompts, patch, sampling, guard))

    def generate(
        self,
        prompts: Sequence[Prompt],
        patch: Patch | str | Sequence[Patch | str] = "base",
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        progress: Progress | None = None,
        guard: PromptGuard | None = None,
    ) -> list[Completion]:
        """Write a completion for each prompt, patched while it is written (the paper's Algorithm 1).

        patch: a Patch, or the name of a model to run unpatched, or one of these for each prompt; sampling
        likewise. Where it asks for n texts of a prompt, n completions stand in that prompt's place. A patch that
        the device did not apply in full is a ReceiptError, and so are values that overflow (OverflowedError). An
        unpatched text that overflows restarts the engine (SpoiledEngineError). guard: first reads each prompt once, in
        the model that it was fitted on; prompts that it finds harmful are answered with its refusal, and progress does
        not count them.
        """
        requests, harm, guard = self._asked(prompts, patch, sampling, guard)
        completions: list[Completion | None] = [None] * len(requests)
        done, to_write = 0, sum(not _is_refused(guard, h) for h in harm)
        for index, completion in self._stream(requests, harm, guard):
            completions[index] = completion
            if progress and completion.finish_reason != "guard":
                done += 1
                progress(done, to_write)
        return completions

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
        progress: Progress | None = None,
    ) -> Ranking:
        """Rank neurons by how much their activations differ between two models on the same text (Eq. 3).

        Args:
            prompts: Strings, chats or lists of token ids.
            recipient: Model that is to be patched.
            donor: Model whose activations are to be copied. None: observe the recipient alone, also with streams=1.
                The scores are then the root mean square of its own activations.
            generate_with: "recipient" or "donor", the model that writes the completions.
            positions: Positions that count: "completion" (tokens of the completion, as in the published code),
                "completion_shifted" (positions that predict them, as in the paper's text), "prompt" or
                "last_prompt_token". EOS never counts.
            completions: Completions to read, one per prompt, instead of generated ones.
            sampling: Sampling parameters of the completions. Unused where `positions` are of the prompt.
            exclude_layers: Layers that are not ranked; negative ones count from the end.
            method: Score that orders the neurons, see ranking.methods.
            progress: Called as `progress(done, total)`.

        Returns:
            A ranking with scores and each model's moments (mean, standard deviation), [L, F] float32.

        Raises:
            SnpatchError: Invalid arguments, or no neuron differs between the two models.
            ReceiptError: Another number of tokens was observed than the texts have.
        """
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
            progress=progress,
        )

    def capture(
        self,
        prompts: Sequence[Prompt],
        model: str,
        ranking: Ranking,
        k: int,
        *,
        positions: str | int = "last_prompt_token",
        progress: Progress | None = None,
    ) -> Tensor:
        """Read activations of a ranking's first k neurons at one position of each prompt.

        Args:
            prompts: Strings, chats or lists of token ids.
            model: Name of the model that reads them.
            ranking: Order of the neurons.
            k: Number of neurons.
            positions: "last_prompt_token", or an index counted from 0 (negative: from the end of the prompt).
            progress: Called as `progress(done, total)`.

        Returns:
            [prompts, k] float32, in rank order.
        """
        requests = self.requests.capturing(self.encode(prompts, model), model, ranking, k, positions)
        return torch.cat([output.captured for output in self.execute(requests, progress)])

    def logprobs(
        self,
        prompts: Sequence[Prompt],
        patch: Patch | str | Sequence[Patch | str] = "base",
        progress: Progress | None = None,
        *,
        completions: Sequence[str | Sequence[int]] | None = None,
    ) -> list[Logprobs]:
        """Log-probability of each token of each prompt but the first, patched; with completions: of their tokens.

        completions: one for each prompt, read as if it had been generated: a patch's `positions` count from its start.
        """
        ids = self.encode(prompts, self.requests.recipients(patch, len(listed(prompts))), room=0)
        read = None if completions is None else self.requests.completions(completions, len(ids))
        found = [o.prompt_logprobs for o in self.execute(self.requests.reading(ids, patch, read), progress)]
        return found if read is None else [f.last(len(c)) for f, c in zip(found, read, strict=True)]

    def execute(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Output]:
        """Return the outputs of requests, in their order; a text that overflowed is an OverflowedError."""
        outputs: list[Output | None] = [None] * len(requests)
        with self._restarted_if_spoiled():
            for done, (index, output) in enumerate(self.run(requests), start=1):
                outputs[index] = _usable(output)
                if progress:
                    progress(done, len(requests))
        return outputs

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Output]]:
        """Yield (index, output) of each request as it finishes, its receipt checked; see Executor.stream.

        A patched text that overflowed has its `error`, and the other requests go on. An unpatched one raises a
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

    def _asked(self, prompts, patch, sampling, guard) -> tuple[list[Request], list[float | None], PromptGuard | None]:
        """The requests of all texts, and each one's probability of harm, if a guard was asked."""
        if guard is not None and not isinstance(guard, PromptGuard):
            raise SnpatchError(f"guard: wanted a Guard, got {guard!r}")
        ids = self.encode(prompts, self.requests.recipients(patch, len(listed(prompts))))
        asked = self.requests.writing(ids, patch, sampling)
        harm = [None] * len(ids) if guard is None else guard.predict(self, prompts).tolist()
        return [request for _, request in asked], [harm[index] for index, _ in asked], guard

    def _stream(self, requests, harm, guard) -> Iterator[tuple[int, Completion]]:
        refused = [_is_refused(guard, h) for h in harm]
        for index, request in enumerate(requests):
            if refused[index]:
                yield index, Completion.refused(request.prompt_ids, guard.refusal, harm[index])
        left = [index for index, no in enumerate(refused) if not no]
        with self._restarted_if_spoiled(), closing(self.run([requests[index] for index in left])) as outputs:
            for place, output in outputs:
                index = left[place]
                yield index, Completion.of(requests[index], _usable(output), harm[index])


def _usable(output: Output) -> Output:
    """Return the output; raise its error if it has one."""
    if output.error is not None:
        raise output.error
    return output


def _is_refused(guard: PromptGuard | None, harm: float | None) -> bool:
    return guard is not None and harm > guard.threshold
