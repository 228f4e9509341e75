"""Engines: models, adapters and an executor behind one API.

engine.py: Engine, the synchronous API. async_engine.py: AsyncEngine, for many concurrent callers of an event loop.
base.py: config, tokenizer and models of both. requests.py: prompts, patches and sampling become executor requests.
contrast.py: rankings from a pair of models. prompt_guard.py: what an engine needs of a guard.
"""

from snpatch.engine.async_engine import AsyncEngine, Delta
from snpatch.engine.engine import Engine
from snpatch.engine.prompt_guard import PromptGuard
from snpatch.engine.requests import Completion

__all__ = ["AsyncEngine", "Completion", "Delta", "Engine", "PromptGuard"]
