"""The vLLM executor: runs requests in vLLM's continuous batches, patched, at the engine's own speed.

Why it drives `LLMEngine` step by step: requests of different patches are one batch, results come as they finish, and
whatever interrupts a run can abort what is left.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import torch

from snpatch.adapters import Scales, identity
from snpatch.errors import ReceiptError, SnpatchError
from snpatch.executors.checkpoint import ARCHITECTURES, eos_ids, load_config
from snpatch.executors.request import Geometry, Output, Progress, Request, Statistics
from snpatch.executors.tables import constants_of, models_of, patched_positions, rankings_of, request_row, values_of
from snpatch.executors.vllm import feed, plugin, settings, versions
from snpatch.executors.vllm.registry import Bank
from snpatch.executors.vllm.settings import TwinSettings
from snpatch.executors.vllm.worker import pack, unpack
from snpatch.plan import Entry

FETCH = 512  # finished requests whose receipts are fetched at once


class VllmExecutor:
    """Loads a causal language model into vLLM as a twin and serves `Executor`.

    streams, max_adapters, max_rankings, max_constants, max_groups, max_captures, max_captured, max_receipts,
    scales_kv: see TwinSettings. All other arguments are vLLM's own engine arguments (tensor_parallel_size,
    max_model_len, max_num_seqs, gpu_memory_utilization, enforce_eager, quantization, ...); unknown ones are an error.
    dtype "auto" is the checkpoint's own. allow_untested: try architectures outside the tested list.
    """

    def __init__(
        self, model: str | Path, tokenizer, *, dtype: str = "auto", allow_untested: bool = False, **arguments
    ) -> None:
        self.version = versions.check()
        config = load_config(model, allow_untested)
        self._tokenizer, self._name = tokenizer, str(model)
        self.eos_ids = eos_ids(model, config, tokenizer)
        self.geometry = _geometry(config, arguments.get("max_model_len"))
        twin = {f: arguments.pop(f) for f in TwinSettings.__dataclass_fields__ if f in arguments}
        self.settings = TwinSettings(**twin)
        self._engine = _start(model, config, dtype, self.settings, self.geometry.context, arguments)
        self._tickets = count(1)
        self._free_groups = list(range(self.settings.max_groups))
        self._banks = {
            "adapter": Bank("adapter", 1, self.settings.max_adapters - 1, "max_adapters", self._write),
            "ranking": Bank("ranking", 0, self.settings.max_rankings, "max_rankings", self._write),
            "constant": Bank("constant", 1, self.settings.max_constants, "max_constants", self._write),
        }
        self._scales = {"base": identity(self.geometry.n_layers, self.geometry.widths)}
        shards = self._command("snpatch_start", self._name)
        self._shards = [(shard["first_neuron"], shard["n_neurons"]) for shard in shards]
        self.runner = shards[0]["runner"]
        self.model_digest = hashlib.sha256("".join(shard["digest"] for shard in shards).encode()).hexdigest()[:16]

    def register_adapter(self, name: str, scales: Scales) -> None:
        """Make `name` a model that requests can name as recipient or donor."""
        if not self.settings.scales_kv and any(
            (scales.scale[module] != 1).any() for module in scales.scale if module != "down_proj"
        ):
            raise SnpatchError(
                f"adapter {name}: it scales k_proj or v_proj, and this engine was started without; "
                "start it with scales_kv=True"
            )
        self._scales[name] = scales

    def execute(
        self, requests: Sequence[Request], groups: int = 0, progress: Progress | None = None
    ) -> tuple[list[Output], list[Statistics]]:
        """Run all requests; outputs in their order, and one Statistics for each of `groups` groups."""
        with ExitStack() as held:
            ids = [held.enter_context(bank.holding(wanted)) for bank, wanted in self._wanted(requests)]
            rows = held.enter_context(self._groups(groups))
            run = _Run(self, requests, progress)
            for index, request in enumerate(requests):
                self._check(request)
                row = request_row(request, {"base": 0, **ids[0]}, *ids[1:])
                if request.observe:
                    row[Entry.GROUP] = rows[request.observe[0]]
                run.add(index, row, self.salt(request))
            return run.finish(), self._statistics(rows)

    def salt(self, request: Request) -> str | None:
        """Names everything that a request's keys and values hang on besides its tokens; None for a plain request."""
        donor = request.donor if isinstance(request.donor, str) else request.recipient
        parts = [self._scales[name].digest for name in (request.recipient, donor)]
        if request.window:
            source = "" if isinstance(request.donor, str) else f"{type(request.donor).__name__} {request.donor.digest}"
            seed = getattr(request.donor, "seed", "")
            window = (request.window.lo, request.window.hi)
            parts += [request.ranking.digest, str(window), str(request.patch_range), f"{source} {seed}"]
        elif parts == [self._scales["base"].digest] * 2:
            return None
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]

    def close(self) -> None:
        """Stop vLLM and its processes."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.engine_core.shutdown()

    def _check(self, request: Request) -> None:
        if self.settings.streams == 1 and request.streams == 2:
            raise SnpatchError("this engine runs one stream: a donor model needs streams=2")
        if request.capture and request.capture[1] > self.settings.max_captured:
            raise SnpatchError(
                f"a capture of {request.capture[1]} neurons: start the engine with a larger max_captured "
                f"({self.settings.max_captured})"
            )

    def _wanted(self, requests: Sequence[Request]):
        """Each bank with what the requests name of its kind: key -> tensors."""
        adapters, rankings, constants = {}, {}, {}
        for request in requests:
            adapters |= {name: self._scales[name].scale for name in models_of(request) if name != "base"}
            rankings |= {ranking.digest: {"rank": ranking.rank} for ranking in rankings_of(request)}
            constants |= {donor.digest: {"values": values_of(donor)} for donor in constants_of(request)}
        return zip(self._banks.values(), (adapters, rankings, constants), strict=True)

    def _write(self, kind: str, handle: int, row: int, tensors: dict[str, torch.Tensor]) -> None:
        self._command("snpatch_write", kind, handle, row, {name: pack(tensor) for name, tensor in tensors.items()})

    @contextmanager
    def _groups(self, n: int) -> Iterator[list[int]]:
        """n statistics groups, empty."""
        if n > len(self._free_groups):
            raise SnpatchError(
                f"{n} statistics groups are needed, {len(self._free_groups)} are free: raise max_groups"
            )
        taken = [self._free_groups.pop() for _ in range(n)]
        try:
            if n:
                self._command("snpatch_clear_statistics", taken)
            yield taken
        finally:
            self._free_groups += taken

    def _statistics(self, groups: list[int]) -> list[Statistics]:
        """Gathered from all workers by global neuron."""
        if not groups:
            return []
        parts = [[unpack(packed) for packed in answer] for answer in self._command("snpatch_statistics", groups)]
        sums = torch.zeros(len(groups), self.geometry.n_layers, 5, self.geometry.n_neurons, dtype=torch.float64)
        for (first, n), (part, counts) in zip(self._shards, parts, strict=True):
            sums[..., first : first + n] = part
            if not torch.equal(counts, parts[0][1]):
                raise ReceiptError(f"the workers counted different tokens: {counts.tolist()}, {parts[0][1].tolist()}")
        return [Statistics(s, c) for s, c in zip(sums, parts[0][1], strict=True)]

    def _command(self, name: str, *arguments) -> list:
        """Every worker's answer."""
        if self._engine is None:
            raise SnpatchError("this engine is closed")
        answers = self._engine.collective_rpc(name, args=arguments)
        for answer in answers:
            if "error" in answer:
                raise SnpatchError(answer["error"])
        return [answer["ok"] for answer in answers]


