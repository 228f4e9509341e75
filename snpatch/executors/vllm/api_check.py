"""Names of vLLM that snpatch uses, and a check that the installed vLLM has them.

Why vLLM's source is parsed and not imported: parsing takes a second, needs neither a GPU nor Triton (modules of Model
Runner V2 need both), and finds attributes that methods set (`self.input_batch = ...`), which classes do not have.
Names that are read with a default (`getattr(config, name, False)`) may be missing and are not listed.
"""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

# module -> name -> used members: (parameters of a call), attributes, methods(and their parameters).
ENGINE_NAMES = {
    "vllm": {
        "ModelRegistry": "get_supported_archs register_model(model_arch, model_cls)",
        "PoolingParams": "(task, use_activation)",
        "SamplingParams": "(temperature, top_p, top_k, max_tokens, min_tokens, stop, stop_token_ids, ignore_eos, seed, "
        "n, logprobs, prompt_logprobs, detokenize, bad_words, output_kind, extra_args, skip_reading_prefix_cache)",
    },
    "vllm.config": {
        "CompilationMode": "NONE",
        "set_current_vllm_config": "(vllm_config)",
        "VllmConfig": "additional_config cache_config compilation_config lora_config model_config parallel_config "
        "quant_config scheduler_config speculative_config",
        "CacheConfig": "cache_dtype kv_sharing_fast_prefill",
        "CompilationConfig": "compile_sizes custom_ops max_cudagraph_capture_size pass_config static_forward_context",
        "ModelConfig": "get_num_attention_heads get_num_kv_heads head_dtype hf_config hf_text_config "
        "get_head_size is_attention_free is_encoder_decoder is_hybrid model pooler_config quantization runner_type "
        "use_mla uses_mrope",
        "ParallelConfig": "data_parallel_size pipeline_parallel_size use_ray",
        "PassConfig": "fuse_allreduce_rms",
        "SchedulerConfig": "max_num_batched_tokens max_num_seqs",
    },
    "vllm.distributed": {"get_tensor_model_parallel_rank": "", "get_tensor_model_parallel_world_size": ""},
    "vllm.engine.arg_utils": {
        "EngineArgs": "create_engine_config(usage_context)",
        "AsyncEngineArgs": "(model, tokenizer, runner, dtype, hf_overrides, generation_config, load_format, "
        "max_model_len, max_num_seqs, tensor_parallel_size, gpu_memory_utilization, kv_cache_memory_bytes, "
        "enforce_eager, use_tqdm_on_load, disable_log_stats, additional_config, worker_extension_cls, "
        "cudagraph_capture_sizes) "
        "__dataclass_fields__",
    },
    "vllm.envs": {
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "",
        "VLLM_CPU_OMP_THREADS_BIND": "",
        "VLLM_LOGGING_CONFIG_PATH": "",
        "VLLM_LOGGING_LEVEL": "",
        "VLLM_LOGGING_STREAM": "",
        "VLLM_RPC_BASE_PATH": "",
    },
    "vllm.exceptions": {"VLLMValidationError": ""},
    "vllm.forward_context": {"get_forward_context": "", "ForwardContext": "no_compile_layers"},
    "vllm.inputs": {"tokens_input": "(prompt_token_ids, cache_salt)"},
    "vllm.logprobs": {"Logprob": "logprob"},
    "vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel": {
        "FP8ScaledMMLinearKernel": "apply_weights quant_fp8",
    },
    "vllm.model_executor.layers.activation": {"GeluAndMul": "approximate", "SiluAndMul": ""},
    "vllm.model_executor.layers.attention": {
        "Attention": "(num_heads, head_size, scale, num_kv_heads) num_heads num_kv_heads layer_name "
        "kv_sharing_target_layer_name",
    },
    "vllm.model_executor.layers.layernorm": {"GemmaRMSNorm": "", "RMSNorm": ""},
    "vllm.model_executor.layers.linear": {
        "LinearBase": "",
        "QKVParallelLinear": "head_size num_kv_heads num_kv_head_replicas",
        "ReplicatedLinear": "(input_size, output_size, bias, params_dtype, prefix, return_bias)",
    },
    "vllm.model_executor.layers.pooler": {"DispatchPooler": "for_seq_cls(pooler_config, classifier)"},
    "vllm.model_executor.layers.quantization.input_quant_fp8": {"QuantFP8": "static group_shape"},
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors": {
        "CompressedTensorsConfig": "kv_cache_scheme target_scheme_map",
    },
    "vllm.model_executor.layers.quantization.utils.quant_utils": {"GroupShape": "is_per_tensor"},
    "vllm.model_executor.layers.vocab_parallel_embedding": {"ParallelLMHead": "", "VocabParallelEmbedding": ""},
    "vllm.model_executor.model_loader": {"get_model_loader": "(load_config)"},
    "vllm.model_executor.models.adapters": {
        "as_seq_cls_model": "ModelForSequenceClassification",
        "_create_pooling_model_cls": "ModelForPooling",
    },
    "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP": ""},
    "vllm.model_executor.models.llama": {"LlamaForCausalLM": "(vllm_config, prefix) forward load_weights(weights)"},
    "vllm.model_executor.models.registry": {
        "ModelRegistry": "_try_load_model_cls(model_arch) models",
        "_LazyRegisteredModel": "(module_name, class_name) inspect_model_cls load_model_cls",
        "_ModelInfo": "from_model_cls(model)",
    },
    "vllm.outputs": {
        "RequestOutput": "request_id finished outputs prompt_logprobs",
        "CompletionOutput": "token_ids logprobs finish_reason stop_reason",
        "PoolingRequestOutput": "request_id outputs",
        "PoolingOutput": "data",
    },
    "vllm.platforms": {"current_platform": "is_cpu get_device_total_memory"},
    "vllm.plugins": {"load_general_plugins": ""},
    "vllm.sampling_params": {"RequestOutputKind": "CUMULATIVE FINAL_ONLY"},
    "vllm.usage.usage_lib": {"UsageContext": "LLM_CLASS"},
    "vllm.utils.torch_utils": {
        "LayerNameType": "",
        "_encode_layer_name": "(layer_name)",
        "_resolve_layer_name": "(layer_name)",
    },
    "vllm.v1.attention.backends.cpu_attn": {"CPUAttentionBackend": "get_supported_head_sizes"},
    "vllm.v1.core.sched.output": {
        "SchedulerOutput": "finished_req_ids scheduled_new_reqs scheduled_cached_reqs new_block_ids_to_zero",
        "CachedRequestData": "resumed_req_ids",
        "NewRequestData": "req_id sampling_params",
    },
    "vllm.v1.engine.async_llm": {
        "AsyncLLM": "from_vllm_config(vllm_config, disable_log_stats) generate(prompt, sampling_params, request_id) "
        "collective_rpc(method, args) shutdown errored output_processor",
    },
    "vllm.v1.engine.core_client": {
        "EngineCoreClient": "shutdown(timeout)",
        "BackgroundResources": "engine_dead",
        "SyncMPClient": "resources outputs_queue utility_results",
    },
    "vllm.v1.engine.exceptions": {"EngineDeadError": "", "EngineGenerateError": ""},
    "vllm.v1.engine.llm_engine": {
        "LLMEngine": "from_vllm_config(vllm_config, disable_log_stats) add_request(request_id, prompt, params) step "
        "abort_request(request_ids) collective_rpc(method, args) get_supported_tasks engine_core "
        "vllm_config",
    },
    "vllm.v1.engine.output_processor": {"OutputProcessor": "propagate_error(e)"},
    "vllm.v1.kv_cache_interface": {
        "FullAttentionSpec": "sliding_window",
        "KVCacheConfig": "needs_kv_cache_zeroing num_blocks",
        "SlidingWindowSpec": "sliding_window",
    },
    "vllm.v1.worker.utils": {"AttentionGroup": "layer_names metadata_builders", "KVBlockZeroer": "_meta"},
    "vllm.v1.worker.worker_base": {"WorkerBase": "model_runner"},
}
# One of them is enough: V1 is deprecated since 0.33, V2 does not run on a CPU.
RUNNER_NAMES = {
    "v1": {
        "vllm.v1.worker.gpu_input_batch": {"InputBatch": "num_computed_tokens_cpu num_reqs req_ids"},
        "vllm.v1.worker.gpu_model_runner": {
            "GPUModelRunner": "_update_states(scheduler_output) _prepare_inputs(scheduler_output, "
            "num_scheduled_tokens) _dummy_run _init_kv_zero_meta _kv_block_zeroer _zero_block_ids(block_ids) "
            "attn_groups get_model input_batch input_ids kv_cache_config kv_caches",
        },
        "vllm.v1.worker.cpu_model_runner": {"CPUModelRunner": "_zero_block_ids(block_ids)"},
    },
    "v2": {
        "vllm.v1.worker.gpu.input_batch": {
            "InputBatch": "input_ids num_computed_tokens_np num_reqs num_scheduled_tokens req_ids"
        },
        "vllm.v1.worker.gpu.model_runner": {
            "GPUModelRunner": "attn_groups get_model kv_block_zeroer kv_cache_config model_state"
        },
        "vllm.v1.worker.gpu.model_states": {"init_model_state": ""},
        "vllm.v1.worker.gpu.model_states.default": {
            "DefaultModelState": "(vllm_config, model) add_request(req_index, new_req_data) remove_request(req_id) "
            "prepare_inputs(input_batch, req_states)",
        },
    },
}
# Names that only `snpatch serve` uses.
SERVER_NAMES = {
    "vllm.engine.protocol": {
        "EngineClient": "generate(prompt, sampling_params, request_id, lora_request) shutdown(timeout)"
    },
    "vllm.entrypoints.anthropic.serving": {"AnthropicServingMessages": "create_messages(request, raw_request)"},
    "vllm.entrypoints.cli.serve": {"ServeSubcommand": "subparser_init(subparsers) validate(args)"},
    "vllm.entrypoints.openai.api_server": {
        "build_and_serve": "(engine_client, listen_address, sock, args)",
        "setup_server": "(args)",
    },
    "vllm.entrypoints.openai.chat_completion.serving": {
        "OpenAIServingChat": "create_chat_completion(request, raw_request)"
    },
    "vllm.entrypoints.openai.completion.serving": {
        "OpenAIServingCompletion": "create_completion(request, raw_request)"
    },
    "vllm.entrypoints.openai.models.serving": {
        "OpenAIServingModels": "base_model_paths lora_requests show_available_models"
    },
    "vllm.entrypoints.openai.responses.serving": {"OpenAIServingResponses": "create_responses(request, raw_request)"},
    "vllm.entrypoints.serve.engine.serving": {
        "BaseServing": "create_error_response(message, err_type, status_code, param)"
    },
    "vllm.lora.request": {"LoRARequest": "lora_name lora_int_id lora_path"},
    "vllm.outputs": {
        "CompletionOutput": "(index, text, token_ids, cumulative_logprob, logprobs, finish_reason, stop_reason)",
        "RequestOutput": "(request_id, prompt, prompt_token_ids, prompt_logprobs, outputs, finished)",
    },
    "vllm.sampling_params": {
        "RequestOutputKind": "DELTA FINAL_ONLY",
        "SamplingParams": "n seed extra_args max_tokens min_tokens output_kind logprobs prompt_logprobs "
        "update_from_generation_config(generation_config)",
    },
    "vllm.utils.argparse_utils": {"FlexibleArgumentParser": "parse_args(args)"},
}
USE = re.compile(r"(\w*)(?:\(([\w, ]*)\))?")
Definition = tuple[str, ast.AST]  # the module that contains a definition, and its node


