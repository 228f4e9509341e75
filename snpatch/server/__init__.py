"""`snpatch serve`: vLLM's OpenAI-compatible server, with patches by name and by request.

A request's way: gate.py -> vLLM's route -> handlers.py, which reads what is asked (asks.py, catalogue.py) -> vLLM's
handler -> client.py, which patches and confirms -> answers.py, which adds the receipt.
"""