class _Run:
    """One `execute`: the requests inside the engine, and their outputs."""

    def __init__(self, executor: VllmExecutor, requests: Sequence[Request], progress: Progress | None) -> None:
        self._executor, self._engine = executor, executor._engine
        self._requests, self._progress = requests, progress
        self._outputs: list[Output | None] = [None] * len(requests)
        self._running: dict[str, tuple[int, int]] = {}  # vLLM's id -> (index, ticket)
        self._unfetched: list[tuple[int, int, int, int]] = []  # index, ticket, cached positions, positions fed

    def add(self, index: int, row: list[int], salt: str | None) -> None:
        from vllm.inputs import tokens_input

        request, ticket = self._requests[index], next(self._executor._tickets)
        prompt = tokens_input(list(request.prompt_ids), cache_salt=salt)
        is_plain = salt is None and not request.observe and not request.capture
        extra_args = None if is_plain else {feed.KEY: [ticket, *row]}
        params = _sampling_params(request, self._executor.eos_ids, extra_args)
        name = f"snpatch-{ticket}"
        self._running[name] = index, ticket
        self._engine.add_request(name, prompt, params)

    def finish(self) -> list[Output]:
        """Step until every request is done. Whatever interrupts this, nothing of it is left in the engine."""
        try:
            while self._running:
                for result in self._engine.step():
                    if result.finished:
                        self._take(result)
                if len(self._unfetched) >= FETCH:
                    self._fetch()
            self._fetch()
            return self._outputs
        except BaseException:
            self._abort()
            raise

    def _take(self, result) -> None:
        index, ticket = self._running.pop(result.request_id)
        request, executor = self._requests[index], self._executor
        self._outputs[index] = _output(request, result, executor.eos_ids, executor._tokenizer)
        written = len(self._outputs[index].token_ids)
        fed = len(request.prompt_ids) + max(written - 1, 0)
        if request.capture or (request.window and request.patch_range[0] < request.patch_range[1]):
            self._unfetched.append((index, ticket, result.num_cached_tokens or 0, fed))
        if self._progress:
            self._progress(len(self._requests) - len(self._running), len(self._requests))

    def _fetch(self) -> None:
        """Receipts and captures of what finished; one that differs from what the patch implies is an error."""
        if not self._unfetched:
            return
        answers = self._executor._command("snpatch_fetch", [ticket for _, ticket, _, _ in self._unfetched])
        for (index, _, cached, fed), *shards in zip(self._unfetched, *answers, strict=True):
            request, output = self._requests[index], self._outputs[index]
            if any(len(records) != 1 for records in shards):
                raise ReceiptError(f"a request has {[len(records) for records in shards]} records, not one a worker")
            records = [records[0] for records in shards]
            output.overwrites = _receipt(request, records, cached, fed)
            if request.capture:
                output.captured = _captured(request, records)
        self._unfetched = []

    def _abort(self) -> None:
        if self._executor._engine is None or not self._running and not self._unfetched:
            return
        self._engine.abort_request(list(self._running))
        tickets = [ticket for _, ticket in self._running.values()] + [ticket for _, ticket, _, _ in self._unfetched]
        self._running, self._unfetched = {}, []
        while self._engine.has_unfinished_requests():
            self._engine.step()
        self._executor._command("snpatch_fetch", tickets)


