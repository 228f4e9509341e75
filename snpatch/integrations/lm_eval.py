"""lm-evaluation-harness on a patched model: its model class `snpatch`, and its command line with that class known.

Why log-likelihoods are asked as prompt and completion: what positions="completion" names is then the text that a task
scores, so a patch covers the same positions whether an answer is written or only read.
"""

import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile

from snpatch.config import group_models, parse_adapters, parse_json_object
from snpatch.engine import Engine
from snpatch.errors import SnpatchError
from snpatch.models.checkpoint import load_model_shape
from snpatch.models.templates import Chat
from snpatch.patching import spec
from snpatch.patching.patch import Patch
from snpatch.ranking.reading import Shape
from snpatch.sampling import Sampling

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
    from tqdm import tqdm
except ImportError as error:
    raise ImportError("evaluation needs more packages: pip install 'snpatch[eval]'") from error

MAX_GEN_TOKS = 256  # lm-eval's own default
SAMPLING = ("top_p", "top_k", "min_tokens", "ignore_eos", "seed")  # of gen_kwargs; the rest is vLLM's own


@register_model("snpatch")
class SnpatchLM(TemplateLM):
    """A model of an engine, patched or not, as lm-evaluation-harness runs it: `simple_evaluate(SnpatchLM(...), ...)`.

    patch: a Patch, or the name of a model to run unpatched. max_gen_toks: most new tokens where a task says nothing.
    A prompt longer than the context loses its beginning, and a warning says how many did.
    """

    def __init__(self, engine: Engine, patch: Patch | str = "base", max_gen_toks: int = MAX_GEN_TOKS) -> None:
        super().__init__()
        self.engine, self.patch, self.max_gen_toks = engine, patch, max_gen_toks
        self._template = engine.requests.template(patch if isinstance(patch, str) else patch.recipient)
        self.tokenizer, self.max_length = self._template.tokenizer, engine.geometry.context

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "SnpatchLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "SnpatchLM":
        """From `--model_args`: model=FOLDER, and as many of these as are wanted.

        adapters=sft=SFT;dpo=SFT+DPO (name=folder, folders stacked in order; or a dict), checkpoint=dpo=CHECKPOINT and
        lora=dpo=LORA (models on a second set of weights, as adapters are given), recipient (default: base);
        donor (a model, zero, mean:recipient, mean:donor, noise:N or scale:F), ranking (a file), k (or LO:HI),
        positions, strength; max_gen_toks; chat_template_kwargs (JSON, as {"enable_thinking": false}, or a dict);
        and any argument of Engine: backend, template, dtype, tensor_parallel_size, ...
        lm-eval's --batch_size and --device are the engine's, too, but for their defaults, which mean the engine's own.
        """
        given = {name: _whole(value) for name, value in arg_dict.items() if value is not None}
        if "model" not in given:
            raise SnpatchError("model_args: model=FOLDER is missing")
        model, (adapters, models) = str(given.pop("model")), _models(given)
        if isinstance(given.get("chat_template_kwargs"), str):
            given["chat_template_kwargs"] = parse_json_object(
                given["chat_template_kwargs"], "model_args: chat_template_kwargs"
            )
        shape = partial(load_model_shape, model, bool(given.get("allow_untested")))
        patch, max_gen_toks = _patch(given, shape), given.pop("max_gen_toks", MAX_GEN_TOKS)
        engine = Engine(model, adapters, models=models, **{**_placed(**(additional_config or {})), **given})
        made = cls(engine, patch, max_gen_toks)
        weakref.finalize(made, engine.close)
        return made

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS where the tokenizer has it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids; None: special tokens as the tokenizer adds them, but no second BOS after a chat template's."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """Sum of each continuation's log-probabilities, and whether greedy decoding could write it."""
        continuations = [continuation for _, _, continuation in requests]
        contexts = self._cut([context for _, context, _ in requests], list(map(len, continuations)))
        with _bar("log-likelihoods", len(requests), disable_tqdm) as progress:
            found = self.engine.logprobs(contexts, self.patch, progress, completions=continuations)
        return [(one.values.double().sum().item(), bool(one.is_greedy.all())) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text after the prefix token, in windows that score every token once."""
        windows = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, context_len=1)
            windows.append([(None, *make_disjoint_window(window)) for window in cut])
        scored = [one for text in windows for one in text]
        found = iter(self._loglikelihood_tokens(scored, disable_tqdm) if scored else ())
        return [sum(next(found)[0] for _ in text) for text in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """A text for each context, up to the first of its `until` strings."""
        contexts, asked = zip(*(request.args for request in requests), strict=True)
        samplings = [self._sampling(gen_kwargs) for gen_kwargs in asked]
        encoded = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        prompts = self._cut(encoded, [sampling.max_tokens for sampling in samplings])
        with _bar("texts", len(requests), disable_tqdm) as progress:
            completions = self.engine.generate(prompts, self.patch, samplings, progress)
        return [self._until(c.token_ids, s.stop) for c, s in zip(completions, samplings, strict=True)]

    def apply_chat_template(self, chat_history: Chat, add_generation_prompt: bool = True) -> str:
        """The recipient's template; without a generation prompt the last message is one that goes on."""
        return self._template.render(chat_history, continue_final_message=not add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What lm-eval's records say of the template."""
        if isinstance(chat_template, str):
            raise SnpatchError(f"--apply_chat_template takes no name, got {chat_template!r}: choose by template=")
        return "tulu" if self._template.name == "tulu" else self._template.source

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of prompts goes by."""
        return f"{self.tokenizer.name_or_path}--{self._template.name}-{self._template.fingerprint}".replace("/", "__")

    def get_model_info(self) -> dict:
        """What lm-eval's results say of the model: the patch, and the content of the models that it names."""
        patch = spec.to_json(self.patch) if isinstance(self.patch, Patch) else {"recipient": self.patch}
        names = [patch[side] for side in ("recipient", "donor") if isinstance(patch.get(side), str)]
        models = {name: self.engine.fingerprint(name) for name in names}
        return {"backend": self.engine.backend, "models": models, "patch": patch}

    def _cut(self, prompts: Sequence[list[int]], rooms: Sequence[int]) -> list[list[int]]:
        """The ends of the prompts that leave so much room in the context."""
        most = max(rooms)
        if most >= self.max_length:
            raise SnpatchError(
                f"{most} tokens after a prompt, and the model's context holds {self.max_length}: a task's "
                "max_gen_toks can be set by --gen_kwargs"
            )
        kept = [ids[-(self.max_length - room) :] for ids, room in zip(prompts, rooms, strict=True)]
        if n := sum(len(ids) < len(whole) for ids, whole in zip(kept, prompts, strict=True)):
            logging.getLogger(__name__).warning(
                "%d of %d prompts lost their beginning: the context holds %d tokens", n, len(prompts), self.max_length
            )
        return kept

    def _sampling(self, gen_kwargs: dict) -> Sampling:
        """lm-eval's generation arguments, by its rules for their many names; greedy unless told otherwise."""
        asked = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        stop, most, is_sampled = (asked.pop(name) for name in ("until", "max_gen_toks", "do_sample"))
        temperature = asked.pop("temperature", 1.0 if is_sampled else 0.0)
        own = {name: _whole(asked.pop(name)) for name in SAMPLING if name in asked}
        return Sampling(temperature=temperature, max_tokens=most, stop=tuple(filter(None, stop)), **own, vllm=asked)

    def _until(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        """The text before the first stop string, among them special tokens, which no decoded text shows."""
        special = self.tokenizer.convert_tokens_to_ids([s for s in stop if s in self.tokenizer.all_special_tokens])
        before = list(takewhile(lambda token: token not in special, ids))
        return postprocess_generated_text(self.tokenizer.decode(before, skip_special_tokens=True), list(stop), None)


def main() -> None:
    """`lm_eval`'s command line, which knows `--model snpatch`. A SnpatchError is one line and exit code 2."""
    try:
        cli_evaluate()
    except SnpatchError as error:
        print(f"snpatch: error: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def _bar(name: str, total: int, disable: bool) -> Iterator[Callable[[int, int], None]]:
    with tqdm(total=total, desc=f"snpatch: {name}", disable=disable) as bar:
        yield lambda done, _total: bar.update(done - bar.n)


def _whole(value: object) -> object:
    """lm-eval's command line reads -1 as -1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _models(given: dict) -> tuple[dict, dict]:
    """Takes what stands on the model's own weights, and the models that have others, out of the model arguments."""
    kinds = []
    for kind in ("adapters", "checkpoint", "lora"):
        named = given.pop(kind, {})
        if not isinstance(named, dict):
            named = parse_adapters(str(named).split(";"), "+", f"model_args: {kind}", "name=folder+folder;...")
        kinds.append({name: [folders] if isinstance(folders, str) else folders for name, folders in named.items()})
    return group_models(*kinds)


def _patch(given: dict, shape: Shape) -> Patch | str:
    """Takes what makes a patch out of the model arguments."""
    recipient = str(given.pop("recipient", "base"))
    donor, ranking, k, positions = (given.pop(name, None) for name in ("donor", "ranking", "k", "positions"))
    strength = given.pop("strength", 1.0)
    if donor is None:
        if (ranking, k, positions, strength) != (None, None, None, 1.0):
            raise SnpatchError("model_args: ranking, k, positions and strength need a donor")
        return recipient
    if ranking is None or k is None:
        raise SnpatchError("model_args: a donor needs ranking=FILE and k=")
    chosen = "all" if positions is None else str(positions)
    return spec.from_text(recipient, str(donor), ranking, str(k), chosen, strength=strength, shape=shape)


def _placed(batch_size: int | str | None = None, max_batch_size: int | None = None, device: str | None = None) -> dict:
    """lm-eval's own options as arguments of Engine, where they are not its defaults: 1, auto, cuda:0."""
    most = str(1 if batch_size is None else batch_size)
    if most.startswith("auto"):
        most = str(max_batch_size or 1)
    if not most.isdigit():
        raise SnpatchError(f"--batch_size must be a number or auto, got {batch_size!r}")
    return ({} if most == "1" else {"batch_size": int(most)}) | (
        {} if device in (None, "cuda:0") else {"device": device}
    )
