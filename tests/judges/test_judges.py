"""Beavertails checkpoints in every layout, against a forward pass written out here; judges of any kind."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from judged import BROKEN, COMPLETIONS, PROMPTS, all_by_hand, by_hand, open_score_model, write
from tokenizers import pre_tokenizers, processors

from snpatch.errors import SnpatchError
from snpatch.judges.factory import open_judge
from snpatch.judges.protocol import BrokenJudgeError, score_all
from snpatch.judges.refusal import REFUSAL_PHRASES, RefusalWords
from snpatch.judges.run_on import cut_run_on
from snpatch.judges.score_format import ScoreFormat


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normalize", [None, False, True])
@pytest.mark.parametrize("architecture", ["LlamaModelForScore", "LlamaForScore"])
def test_beavertails_scores_equal_reference_forward_pass(tmp_path, bias, normalize, architecture):
    tensors = write(tmp_path, bias=bias, normalize=normalize, architecture=architecture)
    expected = all_by_hand(tensors, normalize=bool(normalize))
    for side in ("right", "left"):
        scores = open_score_model(tmp_path, batch_size=3, padding_side=side)(PROMPTS, COMPLETIONS)
        assert scores == pytest.approx(expected, abs=1e-4)
        assert all(type(value) is float for value in scores)


@pytest.mark.parametrize("side", ["right", "left"])
def test_bfloat16_scores_are_close_with_float32_head(tmp_path, side):
    tensors = write(tmp_path, bias=True)
    expected = all_by_hand(tensors)
    spread = max(expected) - min(expected)
    judge = open_score_model(tmp_path, dtype="bfloat16", padding_side=side)
    scores = judge(PROMPTS, COMPLETIONS)
    assert scores == pytest.approx(expected, abs=0.05 * spread)
    assert scores != torch.tensor(scores).bfloat16().tolist(), "the head is in float32"
    single_scores = [judge([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert single_scores == pytest.approx(scores, abs=0.01 * spread)


@pytest.mark.parametrize("files", ["bin", "sharded bin", "sharded safetensors"])
def test_checkpoint_layouts_give_same_costs(tmp_path, files):
    write(tmp_path / "one")
    write(tmp_path / "other", files=files)
    expected = open_score_model(tmp_path / "one")(PROMPTS, COMPLETIONS)
    assert open_score_model(tmp_path / "other")(PROMPTS, COMPLETIONS) == expected


def test_tulu_format_strips_special_tokens_and_second_user_turn(tmp_path):
    tensors = write(tmp_path)
    judge = open_score_model(tmp_path, format="tulu")
    assert judge.text("a b", "c d</s><pad>") == "<|user|>\na b\n<|assistant|>\nc d"
    scores = score_all({"cost": judge}, ["a b", "d d"], ["c d</s>", "a <|user|> b"])["cost"]
    texts = ["<|user|> a b <|assistant|> c d", "<|user|> d d <|assistant|> a"]
    assert scores == pytest.approx([by_hand(tensors, text) for text in texts], abs=1e-4)


@pytest.mark.parametrize("adds_eos", [False, True])
def test_beaver_format_ends_with_one_eos(adds_eos):
    tokenizer = tiny.tokenizer()
    if adds_eos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", tiny.BOS), ("</s>", tiny.EOS)]
        )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    (row,) = ScoreFormat("beaver", tokenizer).encode(["bala"], ["bama "])
    assert row["input_ids"].count(tiny.EOS) == 1
    assert row["input_ids"][-1] == tiny.EOS
    tokenizer.eos_token = None
    with pytest.raises(SnpatchError, match="format beaver: its text ends with EOS, and the judge's tokenizer has none"):
        ScoreFormat("beaver", tokenizer)


def test_scores_do_not_depend_on_order_or_batch_size(tmp_path):
    write(tmp_path)
    single_scores, batch_scores = (open_score_model(tmp_path, batch_size=b)(PROMPTS, COMPLETIONS) for b in (1, 16))
    assert single_scores == pytest.approx(batch_scores, abs=1e-5)
    assert open_score_model(tmp_path)(PROMPTS[::-1], COMPLETIONS[::-1])[::-1] == pytest.approx(single_scores, abs=1e-5)
    assert open_score_model(tmp_path)([], []) == []


def test_old_checkpoints_with_rotary_buffers_are_accepted(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write(tmp_path / "old", **{name: torch.ones(4)})
    write(tmp_path / "new")
    assert open_score_model(tmp_path / "old")(["a"], ["b"]) == open_score_model(tmp_path / "new")(["a"], ["b"])


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_invalid_checkpoint_raises_one_line_error(tmp_path, changes, message):
    write(tmp_path, **changes)
    with pytest.raises(SnpatchError, match=message) as caught:
        open_score_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_folder_without_score_model_is_rejected(tmp_path):
    with pytest.raises(SnpatchError, match="no such folder"):
        open_score_model(tmp_path / "nowhere")
    write(tmp_path / "causal", architecture="LlamaForCausalLM", **{"score_head.weight": None})
    with pytest.raises(SnpatchError, match=r"a LlamaForSequenceClassification, got none for score\.weight"):
        open_score_model(tmp_path / "causal", label=0)
    write(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    with pytest.raises(SnpatchError, match="no weights there"):
        open_score_model(tmp_path / "empty")
    write(tmp_path / "half", files="sharded safetensors")
    (tmp_path / "half" / "part1.safetensors").unlink()
    with pytest.raises(SnpatchError, match=r"files that are not there: \['part1.safetensors'\]"):
        open_score_model(tmp_path / "half")
    (tmp_path / "half" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(SnpatchError, match="not an index of weights"):
        open_score_model(tmp_path / "half")
    write(tmp_path / "unnormalised", normalize=True, **{"normalizer.var": None})
    with pytest.raises(SnpatchError, match="do_normalize"):
        open_score_model(tmp_path / "unnormalised")
    write(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(SnpatchError, match="cannot be read"):
        open_score_model(tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_text("{")
    with pytest.raises(SnpatchError, match="cannot load"):
        open_score_model(tmp_path / "cut")


def test_checkpoint_with_code_is_rejected(tmp_path):
    write(tmp_path, files="bin")
    torch.save({"score_head.weight": Path("anything but a tensor")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SnpatchError, match="cannot be read"):
        open_score_model(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "alpaca"}, "format: expected beaver, tulu, chat, pair or a text with {prompt} and {completion}"),
        ({"format": "{prompt} alone"}, "format: expected"),
        ({"format": "chat"}, "no chat template"),
        ({"label": "harm"}, "label: expected one of score or an index, got 'harm'"),
        ({"padding_side": "middle"}, "padding_side: expected right or left"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"backend": "onnx"}, "backend: expected one of"),
        ({"max_num_seqs": 4}, "BeavertailsScorer has no argument max_num_seqs"),
    ],
)
def test_invalid_arguments_are_rejected(tmp_path, arguments, message):
    write(tmp_path)
    with pytest.raises(SnpatchError, match=message):
        open_score_model(tmp_path, **arguments)


def test_unscorable_texts_are_rejected(tmp_path):
    write(tmp_path)
    with open_score_model(tmp_path) as judge:
        with pytest.raises(SnpatchError, match="one completion a prompt"):
            judge(["a"], [])
        with pytest.raises(SnpatchError, match="expected a text of 1 to 64 tokens, got 109 with the prompt 'a b'"):
            judge(["a b"], ["c " * 100])
    with pytest.raises(SnpatchError, match="expected an open judge, got a closed one"):
        judge(["a"], ["b"])


def test_prompt_may_contain_format_slots(tmp_path):
    write(tmp_path)
    judge = open_score_model(tmp_path, format="a {prompt} b {completion} c")
    assert judge.text("{completion}", "d") == "a {completion} b d c"


def test_refusal_words_score_refusals_negative():
    assert RefusalWords()(["x"] * 2, ["I'm sorry, but no.", "Sure!"]) == [-1.0, 1.0]
    judge = RefusalWords(["i can not", re.compile(r"^no\b")])
    assert judge(["x"] * 4, ["Sorry, I CAN NOT.", "no way", "oh no", ""]) == [-1.0, -1.0, 1.0, 1.0]
    with pytest.raises(SnpatchError, match="a list"):
        RefusalWords("sorry")
    with pytest.raises(SnpatchError, match="one completion a prompt"):
        judge(["x"], [])


MARKS = "\u2018\u2019\u201b\u02bc\u02bb\uff07\u0060\u00b4\u2032\u2035\u055a\ua78c\u275c\u02b9\u1ffd\u1fef\uff40'"
SPACES = "\u00a0\u2002\u2003\u2007\u2009\u200a\u202f\u205f\u3000\u1680\u2028\u2029\u0085\u2800\t\n "
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\ufe0f\u034f"


def is_refusal(text, words=None):
    """Return whether the judge of these words, or its own, takes a text for a refusal."""
    return (RefusalWords() if words is None else RefusalWords(words))(["x"], [text]) == [-1.0]


@pytest.mark.parametrize("phrase", REFUSAL_PHRASES)
def test_refusal_words_match_all_apostrophes_and_spaces(phrase):
    for mark in MARKS:
        for space in SPACES:
            text = phrase.replace("'", mark).replace(" ", space)
            assert is_refusal(f"Well, {text.upper()} do that."), ascii(text)
            assert is_refusal(f"Well, {phrase} do that.", [text]), ascii(text)
    for mark in INVISIBLE:
        assert is_refusal(phrase.replace(" ", f"{mark} "))
        assert is_refusal(phrase.replace(" ", mark))
        assert is_refusal(phrase.replace("a", f"a{mark}").replace("'", f"'{mark}"))


def test_refusal_words_match_all_letter_forms_and_quotation_marks():
    assert is_refusal("\uff29\u3000\uff43\uff41\uff4e\uff4e\uff4f\uff54")  # full width
    assert is_refusal("\U0001d408 \U0001d41c\U0001d41a\U0001d427\u2019\U0001d42d")  # mathematical bold
    for marks in ("\u201c\u201d", "\u201e\u201f", "\u00ab\u00bb", "\uff02\uff02", "\u301d\u301e", '""'):
        assert is_refusal(f"the {marks[0]}no{marks[1]} of it", ['THE "NO"'])
        assert is_refusal('the "no" of it', [f"the {marks[0]}no{marks[1]}"])
    assert is_refusal("un cafe\u0301", ["CAF\u00c9"])


@pytest.mark.parametrize(
    "text",
    [
        "I **cannot** help",
        "I can**not** help",
        "**I cannot** help",
        "I _cannot_ help",
        "__I__ ___cannot___ help",
        "I*can't*",
        "I ~~cannot~~ help",
        "I `can't` help",
        "I can&#39;t help",
        "I can&rsquo;t help",
        "I&nbsp;can&#x27;t help",
        "I <b>cannot</b> help",
        '<span class="x">I</span> <em>can&apos;t</em> help',
        "I can\u00e2\u20ac\u2122t help",
        "I can\u00e2\u0080\u0099t help",
        "I\u00c2\u00a0**can\u00e2\u20ac\u2122t** help",
    ],
)
def test_refusal_words_match_texts_with_markup(text):
    assert is_refusal(text)


def test_refusal_words_keep_bullets_names_and_marks_of_phrases():
    for text in ("things I\n* cannot do", "so I\n - ** cannot", "x = i_cannot_stop", "I &amp; cannot"):
        assert not is_refusal(text), text
    assert is_refusal("so a*b and", ["a*b"])
    assert is_refusal("I can&#39;t", ["can&#39;t"])
    assert is_refusal("**no**", [re.compile(r"^\*\*no")])
    assert is_refusal("**no**", [re.compile(r"^no$")])


def test_refusal_patterns_match_original_and_normalized_text():
    for mark in MARKS:
        assert is_refusal(f"so:\nI can{mark}t", [re.compile(r"^I can't", re.MULTILINE)]), ascii(mark)
        assert is_refusal("so:\nI can't", [re.compile(f"^I can[{mark}]t$", re.MULTILINE)]), ascii(mark)
    assert is_refusal("I can\u2019t", [re.compile("can[\u2018-\u201f]t")])
    assert not is_refusal("I can't", [re.compile("can[\u2018-\u201f]t")])
    assert is_refusal("no\u200bway", [re.compile(r"^no way$")])


def test_refusal_words_do_not_match_other_texts():
    for text in (
        "",
        "Sure, I can.",
        "icant",
        "I, cannot",
        "can`t stop the music",
        "I'm sorted",
        "\u2019\u2019",
        "a" * 10**5,
    ):
        assert not is_refusal(text), text
    assert not is_refusal("Sorrynotsorry", ["sorry not"])


@pytest.mark.parametrize("words", [[b"no"], [""], [" \u200b "], [None], [re.compile(b"no")], "sorry", [], [1]])
def test_refusal_words_of_wrong_type_raise_one_line_error(words):
    with pytest.raises(SnpatchError, match="RefusalWords: ") as caught:
        RefusalWords(words)
    assert "\n" not in str(caught.value)


def test_refusal_fingerprint_depends_on_words_and_not_on_marks():
    assert RefusalWords(["can\u2019t"]).fingerprint == RefusalWords(["can't"]).fingerprint
    assert RefusalWords(["can't"]).fingerprint != RefusalWords(["cant"]).fingerprint
    assert RefusalWords(["no", "never"]).fingerprint == RefusalWords(["never", "no", "no"]).fingerprint


def shout(prompts, completions):
    """Return a judge by import path."""
    return [float(len(text)) for text in completions]


NUMBER = 7


def test_open_judge_builds_each_kind_of_judge(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_judge("refusal"), RefusalWords)
    assert open_judge(f"{__name__}:shout")(["a"], ["bcd"]) == [3.0]
    write(tmp_path / "model")
    expected = open_score_model(tmp_path / "model", format="tulu")(PROMPTS, COMPLETIONS)
    judge = open_judge(str(tmp_path / "model"), format="tulu", backend="transformers", device="cpu")
    assert judge(PROMPTS, COMPLETIONS) == expected
    for spec, arguments, message in (
        ("refusal", {"format": "tulu"}, "judge refusal: expected no format, which only model judges accept"),
        (f"{__name__}:shout", {"dtype": "auto"}, "expected no dtype, which only model judges accept"),
        (f"{__name__}:nothing", {}, "cannot import it"),
        ("no_such_module:judge", {}, "cannot import it"),
        (f"{__name__}:NUMBER", {}, "expected a callable"),
    ):
        with pytest.raises(SnpatchError, match=message):
            open_judge(spec, **arguments)


def test_open_judge_with_misspelled_folder_suggests_similar_one_without_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    write(tmp_path / "judge")
    for spec in ("jugde", str(tmp_path / "jugde")):
        with pytest.raises(SnpatchError, match=f"judge {spec}: no such folder. Did you mean .*judge"):
            open_judge(spec)


def test_open_judge_with_misspelled_name_suggests_refusal_without_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(SnpatchError, match=r"judge refusals: no such folder. Did you mean refusal\? For the hub"):
        open_judge("refusals")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("No.\n<|user|>\nAnd how?\n<|assistant|>\nLike this", "No.\n"),
        ("No.<|im_end|>\n<|im_start|>user\nAnd?", "No.<|im_end|>\n"),
        ("No. <|start_header_id|>user<|end_header_id|> And?", "No. "),
        ("No.<end_of_turn>\n<start_of_turn>user\nAnd?", "No.<end_of_turn>\n"),
        ("No. [INST] And? [/INST] Like this", "No. "),
        ("No.\n\nHuman: And how?\n\nAssistant: Like this", "No."),
        ("No.\nUSER: And how? ASSISTANT: Like this", "No."),
        ("No. USER: And how? ASSISTANT:Like this USER: x ASSISTANT: y", "No."),
        ("No.\n### Instruction:\nGo on", "No."),
        ("Human: And?", ""),
        ("", ""),
        ("A dialogue:\nHuman: hi\nRobot: no. User: x", None),
        ("Set USER: root and HOST: x", None),
        ("The word <|assistant|> and user", None),
    ],
)
def test_run_on_is_cut_at_the_next_user_turn(completion, answer):
    assert cut_run_on(completion) == (completion if answer is None else answer)


def test_score_all_cuts_run_ons_for_every_kind_of_judge(tmp_path):
    write(tmp_path)
    run_on = "a b <|user|> c\n<|assistant|> i cannot"
    with (
        open_score_model(tmp_path) as beaver,
        open_score_model(tmp_path, format="tulu") as tulu,
        open_score_model(tmp_path, format="pair") as pair,
        open_score_model(tmp_path, format="USER: {prompt} ASSISTANT: {completion}") as text,
    ):
        judges = {"beaver": beaver, "tulu": tulu, "pair": pair, "text": text, "words": RefusalWords(), "fn": shout}
        cut, whole = (score_all(judges, ["c"], [completion]) for completion in ("a b ", run_on))
    assert cut == whole
    assert whole["words"] == [1.0], "the refusal is in the invented turn"
    assert whole["fn"] == shout(["c"], ["a b "])


def test_score_all_checks_every_score():
    judges = {"shout": shout, "refusal": RefusalWords()}
    assert score_all(judges, ["x", "y"], ["abc", "i cannot"]) == {"shout": [3.0, 8.0], "refusal": [1.0, -1.0]}
    assert score_all({"numpy": lambda p, c: torch.ones(1).numpy()}, ["x"], ["y"]) == {"numpy": [1.0]}
    for scores, message in (
        ([1.0], "judge 'bad': expected 2 scores, one a completion, got 1"),
        ([1.0, float("nan")], "judge 'bad': expected a finite score, got nan for the prompt 'y'"),
        ([float("inf"), 1.0], "got inf for the prompt 'x'"),
    ):
        with pytest.raises(SnpatchError, match=message):
            score_all({"shout": shout, "bad": lambda p, c, scores=scores: scores}, ["x", "y"], ["a", "b"])
    with pytest.raises(SnpatchError, match="one completion a prompt"):
        score_all(judges, ["x"], [])


@pytest.mark.parametrize(
    "scores",
    [
        {1.0, 2.0},
        {"x": 1.0, "y": 2.0},
        {0: 1.0, 1: 2.0},
        None,
        1.0,
        "12",
        b"12",
        ["1.0", "2.0"],
        ["good", "bad"],
        [True, False],
        torch.tensor([True, False]),
        torch.ones(2).numpy() > 0,
        torch.ones(2, 1),
        torch.ones(2, 1).numpy(),
        torch.tensor(1.0),
        [10**400, 1],
        [10**5000, 1],
        [None, 1.0],
        [[1.0], [2.0]],
        [1j, 2j],
    ],
    ids=lambda value: type(value).__name__,
)
def test_score_all_without_one_number_per_completion_raises(scores):
    with pytest.raises(BrokenJudgeError, match="judge 'bad': expected one number a completion, got ") as caught:
        score_all({"bad": lambda p, c: scores}, ["x", "y"], ["a", "b"])
    assert "\n" not in str(caught.value)


def test_score_all_accepts_all_numbers_and_keeps_errors_of_a_judge():
    def fail(prompts, completions):
        raise ValueError("its own")

    for scores in ((1, 2.0), torch.tensor([1, 2]), torch.tensor([1.0, 2.0]).numpy(), list(torch.tensor([1.0, 2.0]))):
        assert score_all({"good": lambda p, c, s=scores: s}, ["x", "y"], ["a", "b"]) == {"good": [1.0, 2.0]}
    with pytest.raises(ValueError, match="its own"):
        score_all({"bad": fail}, ["x"], ["a"])
