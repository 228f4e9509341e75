"""What the user's process knows of a twin engine: its geometry, what is registered, and how a request travels.

Shared by the executor, which runs requests to their end, and the streaming one. Everything that a request names is
turned into integers here; everything that comes back is checked here.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from itertools import count
from pathlib import Path

import torch

from snpatch.errors import ReceiptError, SnpatchError
from snpatch.executors.base import Geometry, Logprobs, Output, Request, Statistics
from snpatch.executors.transformers.banks import (
    constants_of,
    models_of,
    patched_positions,
    rankings_of,
    request_row,
    values_of,
)
from snpatch.executors.vllm import processes, versions
from snpatch.executors.vllm.registry import Bank
from snpatch.executors.vllm.settings import TwinSettings, refuse
from snpatch.executors.vllm.worker import feed, plugin
from snpatch.executors.vllm.worker.commands import pack, unpack
from snpatch.models.adapters import Scales, identity
from snpatch.models.checkpoint import ARCHITECTURES, check_dtype, check_has_weights, eos_ids, load_config
from snpatch.op.plan import UNLESS_END, Entry
from snpatch.op.reference import SUMS

BIND = "VLLM_CPU_OMP_THREADS_BIND"
BOUND = "SNPATCH_CPU_OMP_THREADS_BIND"  # what we bound, to tell it from what the user did


@dataclass(frozen=True, eq=False)
class Sent:
    """A request as vLLM gets it. has_record: the workers keep a receipt or captures for its ticket."""

    name: str
    ticket: int
    prompt: dict
    params: object
    has_record: bool


class Client:
    """Checks everything that can be checked before vLLM starts. The executor starts it, and `started` takes its answer.

    streams, max_adapters, max_rankings, max_constants, max_groups, max_captures, max_captured, max_receipts,
    scales_kv: see TwinSettings. All other arguments are vLLM's own engine arguments (tensor_parallel_size,
    max_model_len, max_num_seqs, gpu_memory_utilization, enforce_eager, quantization, ...); unknown ones are an error.
    dtype "auto" is the checkpoint's own. batch_size: most sequences of a batch, vLLM's max_num_seqs. allow_untested:
    try architectures and quantisations outside the tested ones.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer,
        *,
        dtype: str = "auto",
        batch_size: int | None = None,
        allow_untested: bool = False,
        **arguments,
    ) -> None:
        versions.check()
        check_dtype(dtype)
        config = load_config(model, allow_untested)
        if batch_size is not None:
            if "max_num_seqs" in arguments:
                raise SnpatchError("backend vllm: batch_size is max_num_seqs; give one of them")
            arguments["max_num_seqs"] = batch_size
        if arguments.get("load_format") != "dummy":
            check_has_weights(model)
        self._tokenizer, self.name = tokenizer, str(model)
        self.eos_ids = eos_ids(model, config, tokenizer)
        self.geometry = _geometry(config, arguments.get("max_model_len"))
        twin = {f: arguments.pop(f) for f in TwinSettings.__dataclass_fields__ if f in arguments}
        own = {"ends": tuple(sorted(self.eos_ids)), "allow_untested": allow_untested}
        self.settings = TwinSettings(**{**own, **twin})
        if self.settings.scales_kv and "k_proj" not in self.geometry.widths:
            raise SnpatchError(f"scales_kv: a {config.model_type} model has no k_proj and v_proj of their own")
        self._arguments = _twin_arguments(model, config, dtype, arguments)
        self._tickets = count(1)
        self.free_groups = list(range(self.settings.max_groups))
        self._banks = (
            Bank("adapter", 1, self.settings.max_adapters - 1, "max_adapters"),
            Bank("ranking", 0, self.settings.max_rankings, "max_rankings"),
            Bank("constant", 1, self.settings.max_constants, "max_constants"),
        )
        self._scales = {"base": identity(self.geometry.n_layers, self.geometry.widths)}

    def engine_args(self):
        """vLLM's engine arguments; from now on the settings are fixed."""
        from vllm.engine.arg_utils import AsyncEngineArgs

        if self.settings.scales_kv is None:
            self.settings = replace(self.settings, scales_kv=any(map(_scales_kv, self._scales.values())))
        # vLLM wants room for a token after every prompt; a text that fills the context is read all the same.
        own = {"max_model_len": self.geometry.context + 1}
        own["additional_config"] = {**self._arguments.get("additional_config", {}), **self.settings.as_config()}
        return AsyncEngineArgs(**{**self._arguments, **own})

    def started(self, shards: list[dict]) -> None:
        """Take what every worker answered to snpatch_start."""
        self._shards = [(shard["first_neuron"], shard["n_neurons"]) for shard in shards]
        self.runner = shards[0]["runner"]
        self.model_digest = hashlib.sha256("".join(shard["digest"] for shard in shards).encode()).hexdigest()[:16]

    def register_adapter(self, name: str, scales: Scales) -> None:
        """Make `name` a model that requests can name as recipient or donor."""
        if self.settings.scales_kv is False and _scales_kv(scales):
            raise SnpatchError(
                f"adapter {name}: it scales k_proj or v_proj, and this engine was started without; "
                "start it with scales_kv=True"
            )
        self._scales[name] = scales

    def take(self, requests: Sequence[Request]) -> tuple["Held", list[tuple]]:
        """Hold what the requests name, and the arguments of each snpatch_write that the workers need before them."""
        for request in requests:
            self._check(request)
        held, writes = Held([], []), []
        try:
            for bank, wanted in zip(self._banks, self._wanted(requests), strict=True):
                ids, fresh = bank.take(wanted)
                held.banks.append((bank, list(wanted), list(fresh)))
                held.ids.append(ids)
                writes += [
                    (*place, {n: pack(tensor) for n, tensor in tensors.items()}) for *place, tensors in fresh.values()
                ]
        except SnpatchError:
            held.release(written=False)
            raise
        return held, writes

    def sent(self, request: Request, held: "Held", groups: Sequence[int] = (), streaming: bool = False) -> Sent:
        """The request as vLLM gets it. groups: the engine's statistics groups, by the request's own numbers."""
        from vllm.inputs import tokens_input

        ticket, salt = next(self._tickets), self.salt(request)
        adapters, rankings, constants = held.ids
        row = request_row(request, {"base": 0, **adapters}, rankings, constants)
        if request.observe:
            row[Entry.GROUP] = groups[request.observe[0]] + (0 if request.observe_ends else UNLESS_END)
        is_plain = salt is None and not request.observe and not request.capture
        return Sent(
            f"snpatch-{ticket}",
            ticket,
            tokens_input(list(request.prompt_ids), cache_salt=salt),
            _sampling_params(request, self.eos_ids, None if is_plain else {feed.KEY: [ticket, *row]}, streaming),
            bool(
                request.observe
                or request.capture
                or (request.window and request.patch_range[0] < request.patch_range[1])
            ),
        )

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

    def output(self, request: Request, result) -> Output:
        """What vLLM's result (so far) says; receipts and captures are not yet in it."""
        return _output(request, result, self._tokenizer)

    def confirm(self, request: Request, output: Output, shards: Sequence[list[dict]]) -> None:
        """Complete an output with the workers' records of it; one that differs from the patch is a ReceiptError."""
        if any(len(records) != 1 for records in shards):
            raise ReceiptError(f"a request has {[len(records) for records in shards]} records, not one a worker")
        records = [records[0] for records in shards]
        fed = len(request.prompt_ids) + max(len(output.token_ids) - 1, 0)
        output.overwrites = _receipt(request, records, fed)
        if request.capture:
            output.captured = _captured(request, records)

    def gathered(self, answers: list[list]) -> list[Statistics]:
        """Statistics of all workers, by global neuron, from their answers to snpatch_statistics."""
        parts = [[unpack(packed) for packed in answer] for answer in answers]
        counts = parts[0][1]
        n_layers, n_neurons = self.geometry.n_layers, self.geometry.n_neurons
        sums = torch.zeros(len(counts), n_layers, SUMS, n_neurons, dtype=torch.float64)
        for (first, n), (part, own) in zip(self._shards, parts, strict=True):
            sums[..., first : first + n] = part
            if not torch.equal(own, counts):
                raise ReceiptError(f"the workers counted different tokens: {own.tolist()} and {counts.tolist()}")
        return [Statistics(s, c) for s, c in zip(sums, counts, strict=True)]

    def _check(self, request: Request) -> None:
        if self.settings.streams == 1 and request.streams == 2:
            raise SnpatchError("this engine runs one stream: a donor model needs streams=2")
        if request.capture and request.capture[1] > self.settings.max_captured:
            raise SnpatchError(
                f"a capture of {request.capture[1]} neurons: start the engine with a larger max_captured "
                f"({self.settings.max_captured})"
            )

    def _wanted(self, requests: Sequence[Request]) -> tuple[dict, dict, dict]:
        """For each bank what the requests name of its kind: key -> tensors."""
        adapters, rankings, constants = {}, {}, {}
        for request in requests:
            adapters |= {name: self._scales[name].scale for name in models_of(request) if name != "base"}
            rankings |= {ranking.digest: {"rank": ranking.rank} for ranking in rankings_of(request)}
            constants |= {donor.digest: {"values": values_of(donor)} for donor in constants_of(request)}
        return adapters, rankings, constants


