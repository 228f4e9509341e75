"""The vLLM executor: both streams of every request inside vLLM's own batches.

In the user's process:

    executor      many requests to their end: what `Engine` runs on
    streaming     one request at a time from many callers: what `AsyncEngine` runs on
    pooling       rows of ids to logits: what score models run on
    wire          how a request travels, and what comes back
    registry      rows for what requests name
    answers       what the workers answer
    launch        what vLLM is started with
    lifetime      an engine from its start to its end
    offspring     its processes, and what they leave behind
    log           where its messages go
    temporary     folders that the next start removes
    versions      which vLLM versions are served
    contract      every name of vLLM that is touched, for versions that nobody has seen

In all processes: settings, packing, processes, quantised. In vLLM's own processes: worker/.

Only this folder imports vllm.
"""
