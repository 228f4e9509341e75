"""The vLLM executor: both streams of every request inside vLLM's own batches.

    executor.py   in the user's process: what `Engine` calls
    stream.py     in the user's process: one request at a time from many callers
    client.py     in the user's process: what both share
    registry.py   in the user's process: ids for adapters, rankings and constants
    settings.py   what a twin engine is built with, and what it refuses
    score.py      in the user's process: what `ScoreModel` calls
    head.py       in the worker: vLLM's Llama with a score head
    plugin.py     tells vLLM of these models, in every process
    surgery.py    in the worker: one of vLLM's models made to run two streams
    banks.py      in the worker: the tensors that the op reads and adds to
    feed.py       in the worker: requests -> the plan of each step, and the records of what was done
    runners.py    in the worker: the feed in Model Runner V1 and V2
    worker.py     in the worker: the commands that the user's process sends
    processes.py  in every process: ends with the user's process, leaves Ctrl-C to it
    versions.py   which vLLM versions are served
    contract.py   every name of vLLM that is touched, for versions that nobody has seen

Only this folder imports vllm.
"""