def _receipt(request: Request, records: list[dict], cached: int, fed: int) -> int:
    """Check that the device did what was planned and that the plan covered the text; the text's own overwrites."""
    width = len(request.window) if request.window else 0
    done = sum(record["done"] for record in records)
    first, seen, planned = (records[0][name] for name in ("first", "seen", "planned"))
    if done != planned * width:
        raise ReceiptError(
            f"a patch was not applied in full: {planned * width} overwrites were planned, the device did {done}"
        )
    wanted = patched_positions(request, fed) - patched_positions(request, cached)
    if first != cached or seen < fed or planned < wanted:
        raise ReceiptError(
            f"a patch was not applied in full: positions {cached}..{fed} of the text were to be run, {first}..{seen} "
            f"were, and {planned} of them patched instead of {wanted}"
        )
    return wanted * width


def _captured(request: Request, records: list[dict]) -> torch.Tensor:
    """[positions, k] float32 of all shards: each neuron comes from the one worker that holds it."""
    _, k, start, stop = request.capture
    shards = [torch.frombuffer(bytearray(r["captured"][1]), dtype=torch.float32) for r in records]
    shards = [shard.view(records[0]["captured"][0])[:, :k] for shard in shards]
    captured = shards[0]
    for shard in shards[1:]:
        captured = torch.where(captured.isnan(), shard, captured)
    if captured.shape != (stop - start, k) or captured.isnan().any():
        raise ReceiptError("a capture is incomplete: some of its neurons were not written")
    return captured


