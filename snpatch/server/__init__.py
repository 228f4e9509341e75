"""`snpatch serve`: vLLM's OpenAI-compatible server, with patches by name or in the request.

A request passes middleware.py, vLLM's route, the wrapped handler of install.py (which parses the patch with
patch_request.py and registry.py), vLLM's handler, client.py (which patches and checks receipts) and receipts.py (which
adds the receipt to the response).

install.py         installs routes, handlers and metrics into vLLM's app
launcher.py        starts and stops the server
config.py          ServeConfig: everything a server is started with
vllm_args.py       vLLM's own command-line flags
state.py           objects that live as long as the server, quotas, requests in flight
middleware.py      routes, API keys, retry headers
request_limits.py  deadlines and sizes of request heads and bodies
request_fields.py  rejects request fields that nothing reads
responses.py       send deadlines; removes paths from error messages
routes.py          snpatch's routes; uploads.py and sweep_endpoint.py serve two of them
"""
