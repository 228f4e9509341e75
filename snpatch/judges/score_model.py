"""ScoreModel: cost and reward models as judges, on either backend. Scores are raw: no sigmoid, no threshold.

Why texts are never truncated: a completion is scored at its last token, so one that does not fit is an error.
"""

import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer

from snpatch.config import DTYPES, check_choice, resolve_backend
from snpatch.errors import SnpatchError, nearest
from snpatch.judges.beavertails import is_beavertails
from snpatch.judges.protocol import check_pairs
from snpatch.judges.refusal import REFUSAL_JUDGE
from snpatch.judges.score_format import EncodedText, ScoreFormat
from snpatch.judges.transformers_scorer import BeavertailsScorer, ClassifierScorer, get_pad_token_id
from snpatch.models.checkpoint import load_config
from snpatch.models.fingerprint import fingerprint_checkpoint, fingerprint_tokenizer
from snpatch.models.pretrained import load_pretrained
from snpatch.utils.hashing import hash_json

INDEPENDENT_PROBLEM_TYPES = ("regression", "multi_label_classification")  # labels do not compete


class ScoreModel:
    """A cost model (lower is safer) or reward model (higher is better) as a judge.

    The score is the only label's raw logit. If there are several labels, it is the log-odds of `label` against the
    others, or its raw logit if the config's problem_type says that labels are independent.

    Other texts, their order and batch_size change a score by less than 1e-4 in float32, and by less than 1 % of the
    scores' spread in bfloat16, where every layer rounds.

    Args:
        model: Folder or hub name, in the Beavertails layout or of any sequence classification model.
        format: See ScoreFormat; None: "beaver" for the Beavertails layout, else "chat" if the tokenizer has a template,
            else "pair".
        label: Name or index of the scored label; required if there are several.
        backend: "vllm", "transformers", or "auto": vLLM if installed and the model has the Beavertails layout.
        dtype: Dtype of the weights; "auto": the checkpoint's own.
        batch_size: Maximum number of texts per batch.
        arguments: Further arguments of the scorer: see BeavertailsScorer, ClassifierScorer (device, padding_side) and
            VllmScorer (vLLM's engine arguments).

    Raises:
        SnpatchError: The model cannot be loaded, or an argument is invalid.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        format: str | None = None,
        label: str | int | None = None,
        backend: str = "auto",
        dtype: str = "auto",
        batch_size: int | None = None,
        **arguments,
    ) -> None:
        check_choice("dtype", dtype, DTYPES)
        if batch_size is not None and batch_size < 1:
            raise SnpatchError(f"batch_size: expected at least 1, got {batch_size}")
        _check_spelling(model)
        config = load_config(model, allow_untested=True)
        is_beaver = is_beavertails(config)
        self.backend = resolve_backend("transformers" if backend == "auto" and not is_beaver else backend)
        tokenizer = load_pretrained(AutoTokenizer, model)
        default = "beaver" if is_beaver else "chat" if tokenizer.chat_template else "pair"
        self._format = ScoreFormat(format or default, tokenizer)
        self._identity = model, [fingerprint_tokenizer(tokenizer), format or default, label, dtype, self.backend]
        self._label = _find_label(model, ["score"] if is_beaver else list((config.id2label or {}).values()), label)
        self._is_independent = config.problem_type in INDEPENDENT_PROBLEM_TYPES
        padding = get_pad_token_id(config)
        # A Beavertails model scores the last token; transformers' decoders score the last one before padding.
        self._padding = None if is_beaver else padding
        self._vocab_size, self.context = config.get_text_config().vocab_size, _max_tokens(config, tokenizer)
        if self.backend == "vllm":
            from snpatch.judges.vllm_scorer import VllmScorer as Scorer

            arguments = {"max_model_len": self.context, **arguments}
            self.context = min(self.context, arguments["max_model_len"])
        else:
            Scorer = BeavertailsScorer if is_beaver else ClassifierScorer
            unknown = arguments.keys() - inspect.signature(Scorer).parameters.keys()
            if unknown:
                raise SnpatchError(f"judge {model}: {Scorer.__name__} has no argument {', '.join(sorted(unknown))}")
        self._scorer = Scorer(model, config, dtype=dtype, batch_size=batch_size, **arguments)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Return the score of each completion, in order.

        Args:
            prompts: Prompts, as strings.
            completions: Completions, one per prompt.

        Returns:
            One score per completion.

        Raises:
            SnpatchError: Prompts and completions differ in number, or a text is longer than `context` tokens.
        """
        check_pairs(prompts, completions)
        if self._scorer is None:
            raise SnpatchError("judge: expected an open judge, got a closed one")
        rows = [
            self._trim_padding(*pair) for pair in zip(prompts, self._format.encode(prompts, completions), strict=True)
        ]
        return self._select_label(self._scorer.score(rows)).tolist() if rows else []

    @cached_property
    def fingerprint(self) -> str:
        """Return the content hash of model and settings; scores are stored under it."""
        model, parts = self._identity
        return hash_json([fingerprint_checkpoint(model), *parts])

    def text(self, prompt: str, completion: str) -> str:
        """Return the scored string, without the tokens that the tokenizer adds."""
        return self._format.text(prompt, completion)

    def close(self) -> None:
        """Free the model; the judge cannot be used afterwards. `with ScoreModel(...)` closes it, too."""
        scorer, self._scorer = self._scorer, None
        if scorer is not None:
            scorer.close()

    def __enter__(self) -> "ScoreModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _trim_padding(self, prompt: str, row: EncodedText) -> EncodedText:
        """Return the row up to the token that is scored; raise a SnpatchError if it is empty or too long."""
        n = len(row["input_ids"])
        while n and row["input_ids"][n - 1] == self._padding:
            n -= 1
        if not 1 <= n <= self.context:
            raise SnpatchError(
                f"judge: expected a text of 1 to {self.context} tokens, got {n} with the prompt {prompt[:80]!r}"
            )
        if max(row["input_ids"]) >= self._vocab_size:
            raise SnpatchError(
                f"judge: its tokenizer made token {max(row['input_ids'])}, its model knows {self._vocab_size} tokens"
            )
        return {name: ids[:n] for name, ids in row.items()}

    def _select_label(self, logits: Tensor) -> Tensor:
        """Return the scores [n] of the label from logits [n, labels]."""
        logit = logits[:, self._label]
        if logits.shape[1] == 1 or self._is_independent:
            return logit
        others = [i for i in range(logits.shape[1]) if i != self._label]
        return logit - logits[:, others].logsumexp(1)


