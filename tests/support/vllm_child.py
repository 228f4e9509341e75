"""Client process for executors/vllm/test_processes.py: generates with an engine in vLLM's own processes, without end.

Ctrl-C ends the running call; the engine is used again.
"""

import json
import signal
import sys

from snpatch import Engine, Sampling

SAMPLING = Sampling(max_tokens=100, ignore_eos=True)


def generate_forever(engine: Engine) -> None:
    while True:
        engine.generate([[1, 5, 6]] * 64, "sft", SAMPLING)
        print("round", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored if the tests run in the background
    folder, adapters = sys.argv[1], json.loads(sys.argv[2])
    engine = Engine(folder, adapters, backend="vllm", kv_cache_memory_bytes=64 << 20)
    print("ready", flush=True)
    try:
        generate_forever(engine)
    except KeyboardInterrupt:
        print("KeyboardInterrupt", flush=True)
        print("completion", len(engine.generate([[1, 5, 6]], "sft", Sampling(max_tokens=4))), flush=True)
        generate_forever(engine)
