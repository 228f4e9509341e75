"""The transformers executor: runs requests on any machine in left-padded batches, with one or two sets of weights.

Why it is simple rather than fast: the vLLM executor is compared with it. It must keep both streams of every request
exact, whatever else shares the batch.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from snpatch.config import PRIMARY_WEIGHTS, EngineConfig, ModelSource
from snpatch.errors import SnpatchError, first_line
from snpatch.executors.base import Memory, Output, Request
from snpatch.executors.transformers.batch import BatchRun
from snpatch.executors.transformers.surgery import install_streams
from snpatch.executors.transformers.tables import BatchTables
from snpatch.models.checkpoint import check_finite, load_config
from snpatch.models.compatibility import module_kinds, total_bytes
from snpatch.models.geometry import Geometry, build_geometry
from snpatch.models.lora import merge_loras
from snpatch.models.model import Model
from snpatch.models.pretrained import load_network, load_pretrained
from snpatch.models.text_processing import TextProcessor

DEFAULT_BATCH_SIZE = 32  # sequences
BATCHES_PER_CHUNK = 8  # requests of a generator are taken in chunks of this many batches


class TransformersExecutor:
    """Executor that loads a causal language model with transformers.

    Args:
        config: dtype, device, batch_size, token_budget and the checkpoints.
        text_processors: The first has the tokenizer of the primary weights.
    """

    def __init__(self, config: EngineConfig, text_processors: Sequence[TextProcessor]) -> None:
        model_config = load_config(config.model, config.allow_untested)
        self._device = pick_device(config.device)
        self._model = load_model(config.model, PRIMARY_WEIGHTS, config.dtype, self._device)
        self.geometry = _build_geometry(model_config, self._model)
        secondary = None
        if config.secondary is not None:
            secondary = load_model(config.model, config.secondary, config.dtype, self._device)
            self.geometry = self.geometry.limit(secondary.config.vocab_size, secondary.config.max_position_embeddings)
        self._tokenizer, self._token_budget = text_processors[0].tokenizer, config.token_budget
        self._batch_size = DEFAULT_BATCH_SIZE if config.batch_size is None else config.batch_size
        primary_bytes = total_bytes(self._model.parameters())
        self._state = install_streams(self._model, secondary)
        secondary_bytes = total_bytes(self._model.parameters()) - primary_bytes
        self.memory = Memory(primary_bytes, secondary_bytes, 0, module_kinds(self._state.duplicated))

    def check_model(self, name: str, model: Model) -> None:
        """Accept every model whose adapters fit the geometry."""

    def start(self, models: Sequence[Model]) -> None:
        """Do nothing: the model was loaded for its geometry."""

    def check_request(self, request: Request) -> None:
        """Accept every request whose models fit the geometry."""

    def stream(self, requests: Iterable[Request]) -> Generator[tuple[int, Output], None, None]:
        """Yield (index, output) of each request; those of a batch come together."""
        if self._state is None:
            raise SnpatchError("this engine is closed")
        if isinstance(requests, Sequence):
            yield from self._run_all(requests)
            return
        requests, start = iter(requests), 0
        while chunk := list(islice(requests, BATCHES_PER_CHUNK * self._batch_size)):
            for index, output in self._run_all(chunk):
                yield start + index, output
            start += len(chunk)

    def read_residuals(self, requests: Sequence[Request]) -> Iterator[tuple[int, Tensor]]:
        """Yield (index, [length, hidden] float32) of each request: the residual stream before the final norm.

        requests: Of a single stream each, and without sampling.
        """
        assert self._model is not None, "the engine was closed"
        batches: list[Tensor] = []
        rows: Iterator[Tensor] = iter(())
        norm = self._model.get_submodule("model.norm")
        with norm.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0])):
            for index, _ in self._run_all(requests):
                if batches:
                    rows = iter(batches.pop())
                yield index, next(rows)[-len(requests[index].prompt_ids) :].float().cpu()

    def close(self) -> None:
        """Release the model."""
        self._model = self._state = None

    def _run_all(self, requests: Sequence[Request]) -> Iterator[tuple[int, Output]]:
        tables = BatchTables(requests, self.geometry, self._device)
        for indices in self._group_into_batches(requests):
            assert self._model is not None, "the engine was closed during a run"
            assert self._state is not None
            batch = [requests[i] for i in indices]
            self._state.layers = tables.layers
            run = BatchRun(batch, tables, _weights(batch[0]), self._model, self._state, self._tokenizer, self.geometry)
            outputs = run.run()
            self._state.layers = []
            yield from zip(indices, outputs, strict=True)
        tables.add_statistics()

    def _group_into_batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Return the indices of requests that run together; the longest first if a token budget sizes batches."""
        lengths = [len(r.prompt_ids) + (r.sampling.max_tokens if r.sampling else 0) for r in requests]
        order = list(range(len(requests)))
        if self._token_budget is not None:
            order.sort(key=lambda i: (_weights(requests[i]), -lengths[i]))
        batches: list[list[int]] = []
        for index in order:
            batch = batches[-1] if batches else []
            fits = batch and len(batch) < self._batch_size and _weights(requests[batch[0]]) == _weights(requests[index])
            if fits and self._token_budget is not None:
                padded = max(lengths[batch[0]], lengths[index]) * (len(batch) + 1) * requests[index].streams
                fits = padded <= self._token_budget
            if fits:
                batch.append(index)
            else:
                batches.append([index])
        return batches


def _weights(request: Request) -> tuple[int, ...]:
    """Return the index of the weights that each stream of a request runs, the recipient's first."""
    models = (request.recipient,) if request.donor is None else (request.recipient, request.donor)
    return tuple(model.weights.index for model in models)


def load_model(model: str, source: ModelSource, dtype: str, device: torch.device):
    """Load one set of weights as a transformers model.

    Args:
        model: The engine's own model, used if `source` has no checkpoint.
        source: Checkpoint and LoRA adapters. LoRA is merged in float32, then rounded.
        dtype: A dtype's name, or "auto" for the checkpoint's.
        device: Where the weights are put.
    """
    name = source.checkpoint or model
    config = load_pretrained(AutoConfig, name)
    # SDPA in transformers drops Gemma 2's soft cap on attention logits.
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    load_dtype = "float32" if source.lora else dtype
    # transformers declares no class for what an Auto class loads.
    network = cast(Any, load_network(AutoModelForCausalLM, name, dtype=load_dtype, attn_implementation=attention))
    network = network.to(device).eval().requires_grad_(False)
    if source.lora:
        parameters = dict(network.named_parameters())
        for parameter, value in merge_loras(parameters.items(), source.lora):
            parameters[parameter].copy_(value)
        target = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
        network = network.to(target)
    check_finite(network.named_parameters(), name)
    return network


def pick_device(name: str) -> torch.device:
    """Return the named device; "auto" is the first GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SnpatchError(f"device {name!r}: {first_line(error)}") from error
    return device


def _build_geometry(config, model) -> Geometry:
    """Return the sizes in a config, and the widths of the modules that IA3 can scale."""
    attention, widths = model.model.layers[0].self_attn, {"down_proj": config.intermediate_size}
    for name in ("k_proj", "v_proj"):
        if hasattr(attention, name):
            widths[name] = getattr(attention, name).out_features
    return build_geometry(config, str(model.dtype).removeprefix("torch."), widths=widths)
