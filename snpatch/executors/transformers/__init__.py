"""Executor on plain transformers models, for any machine; the reference that the vLLM executor is compared with.

executor   loads the models, groups requests into batches
batch      runs one batch: prefill, decoding, receipts
surgery    makes a model run both streams
tables     adapters, rankings and constants of one call, and the request table
decoding   chooses tokens and decides when a completion ends
"""