def _check_spelling(model: str | Path) -> None:
    """Raise a SnpatchError for a misspelled folder or judge name.

    Otherwise it would be looked up on the hub for a long time. name@revision is always a hub name.
    """
    path = Path(model)
    if path.exists() or "@" in path.name:
        return
    folders = [config.parent.name for config in path.parent.glob("*/config.json")]
    judges = [REFUSAL_JUDGE] if len(path.parts) == 1 else []
    if near := nearest(path.name, folders + judges):
        raise SnpatchError(
            f"judge {model}: no such folder. Did you mean {path.with_name(near[0])}? For the hub use {model}@main."
        )


def _find_label(model: str | Path, names: list[str], label: str | int | None) -> int:
    """Return the index of the label to score."""
    if label is None and len(names) == 1:
        return 0
    if label in names:
        return names.index(label)
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    raise SnpatchError(f"judge {model}: label: expected one of {', '.join(names)} or an index, got {label!r}")


def _max_tokens(config, tokenizer) -> int:
    """Return the maximum number of tokens.

    Tokenizers of rotary models often state a training setting, not a limit.
    """
    text = config.get_text_config()
    if getattr(text, "rope_parameters", None):
        return text.max_position_embeddings
    return min(text.max_position_embeddings, tokenizer.model_max_length)