def _scales_kv(scales: Scales) -> bool:
    return any(bool((scales.scale[module] != 1).any()) for module in scales.scale if module != "down_proj")


@dataclass(eq=False)
class Held:
    """What unfinished requests keep registered. ids: key -> handle, for adapters, rankings and constants."""

    banks: list[tuple[Bank, list[str], list[str]]]  # bank, keys, those of them that had to be written
    ids: list[dict[str, int]]

    def release(self, written: bool = True) -> None:
        for bank, keys, fresh in self.banks:
            bank.give_back(keys)
            if not written:
                bank.forget(fresh)
        self.banks = []


def answers_of(answers: list[dict]) -> list:
    """What the workers returned; an error of one of them is raised."""
    for answer in answers:
        if "error" in answer:
            raise SnpatchError(answer["error"])
    return [answer["ok"] for answer in answers]


def _receipt(request: Request, records: list[dict], fed: int) -> int:
    """Check that the device did what was planned and that the plan covered the text; the text's own overwrites.

    Positions that came from the prefix cache were overwritten when they were put there, and do not count again.
    """
    width = len(request.window) if request.window else 0
    done = sum(record["done"] for record in records)
    seen, planned, skipped = (records[0][name] for name in ("seen", "planned", "skipped"))
    if done != planned * width:
        raise ReceiptError(
            f"a patch was not applied in full: {planned * width} overwrites were planned, the device did {done}"
        )
    wanted = patched_positions(request, fed) - skipped
    if seen < fed or (width and planned < wanted):
        raise ReceiptError(
            f"a patch was not applied in full: {fed} positions were to be run, {seen} were, and {planned} of them "
            f"patched instead of {wanted}"
        )
    return wanted * width


