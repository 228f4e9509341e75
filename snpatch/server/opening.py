"""What is put into vLLM's app when it starts: names, handlers, routes, metrics."""

from fastapi import FastAPI
from vllm.lora.request import LoRARequest

from snpatch.executors.vllm.settings import KEY
from snpatch.server import bodies, handlers, metrics, routes
from snpatch.server.serving import ServerState


def install(serving: ServerState, app: FastAPI) -> None:
    """vLLM's app, whose state is ready, serves patches from now on."""
    models = app.state.openai_serving_models
    # To vLLM a name is an adapter's: it is listed, checked, told in answers, and reaches `generate`, but no further.
    models.lora_requests |= {name: LoRARequest(name, i, KEY) for i, name in enumerate(serving.catalogue.names, 1)}
    for model in models.base_model_paths:
        model.model_path = model.name  # which /v1/models would tell: it may be a folder of this machine
    handlers.wrap(serving, app.state)
    serving.models |= bodies.models_of(app)
    app.include_router(routes.router(serving))
    executor = serving.engine.executor
    metrics.watch(lambda: executor.registry.in_use, lambda: executor.waiting)
