"""Score models: cost and reward models as judges, on either backend. Scores are raw: no sigmoid, no threshold.

Why a text is never cut: a completion is judged at its end, so one that does not fit is an error.
"""

import hashlib
import inspect
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer

from snpatch.config import DTYPES, check_choice, resolve_backend
from snpatch.errors import SnpatchError
from snpatch.judges.beavertails import is_beavertails
from snpatch.judges.protocol import check_pairs
from snpatch.judges.score_format import Row, ScoreFormat
from snpatch.judges.transformers_scorer import BeavertailsScorer, ClassifierScorer, get_pad_token_id
from snpatch.models.checkpoint import load_config
from snpatch.models.fingerprint import fingerprint_checkpoint, fingerprint_tokenizer
from snpatch.models.pretrained import load_pretrained

INDEPENDENT = ("regression", "multi_label_classification")  # problem_type of labels that do not compete


class ScoreModel:
    """A cost model (lower is safer) or reward model (higher is better) as a judge.

    model: folder or hub name, in the Beavertails layout or of any sequence classification model. The score is the one
    label's raw logit; of several labels, `label` (name or index) is scored: by its log-odds against the others, or by
    its raw logit where the config's problem_type says that the labels are independent.
    format: see ScoreText; None: "beaver" for the Beavertails layout, else "chat" if the tokenizer has a template, else
    "pair". backend "auto": vLLM where it is installed, for the Beavertails layout; else transformers. dtype "auto":
    the checkpoint's own. batch_size: most texts of a batch. All other arguments are the scorer's: see
    BeavertailsScorer and ClassifierScorer (device, padding_side) and VllmScorer (vLLM's own engine arguments).

    Other texts, their order and batch_size move a score by less than 1e-4 in float32, and by less than 1 % of the
    scores' spread in bfloat16, where every layer rounds.
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
            raise SnpatchError(f"batch_size must be at least 1, got {batch_size}")
        config = load_config(model, allow_untested=True)
        is_beaver = is_beavertails(config)
        self.backend = resolve_backend("transformers" if backend == "auto" and not is_beaver else backend)
        tokenizer = load_pretrained(AutoTokenizer, model)
        default = "beaver" if is_beaver else "chat" if tokenizer.chat_template else "pair"
        self._text = ScoreFormat(format or default, tokenizer)
        self._named = model, [fingerprint_tokenizer(tokenizer), format or default, label, dtype, self.backend]
        self._label = _label(model, ["score"] if is_beaver else list(config.id2label.values()), label)
        self._is_independent = config.problem_type in INDEPENDENT
        padding = get_pad_token_id(config)
        # A Beavertails text is judged at its last token, transformers' decoders judge before padding.
        self._padding = None if is_beaver else padding
        self._n_words, self.context = config.get_text_config().vocab_size, _context(config, tokenizer)
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
        """The score of each completion as an answer to its prompt, in the given order, as plain floats.

        Raises SnpatchError if the two differ in number, or a text is longer than `context` tokens.
        """
        check_pairs(prompts, completions)
        if self._scorer is None:
            raise SnpatchError("this judge is closed")
        rows = [self._fitted(*pair) for pair in zip(prompts, self._text.rows(prompts, completions), strict=True)]
        return self._values(self._scorer.score(rows)).tolist() if rows else []

    @cached_property
    def fingerprint(self) -> str:
        """Names it by content: its scores can be kept under it."""
        model, parts = self._named
        return hashlib.sha256(json.dumps([fingerprint_checkpoint(model), *parts]).encode()).hexdigest()[:16]

    def text(self, prompt: str, completion: str) -> str:
        """The text that is scored, but for what the tokenizer adds by itself."""
        return self._text.text(prompt, completion)

    def close(self) -> None:
        """Free what the judge holds; it cannot be used afterwards. `with ScoreModel(...)` does it at its end."""
        scorer, self._scorer = self._scorer, None
        if scorer is not None:
            scorer.close()

    def __enter__(self) -> "ScoreModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fitted(self, prompt: str, row: Row) -> Row:
        """The row up to the token where it is judged."""
        n = len(row["input_ids"])
        while n and row["input_ids"][n - 1] == self._padding:
            n -= 1
        if not 1 <= n <= self.context:
            raise SnpatchError(
                f"judge: wanted a text of 1 to {self.context} tokens, got {n} with the prompt {prompt[:80]!r}"
            )
        if max(row["input_ids"]) >= self._n_words:
            raise SnpatchError(
                f"judge: its tokenizer made token {max(row['input_ids'])}, its model knows {self._n_words} tokens"
            )
        return {name: ids[:n] for name, ids in row.items()}

    def _values(self, logits: Tensor) -> Tensor:
        """The label's column of [n, labels]."""
        own = logits[:, self._label]
        if logits.shape[1] == 1 or self._is_independent:
            return own
        others = [i for i in range(logits.shape[1]) if i != self._label]
        return own - logits[:, others].logsumexp(1)


def _label(model: str | Path, names: list[str], label: str | int | None) -> int:
    """The index of the label to score."""
    if label is None and len(names) == 1:
        return 0
    if label in names:
        return names.index(label)
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    raise SnpatchError(f"judge {model}: label must be one of {', '.join(names)} or an index, got {label!r}")


def _context(config, tokenizer) -> int:
    """Most tokens of a text. Rotary models' tokenizers often tell a training setting instead, which is no limit."""
    text = config.get_text_config()
    if getattr(text, "rope_parameters", None):
        return text.max_position_embeddings
    return min(text.max_position_embeddings, tokenizer.model_max_length)
