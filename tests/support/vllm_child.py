"""A user's process for tests/test_vllm_processes.py: starts an engine in vLLM's own processes and writes for ever.

Ctrl-C ends a call and not the engine: it goes on.
"""

import json
import signal
import sys

from snpatch import Engine, Sampling

ENDLESS = Sampling(max_tokens=100, ignore_eos=True)


def write(engine: Engine) -> None:
    while True:
        engine.generate([[1, 5, 6]] * 64, "sft", ENDLESS)
        print("round", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
    folder, adapters = sys.argv[1], json.loads(sys.argv[2])
    engine = Engine(folder, adapters, backend="vllm", kv_cache_memory_bytes=64 << 20)
    print("ready", flush=True)
    try:
        write(engine)
    except KeyboardInterrupt:
        print("KeyboardInterrupt", flush=True)
        print("goes on", len(engine.generate([[1, 5, 6]], "sft", Sampling(max_tokens=4))), flush=True)
        write(engine)