def _captured(request: Request, records: list[dict]) -> torch.Tensor:
    """[positions, k] float32 of all shards: each neuron comes from the one worker that holds it."""
    _, k, start, stop = request.capture
    captured, *others = (unpack(record["captured"])[:, :k] for record in records)
    for shard in others:
        captured = torch.where(captured.isnan(), shard, captured)
    if captured.shape != (stop - start, k) or captured.isnan().any():
        raise ReceiptError("a capture is incomplete: some of its neurons were not written")
    return captured


def _sampling_params(request: Request, ends: frozenset[int], extra_args: dict | None, streaming: bool):
    """vLLM's SamplingParams for a request. One that writes nothing still samples a token, which is dropped."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    common = {
        "extra_args": extra_args,
        "output_kind": RequestOutputKind.CUMULATIVE if streaming else RequestOutputKind.FINAL_ONLY,
        "prompt_logprobs": 1 if request.prompt_logprobs else None,  # the likeliest token's beside the given one's
        # Positions that come from the cache are not run, so nothing of them could be observed.
        "skip_reading_prefix_cache": bool(
            (request.observe and request.observe[1] < len(request.prompt_ids))
            or request.capture
            or request.prompt_logprobs
        ),
    }
    s = request.sampling
    if s is None:
        return SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, **common)
    own = {
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": s.top_k,
        "max_tokens": s.max_tokens,
        "min_tokens": s.min_tokens,
        "stop": list(s.stop) or None,
        "stop_token_ids": None if s.ignore_eos else sorted(ends),
        "ignore_eos": s.ignore_eos,
        "seed": s.seed,
        "logprobs": 0 if s.logprobs else None,
        "detokenize": bool(s.stop or s.vllm.get("bad_words")),
        **common,
    }
    taken = {*own, "n"} & s.vllm.keys()
    if taken:
        raise SnpatchError(f"sampling: {', '.join(sorted(taken))} cannot be set through vllm=")
    try:
        return SamplingParams(**own, **s.vllm)
    except (TypeError, ValueError) as error:
        raise SnpatchError(f"sampling: vLLM does not take {dict(s.vllm)}: {error}") from error


def _output(request: Request, result, tokenizer) -> Output:
    output = Output()
    if request.prompt_logprobs:
        given = zip(result.prompt_logprobs[1:], request.prompt_ids[1:], strict=True)
        pairs = [(at[token].logprob, max(other.logprob for other in at.values())) for at, token in given]
        values, best = torch.tensor(pairs, dtype=torch.float32).view(-1, 2).unbind(1)
        output.prompt_logprobs = Logprobs(values, values >= best)
    if request.sampling is None:
        return output
    written = result.outputs[0]
    output.token_ids = list(written.token_ids)
    output.finish_reason = written.finish_reason
    if written.finish_reason == "stop":
        is_string = isinstance(written.stop_reason, str)
        output.finish_reason = "stop" if is_string else "eos"
        output.stop_reason = written.stop_reason if is_string else None
    # Not vLLM's own text, which hangs on the prompt's last tokens; the stop string that ended it is its last one.
    output.text = tokenizer.decode(output.token_ids, skip_special_tokens=True)
    if output.stop_reason is not None:
        at = max(output.text.rfind(output.stop_reason), output.text.rfind(output.stop_reason.lstrip()))
        output.text = output.text[: at if at >= 0 else None]
    if request.sampling.logprobs:
        output.logprobs = [at[token].logprob for at, token in zip(written.logprobs, output.token_ids, strict=True)]
    return output


def _geometry(config, max_model_len: int | None) -> Geometry:
    widths = {"down_proj": config.intermediate_size}
    if config.model_type != "phi3":  # whose queries, keys and values are one projection
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        widths |= dict.fromkeys(("k_proj", "v_proj"), config.num_key_value_heads * head)
    context = config.max_position_embeddings if max_model_len is None else max_model_len
    if not 1 <= context <= config.max_position_embeddings:
        raise SnpatchError(f"max_model_len must lie in 1..{config.max_position_embeddings}, got {context}")
    return Geometry(config.num_hidden_layers, config.intermediate_size, context, config.vocab_size, widths)


def _twin_arguments(model, config, dtype: str, arguments: dict) -> dict:
    """vLLM's engine arguments for the twin of the model's architecture."""
    architecture = (config.architectures or [type(config).__name__.removesuffix("Config") + "ForCausalLM"])[0]
    if config.model_type not in ARCHITECTURES:
        os.environ[plugin.UNTESTED] = architecture
    own = {
        "dtype": str(config.dtype or torch.float32).removeprefix("torch.") if dtype == "auto" else dtype,
        "hf_overrides": {"architectures": [plugin.PREFIX + architecture], **arguments.pop("hf_overrides", {})},
        "worker_extension_cls": "snpatch.executors.vllm.worker.commands.WorkerExtension",
    }
    checked = engine_arguments(model, own, arguments, refused=("enable_lora", "disable_cascade_attn"))
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and not {"kv_cache_memory_bytes", "gpu_memory_utilization"} & checked.keys():
        checked["kv_cache_memory_bytes"] = _spare_memory() // 4
    return checked


def engine_arguments(model, own: dict, arguments: dict, refused: Sequence[str] = ()) -> dict:
    """vLLM's engine arguments: the user's and our own, checked. refused: further ones that nobody may set."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    if not any(point.name == feed.KEY for point in entry_points(group="vllm.general_plugins")):
        raise SnpatchError("vLLM would not find snpatch's plugin: install the package (pip install -e .)")
    plugin.register()
    if current_platform.is_cpu():
        _use_all_cores(arguments.get("tensor_parallel_size", 1))
        arguments.setdefault("enforce_eager", True)  # compiled measured no faster there and starts slower
    arguments.setdefault("use_tqdm_on_load", False)
    own = {
        "model": str(model),
        "tokenizer": str(model),
        "disable_log_stats": True,
        "generation_config": "vllm",
        **own,
    }
    taken = {*own, *refused} & arguments.keys()
    if taken:
        raise SnpatchError(f"backend vllm: {', '.join(sorted(taken))} cannot be set")
    unknown = arguments.keys() - AsyncEngineArgs.__dataclass_fields__.keys()
    if unknown:
        raise SnpatchError(f"backend vllm: neither snpatch nor vLLM has an argument {', '.join(sorted(unknown))}")
    return {**arguments, **own}


@contextmanager
def starting(engine_args, check: Callable[[object], None] = refuse) -> Iterator[object]:
    """vLLM's config of these arguments, checked, and the environment to start an engine of it in."""
    from vllm.usage.usage_lib import UsageContext

    variables = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", processes.PARENT: str(os.getpid())}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        config = engine_args.create_engine_config(UsageContext.LLM_CLASS)
        config.compilation_config.pass_config.fuse_allreduce_rms = False  # sized by tokens, and the rows are twice that
        check(config)
        with processes.ctrl_c_stops():
            yield config
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SnpatchError(f"vLLM does not start: {reason} (its own messages above say more)") from error
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
    if os.environ.get(BIND) in (None, os.environ.get(BOUND)):
        os.environ[BIND] = os.environ[BOUND] = "|".join(",".join(map(str, part)) for part in parts)


def _spare_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