def _sampling_params(request: Request, ends: frozenset[int], extra_args: dict | None):
    """vLLM's SamplingParams for a request. One that writes nothing still samples a token, which is dropped."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    common = {
        "extra_args": extra_args,
        "output_kind": RequestOutputKind.FINAL_ONLY,
        "prompt_logprobs": 0 if request.prompt_logprobs else None,
        # Positions that come from the cache are not run, so nothing of them could be observed.
        "skip_reading_prefix_cache": bool(request.observe or request.capture or request.prompt_logprobs),
    }
    s = request.sampling
    if s is None:
        return SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, **common)
    return SamplingParams(
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        max_tokens=s.max_tokens,
        min_tokens=s.min_tokens,
        stop=list(s.stop) or None,
        stop_token_ids=None if s.ignore_eos else sorted(ends),
        ignore_eos=s.ignore_eos,
        seed=s.seed,
        logprobs=0 if s.logprobs else None,
        detokenize=bool(s.stop),
        **common,
    )


def _output(request: Request, result, ends: frozenset[int], tokenizer) -> Output:
    output = Output()
    if request.prompt_logprobs:
        given = zip(result.prompt_logprobs[1:], request.prompt_ids[1:], strict=True)
        output.prompt_logprobs = torch.tensor([at[token].logprob for at, token in given], dtype=torch.float32)
    if request.sampling is None:
        return output
    written = result.outputs[0]
    output.token_ids = list(written.token_ids)
    output.finish_reason = written.finish_reason
    if written.finish_reason == "stop":
        is_string = isinstance(written.stop_reason, str)
        output.finish_reason = "stop" if is_string else "eos"
        output.stop_reason = written.stop_reason if is_string else None
    # With stop strings the text is vLLM's, which is cut at the one that it found.
    output.text = (
        written.text if request.sampling.stop else tokenizer.decode(output.token_ids, skip_special_tokens=True)
    )
    if request.sampling.logprobs:
        output.logprobs = [at[token].logprob for at, token in zip(written.logprobs, output.token_ids, strict=True)]
    return output


def _geometry(config, max_model_len: int | None) -> Geometry:
    widths = {"down_proj": config.intermediate_size}
    if config.model_type != "phi3":  # whose queries, keys and values are one projection
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        widths |= dict.fromkeys(("k_proj", "v_proj"), config.num_key_value_heads * head)
    context = config.max_position_embeddings if max_model_len is None else max_model_len
    return Geometry(config.num_hidden_layers, config.intermediate_size, context, config.vocab_size, widths)


def _start(model, config, dtype: str, twin: TwinSettings, context: int, arguments: dict):
    """vLLM's engine with the twin of the model's architecture."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    (architecture,) = config.architectures
    if config.model_type not in ARCHITECTURES:
        os.environ[plugin.UNTESTED] = architecture
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    plugin.register()
    if current_platform.is_cpu():
        _use_all_cores(arguments.get("tensor_parallel_size", 1))
        if not {"kv_cache_memory_bytes", "gpu_memory_utilization"} & arguments.keys():
            arguments["kv_cache_memory_bytes"] = _spare_memory() // 4
    own = {
        "model": str(model),
        "tokenizer": str(model),
        "dtype": str(config.dtype).removeprefix("torch.") if dtype == "auto" else dtype,
        "hf_overrides": {"architectures": [plugin.PREFIX + architecture]},
        "worker_extension_cls": "snpatch.executors.vllm.worker.WorkerExtension",
        "additional_config": twin.as_config(),
        # vLLM wants room for a token after every prompt; a text that fills the context is read all the same.
        "max_model_len": context + 1,
        "disable_cascade_attn": True,
        "disable_log_stats": True,
        "generation_config": "vllm",
    }
    for name in ("hf_overrides", "additional_config"):
        own[name] |= arguments.pop(name, {})
    arguments.pop("max_model_len", None)
    taken = {*own, "enable_lora"} & arguments.keys()
    if taken:
        raise SnpatchError(f"backend vllm: {', '.join(sorted(taken))} cannot be set")
    unknown = arguments.keys() - EngineArgs.__dataclass_fields__.keys()
    if unknown:
        raise SnpatchError(f"backend vllm: neither snpatch nor vLLM has an argument {', '.join(sorted(unknown))}")
    with _environment(VLLM_ALLOW_LONG_MAX_MODEL_LEN="1"):
        return LLMEngine.from_engine_args(EngineArgs(**own, **arguments))


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _use_all_cores(workers: int) -> None:
    """vLLM leaves a core idle on a CPU; give each worker its share of all, unless the user bound them."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // workers)
    parts = [cores[i * share : (i + 1) * share] or cores[-1:] for i in range(workers)]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, part)) for part in parts))


def _spare_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