def missing_names(serving: bool = False) -> list[str]:
    """Return the dotted names that the installed vLLM lacks. serving: include those of its server."""
    _module_names.cache_clear()
    by_runner = [_missing_in(names) for names in RUNNER_NAMES.values()]
    missing = _missing_in(ENGINE_NAMES)
    if all(by_runner):
        missing += [name for names in by_runner for name in names]
    return missing + _missing_in(SERVER_NAMES) if serving else missing


def read_source(module: str) -> str | None:
    """Return the source of one of vLLM's modules; None if it does not exist."""
    path = _module_path(module)
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return file.read_text()
    return None


def _module_path(module: str) -> Path:
    """Return the folder of one of vLLM's packages, or the file of a module without its suffix."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None, "vLLM is not installed"
    assert spec.origin is not None
    return Path(spec.origin).parent.joinpath(*module.split(".")[1:])


def _missing_in(table: dict[str, dict[str, str]]) -> list[str]:
    missing = []
    for module, names in table.items():
        if _module_names(module) is None:
            missing.append(module)
            continue
        for name, uses in names.items():
            missing += _missing_uses(module, name, uses)
    return missing


def _missing_uses(module: str, name: str, uses: str) -> list[str]:
    """Return what is missing of one name: the name itself, members, or parameters."""
    definition = _resolve(module, name)
    if definition is None:
        return [f"{module}.{name}"]
    missing = []
    for member, parameters in (match.groups() for match in USE.finditer(uses) if match[0]):
        path = f"{module}.{name}.{member}".rstrip(".")
        used = _member(definition, member) if member else definition
        if used is None:
            missing.append(path)
            continue
        names = (parameters or "").replace(",", " ").split()
        missing += [f"{path}({parameter})" for parameter in names if not _has_parameter(used, parameter)]
    return missing


@cache
def _module_names(module: str) -> dict[str, Any] | None:
    """Return the names that a module defines or imports, also under `if` and `try`.

    "*" has its star imports.
    """
    source = read_source(module)
    return None if source is None else _defined_names(ast.parse(source).body)


def _defined_names(body: list[ast.stmt]) -> dict[str, Any]:
    names: dict[str, Any] = {"*": []}
    for node in body:
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                names[node.name] = node
            case ast.ImportFrom(names=[ast.alias(name="*")]):
                names["*"].append(node)
            case ast.ImportFrom() | ast.Import():
                names |= {alias.asname or alias.name: node for alias in node.names}
            case ast.Assign(targets=targets):
                for target in targets:
                    if isinstance(target, ast.Name):
                        names.setdefault(target.id, node)
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.setdefault(name, node)
            case ast.If() | ast.Try() | ast.With():
                parts = [*node.body, *getattr(node, "orelse", ())]
                inner = _defined_names([*parts, *(line for h in getattr(node, "handlers", ()) for line in h.body)])
                names["*"] += inner.pop("*")
                names |= {name: inner[name] for name in inner if name not in names}
    return names


def _resolve(module: str, name: str) -> Definition | None:
    """Return the definition of a module's name; follow imports, and variables to the class of their value."""
    names = _module_names(module)
    if names is None:
        return None
    node = names.get(name)
    if node is None:
        definitions = (_resolve(_imported_module(module, star), name) for star in names["*"])
        return next(filter(None, definitions), None)
    match node:
        case ast.ImportFrom():
            original = next(alias.name for alias in node.names if name in (alias.asname, alias.name))
            target = _imported_module(module, node)
            return _resolve(target, original) if target.split(".")[0] == "vllm" else (module, node)
        case ast.Assign(value=ast.Call(func=ast.Name(id=kind))) | ast.AnnAssign(annotation=ast.Name(id=kind)):
            return (kind in names and _resolve(module, kind)) or (module, node)
    return module, node


