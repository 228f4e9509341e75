"""A user's process for tests/test_vllm_processes.py: starts an engine in vLLM's own processes and writes for ever."""

import json
import sys
import time

from snpatch import Engine, Sampling, SnpatchError

if __name__ == "__main__":
    folder, adapters = sys.argv[1], json.loads(sys.argv[2])
    engine = Engine(folder, adapters, backend="vllm", kv_cache_memory_bytes=64 << 20)
    print("ready", flush=True)
    try:
        while True:
            engine.generate([[1, 5, 6]] * 64, "sft", Sampling(max_tokens=100, ignore_eos=True))
            print("round", flush=True)
    except (KeyboardInterrupt, SnpatchError) as error:
        print(type(error).__name__, error, flush=True)
        if isinstance(error, KeyboardInterrupt):
            print("goes on", len(engine.generate([[1, 5, 6]], "sft", Sampling(max_tokens=4))), flush=True)
        start = time.monotonic()
        engine.close()
        print(f"closed {time.monotonic() - start:.1f}", flush=True)
