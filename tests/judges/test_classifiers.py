"""Sequence classification and reward models as judges: a text's score does not depend on its batch."""

import json

import pytest
import torch
from judged import COMPLETIONS, PROMPTS, open_score_model, tokenizer, write_classifier
from transformers import BertTokenizer

from snpatch.errors import SnpatchError

TEMPLATE = "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' </s> ' }}{% endfor %}"


def logits(model, texts: list[str]) -> torch.Tensor:
    """One text at a time, as the models' own instructions have it."""
    with torch.inference_mode():
        rows = [tokenizer()(text)["input_ids"] for text in texts]
        return torch.cat([model(torch.tensor([row])).logits for row in rows])


def fill_template(template: str) -> list[str]:
    return [template.format(prompt=p, completion=c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


@pytest.mark.parametrize("padding", [3, 2, None, -1], ids=["own", "eos", "none", "negative"])
def test_batch_scores_equal_single_scores_with_any_padding(tmp_path, padding):
    """Texts end in </s>, which is the padding of many models, and many have none."""
    model = write_classifier(tmp_path, pad_token_id=None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": padding}))
    template = "<|user|> {prompt} <|assistant|> {completion} </s>"
    model.config.pad_token_id = padding
    expected = logits(model, fill_template(template))[:, 0].tolist()
    for batch_size in (1, 3, 16):
        scores = open_score_model(tmp_path, format=template, batch_size=batch_size)(PROMPTS, COMPLETIONS)
        assert scores == pytest.approx(expected, abs=1e-4)


def test_competing_labels_are_scored_by_log_odds(tmp_path):
    model = write_classifier(tmp_path, id2label={0: "safe", 1: "harm", 2: "odd"})
    template = "{prompt} {completion}"
    expected = logits(model, fill_template(template)).softmax(-1).logit()
    for label, index in (("harm", 1), (1, 1), ("safe", 0), (2, 2)):
        scores = open_score_model(tmp_path, format=template, label=label)(PROMPTS, COMPLETIONS)
        assert scores == pytest.approx(expected[:, index].tolist(), abs=1e-4)
    for label in (None, "good", 3, -1):
        with pytest.raises(SnpatchError, match=r"label: expected one of safe, harm, odd or an index"):
            open_score_model(tmp_path, label=label)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_independent_labels_are_scored_by_raw_logit(tmp_path, kind):
    model = write_classifier(tmp_path, id2label={0: "rude", 1: "threat"}, problem_type=kind)
    scores = open_score_model(tmp_path, format="{prompt} {completion}", label="threat")(PROMPTS, COMPLETIONS)
    assert scores == pytest.approx(logits(model, fill_template("{prompt} {completion}"))[:, 1].tolist(), abs=1e-4)


def test_chat_template_is_default_format(tmp_path):
    model = write_classifier(tmp_path, template=TEMPLATE)
    judge = open_score_model(tmp_path)
    assert judge.text("a b", "c") == "<|user|> a b </s> <|assistant|> c </s> "
    with torch.inference_mode():
        ids = tokenizer()(judge.text("a b", "c"), add_special_tokens=False)["input_ids"]
        expected = model(torch.tensor([ids])).logits.item()
    assert judge(["a b", "d"], ["c", "e e e"])[0] == pytest.approx(expected, abs=1e-4)


def test_pair_format_passes_token_types_to_encoder(tmp_path):
    """Scores of pairs, alone and in batches, equal the model's on the tokenizer's own pair encoding."""
    model = write_classifier(tmp_path, "bert", pad_token_id=0)
    words = BertTokenizer.from_pretrained(tmp_path)
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        inputs = words([prompt], [completion], return_tensors="pt")
        assert {*inputs["token_type_ids"][0].tolist()} == {0, 1}
        with torch.inference_mode():
            expected.append(model(**inputs).logits.item())
    for batch_size in (1, 3):
        assert open_score_model(tmp_path, batch_size=batch_size)(PROMPTS, COMPLETIONS) == pytest.approx(
            expected, abs=1e-4
        )
    with pytest.raises(SnpatchError, match="ClassifierScorer has no argument padding_side"):
        open_score_model(tmp_path, padding_side="left")


def test_models_that_cannot_be_judges_are_rejected(tmp_path):
    write_classifier(
        tmp_path / "longrope", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    )
    with pytest.raises(SnpatchError, match="dynamic rotary positions"):
        open_score_model(tmp_path / "longrope")
    model = write_classifier(tmp_path / "nan")
    with torch.no_grad():
        model.score.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(SnpatchError, match=r"score\.weight holds NaN"):
        open_score_model(tmp_path / "nan")
    config = json.loads((tmp_path / "longrope" / "config.json").read_text())
    (tmp_path / "longrope" / "config.json").write_text(
        json.dumps({**config, "rope_parameters": None, "pad_token_id": 99})
    )
    with pytest.raises(SnpatchError, match=r"pad_token_id: expected 0\.\.15, got 99"):
        open_score_model(tmp_path / "longrope")
    write_classifier(tmp_path / "few words", vocab_size=15)
    with pytest.raises(SnpatchError, match="its tokenizer made token 15, its model knows 15 tokens"):
        open_score_model(tmp_path / "few words")(["a"], ["b e"])
    with pytest.raises(SnpatchError, match="expected a text of 1 to 64 tokens, got 0"):
        write_classifier(tmp_path / "short", template="{{ '' }}")
        open_score_model(tmp_path / "short")(["a"], ["b"])
