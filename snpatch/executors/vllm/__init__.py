"""vLLM executor: recipient and donor streams of every request inside vLLM's own batches.

Only this folder and `server` import vllm.

In the client process:

    executor          many requests until all are finished; used by `Engine`
    streaming         one request at a time from many callers; used by `AsyncEngine`
    pooling           token ids to logits; used by score models
    executor_base     state that both executors share
    codec             requests to vLLM's arguments, vLLM's results to outputs
    slots             slots of adapters, rankings, constants and statistics on the device
    launch            vLLM's engine arguments
    engine_lifecycle  start and end of an engine
    child_processes   vLLM's processes and the files they leave
    log               file for vLLM's messages
    temporary         temporary folders that the next start removes
    versions          supported vLLM versions
    api_check         every name of vLLM that is used, to check unknown versions

In all processes: settings, rpc, processes, quantization, zeroing. In vLLM's processes: worker/.
"""
