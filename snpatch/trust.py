"""Keys of config files that cannot run code or open the host. Files that are not trusted may set no others.

Why a list of allowed keys: vLLM's next version may have further arguments that name a module, a file or an address.
The command line and Python calls come from the user and may set anything.
"""

import re
from collections.abc import Iterable, Mapping

from snpatch.errors import SnpatchError, shown

ENGINE = frozenset(
    """async_scheduling attention_backend block_size cpu_offload_gb cudagraph_capture_sizes disable_cascade_attn
    disable_custom_all_reduce disable_hybrid_kv_cache_manager disable_log_stats disable_sliding_window
    distributed_executor_backend dtype enable_chunked_prefill enable_expert_parallel enable_log_requests
    enable_prefix_caching enable_sleep_mode enforce_eager gpu_memory_utilization kv_cache_dtype kv_cache_memory_bytes
    language_model_only load_format logprobs_mode long_prefill_token_threshold max_cudagraph_capture_size max_logprobs
    max_model_len max_num_batched_tokens max_num_seqs max_parallel_loading_workers num_gpu_blocks_override
    optimization_level performance_mode pipeline_parallel_size prefix_caching_hash_algo quantization reasoning_parser
    revision scheduling_policy seed served_model_name stream_interval swap_space tensor_parallel_size
    use_tqdm_on_load""".split()
)  # arguments of vLLM's engine
SERVER = frozenset(
    """api_key chat_template_content_format disable_fastapi_docs disable_uvicorn_access_log enable_auto_tool_choice
    enable_force_include_usage enable_log_deltas enable_log_outputs enable_per_request_metrics
    enable_prompt_tokens_details enable_request_id_headers enable_server_load_tracking
    exclude_tools_when_tool_choice_none h11_max_header_count h11_max_incomplete_event_size log_error_stack max_log_len
    port response_role return_tokens_as_token_ids sse_keep_alive_interval tool_call_parser tool_strict_level
    uvicorn_log_level""".split()
)  # flags of vLLM's HTTP server
TEXTS = (
    "api_key",
    "served_model_name",
    "revision",
)  # may be any string; others must be names, which hold no path, address or module
COMPILATION = frozenset(("cudagraph_capture_sizes", "cudagraph_mode", "max_cudagraph_capture_size", "mode"))
LOAD_FORMATS = ("auto", "dummy", "hf", "safetensors")  # the others read pickles or call plugins
_NAME = re.compile(r"[\w-]*")


def check_arguments(arguments: Mapping[str, object], known: Iterable[str], context: str) -> None:
    """Check that a file's arguments are known to be harmless.

    Args:
        arguments: Name -> value.
        known: Names that are harmless with plain values: ENGINE or SERVER.
        context: File and table, for error messages.

    Raises:
        SnpatchError: An argument is not known to be harmless.
    """
    for name, value in arguments.items():
        if name == "compilation_config":
            parts = value if isinstance(value, Mapping) else {"mode": value}
            check_arguments(parts, COMPILATION, f"{context}.{name}")
        elif name not in known or not _is_harmless(name, value):
            refuse(f"{context}.{name}", value)


def refuse(context: str, value: object) -> None:
    """Raise the error for a value of a file that may run code or open the host."""
    raise SnpatchError(
        f"{context} = {shown(value)}: may run code, reach files or open this host. Read the file, then pass "
        "--trust-config (in Python: trust=True), or set it on the command line."
    )


def _is_harmless(name: str, value: object) -> bool:
    """Return whether an argument with a harmless name has a harmless value."""
    if name == "load_format":
        return value in LOAD_FORMATS
    return isinstance(value, str | list | None) if name in TEXTS else _is_plain(value)


def _is_plain(value: object) -> bool:
    """Return whether a value is a number, a name, or a list of these."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return _NAME.fullmatch(value) is not None if isinstance(value, str) else isinstance(value, int | float | None)
