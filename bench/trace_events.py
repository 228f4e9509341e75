"""Time of a decode step by kernel, from a torch profiler's trace.

Why not the profiler's own table: it sums over everything that was recorded, not over a step.
"""

import re
from collections import defaultdict

# The first match wins; names of CUDA libraries, vLLM, Inductor and snpatch's Triton kernels.
GROUPS = (
    ("snpatch's op", r"patched_glu|dual_stream_|snpatch"),
    ("attention", r"flash|attention|attn|fmha|merge_state|split_kv|_fwd_kernel"),
    ("cache writes", r"reshape_and_cache|concat_and_cache|copy_blocks"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|splitk|wgmma|aten::mm|aten::addmm|aten::linear|onednn|dnnl"),
    ("activation", r"act_and_mul|silu|gelu"),
    ("norms", r"norm"),
    ("positions", r"rotary|rope"),
    ("sampling", r"argmax|topk|softmax|sample|gumbel|logprob"),
    ("fused by Inductor", r"^triton_"),
    ("copies", r"memcpy|copy|cat|index|fill|memset"),
)
TOP = 15


class NoKernelsError(ValueError):
    """A trace without a kernel."""


def decode_steps(events: list[dict], category: str) -> dict:
    """Return the number of steps, microseconds per step, and their time by group and by kernel.

    category: "kernel" on a GPU, "cpu_op" without one. A kernel inside another one counts once.

    Raises:
        NoKernelsError: The trace has no kernel, because the machine blocks profilers from its card.
        ValueError: The trace marks too few decode steps.
    """
    marks = sorted(e["ts"] for e in events if e.get("cat") == "user_annotation" and _is_decode(e["name"]))
    if len(marks) < 3:
        names = sorted({e["name"] for e in events if e.get("cat") == "user_annotation"})
        raise ValueError(f"trace: expected at least 3 decode steps, got {len(marks)}; it marks {names[:10]}")
    start, stop, steps = marks[0], marks[-1], len(marks) - 1
    kernels = [e for e in events if e.get("cat") == category and e.get("ph") == "X" and start <= e["ts"] < stop]
    if not kernels:
        raise NoKernelsError(f"trace: no event of category {category} in {steps} decode steps")
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event, self_time in _self_times(kernels):
        spent[event["name"]] += self_time
        calls[event["name"]] += 1
    groups: dict[str, float] = defaultdict(float)
    for name, time in spent.items():
        groups[kernel_group(name)] += time / steps
    top = sorted(spent, key=spent.get, reverse=True)[:TOP]
    return {
        "steps": steps,
        "step_us": (stop - start) / steps,
        "busy_us": sum(spent.values()) / steps,
        "groups_us": dict(sorted(groups.items(), key=lambda item: -item[1])),
        "top": [{"name": n[:120], "us": spent[n] / steps, "calls": calls[n] / steps} for n in top],
    }


def kernel_group(name: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), "other")


def _is_decode(name: str) -> bool:
    """Return whether an event is vLLM's mark of a decode step.

    An example: "execute_context_0(0)_generation_32(32)": 32 requests decode, none prefills.
    """
    match = re.match(r"execute_context_(\d+)\(.*_generation_(\d+)\(", name)
    return bool(match) and match[1] == "0" and match[2] != "0"


def _self_times(events: list[dict]):
    """Yield (event, its duration without that of the events inside it)."""
    lanes: dict[tuple, list[dict]] = defaultdict(list)
    for event in events:
        lanes[event["pid"], event["tid"]].append(event)
    for lane in lanes.values():
        self_times, stack = {}, []
        for index in sorted(range(len(lane)), key=lambda i: (lane[i]["ts"], -lane[i]["dur"])):
            event = lane[index]
            while stack and lane[stack[-1]]["ts"] + lane[stack[-1]]["dur"] <= event["ts"]:
                stack.pop()
            if stack:
                self_times[stack[-1]] -= event["dur"]
            self_times[index] = event["dur"]
            stack.append(index)
        yield from ((lane[index], time) for index, time in self_times.items())