def _imported_module(module: str, node: ast.ImportFrom) -> str:
    """Return the absolute name of the module that an import names."""
    if not node.level:
        assert node.module is not None  # only a relative import may name no module
        return node.module
    parts = module.split(".") if _module_path(module).is_dir() else module.split(".")[:-1]
    return ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])


def _member(definition: Definition, name: str) -> Definition | None:
    """Return a class's method, field or attribute, or a function's local name.

    Bases are searched, too. An attribute is one that a method sets.
    """
    module, node = definition
    if not isinstance(node, ast.ClassDef | ast.FunctionDef):
        return None
    if name in (names := _defined_names(node.body)):
        return module, names[name]
    if name == "__dataclass_fields__" and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        return definition
    for inner in ast.walk(node):
        match inner:
            case ast.Attribute(value=ast.Name(id="self"), attr=attr, ctx=ast.Store()) if attr == name:
                return module, inner
    for base in getattr(node, "bases", ()):
        base = base.value if isinstance(base, ast.Subscript) else base
        parent = _resolve(module, base.id) if isinstance(base, ast.Name) else None
        if parent is not None and parent != definition and (inherited := _member(parent, name)):
            return inherited
    return None


def _has_parameter(definition: Definition, parameter: str) -> bool:
    """Return whether a function, or a class's constructor, has a parameter."""
    node = definition[1]
    if isinstance(node, ast.ClassDef):
        init = _member(definition, "__init__")
        return _has_parameter(init, parameter) if init else _member(definition, parameter) is not None
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    return parameter in {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
