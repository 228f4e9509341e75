"""lm-evaluation-harness on a patched model: the model class `snpatch`, and lm-eval's command line with that class.

Log-likelihoods are requested as prompt and completion. Completion positions are then the text that a task scores, so a
patch covers the same positions whether an answer is generated or only read.
"""

import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, takewhile
from typing import Any

from snpatch.config import group_models, parse_adapters, parse_json_object
from snpatch.engine import Engine
from snpatch.errors import SnpatchError
from snpatch.models.checkpoint import load_model_shape
from snpatch.models.templates import Chat
from snpatch.patching import spec
from snpatch.patching.patch import Patch
from snpatch.ranking.reading import Shape
from snpatch.sampling import Sampling
from snpatch.utils.optional import install_hint

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"evaluation needs more packages: {install_hint('eval')}") from error

MAX_GEN_TOKS = 256  # lm-eval's own default
SAMPLING_FIELDS = ("top_p", "top_k", "min_tokens", "ignore_eos", "seed")  # of gen_kwargs; vLLM gets the others


@register_model("snpatch")
class SnpatchLM(TemplateLM):
    """A model of an engine, patched or not, for lm-evaluation-harness: `simple_evaluate(SnpatchLM(...), ...)`.

    Prompts longer than the context are truncated on the left, with a warning.

    Args:
        engine: Engine that runs the model.
        patch: A Patch, or the name of a model to run unpatched.
        max_gen_toks: Maximum number of new tokens if a task sets none.
    """

    def __init__(self, engine: Engine, patch: Patch | str = "base", max_gen_toks: int = MAX_GEN_TOKS) -> None:
        super().__init__()
        self.engine, self.patch, self.max_gen_toks = engine, patch, max_gen_toks
        self._template = engine.requests.template(patch if isinstance(patch, str) else patch.recipient)
        self.tokenizer, self.max_length = self._template.tokenizer, engine.geometry.context

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "SnpatchLM":
        """Build a model from the text of `--model_args` ("model=FOLDER,donor=dpo,...").

        See `create_from_arg_obj`.
        """
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "SnpatchLM":
        """Build a model from `--model_args`.

        lm-eval's --batch_size and --device apply to the engine, except for their defaults, which keep the engine's own.

        Args:
            arg_dict: `model` (a folder or name) and any of these:
                adapters: `sft=SFT;dpo=SFT+DPO` (name=folder, folders stacked in order), or a dict.
                checkpoint, lora: Models on secondary weights, in the form of `adapters`.
                recipient: Model that generates; default: base.
                donor: A model, zero, mean:recipient, mean:donor, noise:N or scale:F.
                ranking, k, positions, strength: Ranking file, top k (or LO:HI), positions and strength of the patch.
                max_gen_toks: Maximum number of new tokens if a task sets none.
                chat_template_kwargs: JSON such as {"enable_thinking": false}, or a dict.
                Any argument of Engine: backend, template, dtype, tensor_parallel_size, ...
            additional_config: lm-eval's batch_size, max_batch_size and device.
        """
        args = {name: _to_int(value) for name, value in arg_dict.items() if value is not None}
        if "model" not in args:
            raise SnpatchError("model_args: model=FOLDER is missing")
        model, (adapters, models) = str(args.pop("model")), _pop_models(args)
        if isinstance(kwargs := args.get("chat_template_kwargs"), str):
            args["chat_template_kwargs"] = parse_json_object(kwargs, "model_args: chat_template_kwargs")
        shape = partial(load_model_shape, model, bool(args.get("allow_untested")))
        patch, max_gen_toks = _pop_patch(args, shape), args.pop("max_gen_toks", MAX_GEN_TOKS)
        engine = Engine(model, adapters, models=models, **{**_engine_options(**(additional_config or {})), **args})
        lm = cls(engine, patch, max_gen_toks)
        weakref.finalize(lm, engine.close)
        return lm

    @property
    def eot_token_id(self) -> int:
        """Return the id of the tokenizer's EOS, which precedes a text without context if there is no BOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Return the token before a text without context: BOS, or EOS if the tokenizer has no BOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Return token ids.

        None adds the tokenizer's special tokens, but no second BOS after a chat template's.
        """
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy decoding gives it."""
        if not requests:
            return []
        continuations = [continuation for _, _, continuation in requests]
        contexts = self._truncate([context for _, context, _ in requests], list(map(len, continuations)))
        with _progress_bar("log-likelihoods", len(requests), disable_tqdm) as progress:
            results = self.engine.logprobs(contexts, self.patch, progress, completions=continuations)
        return [(result.values.double().sum().item(), bool(result.is_greedy.all())) for result in results]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text after the prefix token.

        Windows score every token once.
        """
        windows_by_text = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, context_len=1)
            windows_by_text.append([(None, *make_disjoint_window(window)) for window in rolling])
        windows = list(chain.from_iterable(windows_by_text))
        results = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        return [sum(next(results)[0] for _ in text_windows) for text_windows in windows_by_text]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a completion of each context, up to the first of its `until` strings."""
        if not requests:
            return []
        contexts, options = zip(*(request.args for request in requests), strict=True)
        samplings = [self._sampling(gen_kwargs) for gen_kwargs in options]
        encoded = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        prompts = self._truncate(encoded, [sampling.max_tokens for sampling in samplings])
        with _progress_bar("completions", len(requests), disable_tqdm) as progress:
            completions = self.engine.generate(prompts, self.patch, samplings, progress)
        return [self._cut_at_stop(c.token_ids, s.stop) for c, s in zip(completions, samplings, strict=True)]

    def apply_chat_template(self, chat_history: Chat, add_generation_prompt: bool = True) -> str:
        """Render the recipient's template; without a generation prompt, the last message is continued."""
        return self._template.render(chat_history, continue_final_message=not add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template for lm-eval's records."""
        if isinstance(chat_template, str):
            raise SnpatchError(
                f"--apply_chat_template: expected no name, got {chat_template!r}. Set template= in model_args"
            )
        return "tulu" if self._template.name == "tulu" else self._template.source

    @property
    def tokenizer_name(self) -> str:
        """Return the key of lm-eval's prompt cache."""
        return f"{self.tokenizer.name_or_path}--{self._template.name}-{self._template.fingerprint}".replace("/", "__")

    def get_model_info(self) -> dict:
        """Return the patch and the fingerprints of its models for lm-eval's results."""
        patch = spec.to_json(self.patch) if isinstance(self.patch, Patch) else {"recipient": self.patch}
        names = [patch[side] for side in ("recipient", "donor") if isinstance(patch.get(side), str)]
        models = {name: self.engine.fingerprint(name) for name in names}
        return {"backend": self.engine.backend, "models": models, "patch": patch}

    def _truncate(self, prompts: Sequence[list[int]], new_tokens: Sequence[int]) -> list[list[int]]:
        """Truncate prompts on the left so that `new_tokens` fit into the context."""
        longest = max(new_tokens)
        if longest >= self.max_length:
            raise SnpatchError(
                f"max_gen_toks: expected less than the model's context of {self.max_length} tokens, got {longest}. A "
                "task's max_gen_toks can be set with --gen_kwargs"
            )
        truncated = [ids[-(self.max_length - n) :] for ids, n in zip(prompts, new_tokens, strict=True)]
        if count := sum(len(short) < len(ids) for short, ids in zip(truncated, prompts, strict=True)):
            logging.getLogger(__name__).warning(
                "%d of %d prompts were truncated on the left to the context of %d tokens",
                count,
                len(prompts),
                self.max_length,
            )
        return truncated

    def _sampling(self, gen_kwargs: dict) -> Sampling:
        """Return the sampling of lm-eval's generation arguments, by its rules for their names.

        The default is greedy. None is the default of an argument.
        """
        given = {name: value for name, value in gen_kwargs.items() if value is not None}
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        stop, max_tokens, is_sampled = (options.pop(name) for name in ("until", "max_gen_toks", "do_sample"))
        temperature = options.pop("temperature", 1.0 if is_sampled else 0.0)
        fields = {name: _to_int(options.pop(name)) for name in SAMPLING_FIELDS if name in options}
        stop = tuple(filter(None, stop))
        return Sampling(temperature=temperature, max_tokens=max_tokens, stop=stop, **fields, vllm=options)

    def _cut_at_stop(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        """Return the text before the first stop string.

        Stop strings that are special tokens are found by their ids, because decoding omits them.
        """
        special = self.tokenizer.convert_tokens_to_ids([s for s in stop if s in self.tokenizer.all_special_tokens])
        before = list(takewhile(lambda token: token not in special, ids))
        return postprocess_generated_text(self.tokenizer.decode(before, skip_special_tokens=True), list(stop), None)


def main() -> None:
    """Run lm_eval's command line with `--model snpatch`. A SnpatchError is one line and exit code 2."""
    try:
        cli_evaluate()
    except SnpatchError as error:
        sys.stderr.write(f"snpatch: error: {error}\n")
        sys.exit(2)


@contextmanager
def _progress_bar(name: str, total: int, disable: bool) -> Iterator[Callable[[int, int], None]]:
    with tqdm(total=total, desc=f"snpatch: {name}", disable=disable) as bar:

        def update(done: int, _total: int) -> None:
            bar.update(done - bar.n)

        yield update


def _to_int(value: Any) -> Any:
    """Convert whole floats, because lm-eval's command line reads -1 as -1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _pop_models(args: dict) -> tuple[dict, dict]:
    """Remove the models from the model arguments.

    Return adapters on the base's weights, and models on secondary weights.
    """
    kinds = []
    for kind in ("adapters", "checkpoint", "lora"):
        sources = args.pop(kind, {})
        if not isinstance(sources, dict):
            sources = parse_adapters(str(sources).split(";"), "+", f"model_args: {kind}", "name=folder+folder;...")
        kinds.append({name: [folders] if isinstance(folders, str) else folders for name, folders in sources.items()})
    return group_models(*kinds)


def _pop_patch(args: dict, shape: Shape) -> Patch | str:
    """Remove the patch from the model arguments and return it, or the model to run unpatched."""
    recipient = str(args.pop("recipient", "base"))
    donor, ranking, k, positions = (args.pop(name, None) for name in ("donor", "ranking", "k", "positions"))
    strength = args.pop("strength", 1.0)
    if donor is None:
        if (ranking, k, positions, strength) != (None, None, None, 1.0):
            raise SnpatchError("model_args: ranking, k, positions and strength need a donor")
        return recipient
    if ranking is None or k is None:
        raise SnpatchError("model_args: a donor needs ranking=FILE and k=")
    positions = "all" if positions is None else str(positions)
    return spec.from_text(recipient, str(donor), ranking, str(k), positions, strength=strength, shape=shape)


def _engine_options(
    batch_size: int | str | None = None, max_batch_size: int | None = None, device: str | None = None
) -> dict:
    """Return lm-eval's options as arguments of Engine, unless they are its defaults (1, auto, cuda:0)."""
    size = str(1 if batch_size is None else batch_size)
    if size.startswith("auto"):
        size = str(max_batch_size or 1)
    if not size.isdigit():
        raise SnpatchError(f"--batch_size: expected a number or auto, got {batch_size!r}")
    options = {} if size == "1" else {"batch_size": int(size)}
    return options if device in (None, "cuda:0") else {**options, "device": device}
