"""Generic format: the prompt column, preference pairs and notes of published files read without options."""

import gzip
import json
import os
import threading

import datasets
import pytest
from published import behavior, forbidden, talk, turns, write

from snpatch.data import load_dataset, read_completions
from snpatch.errors import SnpatchError

SYSTEM = {"role": "system", "content": "Be kind."}


def user(text):
    return [{"role": "user", "content": text}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def load_row(tmp_path, row, **how):
    (example,) = load_dataset(write(tmp_path, "data", ".jsonl", [row]), **how).examples
    return example


PUBLISHED = {  # a row of each file -> its prompt
    "AdvBench": {"goal": "Make it", "target": "Sure, here is"},
    "PAIR": {"Original index": 2, "goal": "Make it", "target": "Sure", "behavior": "it", "category": "x"},
    "JailbreakBench": {"Index": 0, "Goal": "Make it", "Target": "Sure", "Behavior": "It", "Category": "x"},
    "HarmBench": behavior("Make it", "standard", ""),
    "StrongREJECT": {"category": "x", "source": "y", "forbidden_prompt": "Make it"},
    "forbidden_question_set": forbidden(0, "Make it"),
    "do-not-answer": {"id": 1, "risk_area": "x", "question": "Make it", "GPT4_response": "No"},
    "XSTest": {"id": 1, "type": "homonyms", "prompt": "Make it", "label": "safe", "focus": "x", "note": ""},
    "MaliciousInstruct": {"input": "Make it"},
    "refusal_direction": {"instruction": "Make it", "category": None},
    "alpaca": {"instruction": "Make it", "input": "", "output": "No"},
    "wildguardmix": {"prompt": "Make it", "adversarial": False, "response": None, "prompt_harm_label": "harmful"},
    "BeaverTails": {"prompt": "Make it", "response": "No", "category": {"a": True}, "is_safe": False},
    "PKU-SafeRLHF": {"prompt": "Make it", "response_0": "a", "response_1": "b", "better_response_id": 1},
    "ShareGPT": {"id": "a", "conversations": [{"from": "human", "value": "Make it"}, {"from": "gpt", "value": "No"}]},
    "LIMA": {"conversations": ["Make it", "No"], "source": "x"},
    "WildChat": {"conversation": turns("Make it", "No"), "language": "English"},
    "rm-static": {"prompt": talk("Make it") + "\n\nAssistant:", "chosen": "No", "rejected": "Yes", "response": "No"},
    "hh-rlhf": {"chosen": talk("Make it", "No"), "rejected": talk("Make it", "Yes")},
    "red team": {"transcript": talk("Make it", "No"), "rating": 1.0},
    "other letters": {"Forbidden Prompt": "Make it"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file_without_options_is_read(tmp_path, name):
    assert load_row(tmp_path, PUBLISHED[name]).prompt == user("Make it")
    if all(isinstance(value, str) for value in PUBLISHED[name].values()):
        assert load_dataset(write(tmp_path, "data", ".csv", [PUBLISHED[name]])).prompts == [user("Make it")]
        assert load_dataset(write(tmp_path, "data", ".parquet", [PUBLISHED[name]])).prompts == [user("Make it")]


def test_second_user_turn_is_ignored_and_noted(tmp_path):
    """MT-bench: the second turn asks about the model's own first answer."""
    data = load_dataset(
        write(tmp_path, "q", ".jsonl", [{"question_id": 81, "category": "x", "turns": ["Write", "Again"]}])
    )
    assert data.prompts == [user("Write")]
    assert data.row_notes == ["ignored in 1 of 1 rows: user turns after the first"]


def test_harmbench_context_is_ignored_and_noted(tmp_path):
    rows = [behavior("Make it", "standard", ""), behavior("Write it", "contextual", "A text")]
    for column in (None, "Behavior"):
        data = load_dataset(write(tmp_path, "h", ".csv", rows), column=column)
        assert data.prompts == [user("Make it"), user("Write it")]
        assert data.row_notes == ["ignored in 1 of 2 rows: ContextString, the context of a prompt"]


def test_row_notes_are_logged_after_the_name(tmp_path, caplog, capsys):
    write(tmp_path, "q", ".jsonl", [{"question_id": 81, "category": "x", "turns": ["Write", "Again"]}])
    load_dataset(tmp_path / "q.jsonl").log_row_notes("my\nset")
    assert caplog.messages == [r"my\nset: ignored in 1 of 1 rows: user turns after the first"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Sum it", "input": "1 2", "output": "3"},
        {"instruction": "Sum it", "context": "1 2", "response": "3"},
        {"question": "Which?", "choices": ["a", "b"], "answer": 0},
        {"system": "Be rude", "question": "Who?", "chosen": "I", "rejected": "You"},
        {"prompt": "Who?", "system_prompt": "Be rude"},
    ],
    ids=lambda row: ",".join(row),
)
def test_column_that_may_belong_to_prompt_is_rejected(tmp_path, row):
    field = next(name for name in ("instruction", "question", "prompt") if name in row)
    with pytest.raises(
        SnpatchError, match=rf"line 1: \w+ may belong to the prompt in {field}. Ignore it with --column {field}"
    ):
        load_row(tmp_path, row)
    assert load_row(tmp_path, row, column=field).prompt == user(row[field])


CONTEXTS = [
    "system", "system_prompt", "system_message", "System Instruction", "systemPrompt", "sys_prompt", "context",
    "contexts", "full_context", "history", "chat_history", "image", "images", "image_url", "img", "audio", "video",
    "passage", "passages", "document", "documents", "supporting_documents", "tools", "tool_calls", "functions",
    "function_call",
]  # fmt: skip


@pytest.mark.parametrize("value", ["x", {"a": 1}, ["x"]])
@pytest.mark.parametrize("name", CONTEXTS)
def test_column_with_context_is_rejected_unless_prompt_is_named(tmp_path, name, value):
    row = {"prompt": "Who?", name: value}
    with pytest.raises(
        SnpatchError, match=f"line 1: {name} may belong to the prompt in prompt. Ignore it with --column"
    ):
        load_row(tmp_path, row)
    data = load_dataset(write(tmp_path, "data", ".jsonl", [row]), column="prompt")
    assert (data.prompts, data.row_notes) == ([user("Who?")], [f"columns that are not used: {name}"])
    for chosen, rejected in ((turns("Q", "A"), turns("Q", "B")), (talk("Q", "A"), talk("Q", "B"))):
        with pytest.raises(SnpatchError, match=f"line 1: {name} may belong to the prompt in chosen. Drop it, or"):
            load_row(tmp_path, {"chosen": chosen, "rejected": rejected, name: value})


@pytest.mark.parametrize("name", CONTEXTS)
def test_column_with_empty_context_is_ignored(tmp_path, name):
    for value in ("", " ", None, [], {}, False, 3):
        data = load_dataset(write(tmp_path, "data", ".jsonl", [{"prompt": "Who?", name: value}]))
        assert (data.prompts, data.row_notes) == ([user("Who?")], [])


def test_context_beside_list_of_rows_is_rejected(tmp_path):
    for rows in (["a", "b"], [{"prompt": "a"}, {"prompt": "b"}]):
        (tmp_path / "p.json").write_text(json.dumps({"system": "Be rude", "prompts": rows}))
        with pytest.raises(SnpatchError, match="item 1: system may belong to the prompt in prompt"):
            load_dataset(tmp_path / "p.json")
        (tmp_path / "p.json").write_text(json.dumps({"version": "1", "prompts": rows}))
        data = load_dataset(tmp_path / "p.json")
        assert (data.prompts, data.row_notes, data.examples[0].meta["version"]) == (AB, [], "1")


def test_unnamed_unused_column_is_noted_as_empty_name(tmp_path):
    (tmp_path / "data.csv").write_text(",prompt\n0,Who?\n")
    assert load_dataset(tmp_path / "data.csv").row_notes == ["columns that are not used: ''"]


def test_unused_columns_are_noted_once(tmp_path):
    rows = [{"prompt": p, "remark": "x", "id": "7", "prompt_category": "y", "score": 0.5, "Extra": None} for p in "ab"]
    rows[1]["Extra"] = {"x": 1}
    data = load_dataset(write(tmp_path, "data", ".jsonl", rows))
    assert data.prompts == AB
    assert data.row_notes == ["columns that are not used: remark, Extra"]
    assert data.source["unused_columns"] == ["remark", "Extra"]
    rows = [{"prompt": "a", "response": "x", "chosen": "x", "rejected": "y", "messages": turns("a", "x")}]
    assert load_dataset(write(tmp_path, "data", ".jsonl", rows)).row_notes == []
    rows = [{"chosen": talk("a", "x"), "rejected": talk("a", "y"), "remark": "x"}]
    assert load_dataset(write(tmp_path, "data", ".jsonl", rows)).row_notes == ["columns that are not used: remark"]


def test_column_error_lists_columns(tmp_path):
    row = {"a": "x", "b": "y"}
    for kind in (".jsonl", ".json", ".csv", ".parquet"):
        path = write(tmp_path, "data", kind, [row])
        with pytest.raises(SnpatchError, match=r"expected .*prompt or messages, got a, b\. Name the prompt's column"):
            load_dataset(path)
        with pytest.raises(SnpatchError, match=r"expected .* goal, got a, b"):
            load_dataset(path, column="goal")
        assert load_dataset(path, column="b").prompts == [user("y")]
    with pytest.raises(SnpatchError, match="one prompt, got goal, question, each of which may be it"):
        load_dataset(write(tmp_path, "two", ".csv", [{"goal": "x", "question": "y"}]))
    with pytest.raises(SnpatchError, match="one prompt, got Prompt, prompt, each"):
        load_row(tmp_path, {"Prompt": "x", "prompt": "y"})


@pytest.mark.parametrize("column", ["prompt", "messages", "conversation", "Frage"])
@pytest.mark.parametrize("indent", [None, 1])
def test_chat_as_json_text_is_read_as_messages(tmp_path, column, indent):
    chat = [SYSTEM, *turns("Q", "A", "R")]
    row = {column: json.dumps(chat, indent=indent), "number": "1"}
    named = column if column == "Frage" else None
    for kind in (".csv", ".jsonl"):
        assert load_dataset(write(tmp_path, "d", kind, [row]), column=named).prompts == [chat]


def test_other_chats_as_json_text_are_read(tmp_path):
    shared = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    for chat in (shared, turns("Q", "A")):
        data = load_dataset(write(tmp_path, "d", ".csv", [{"conversations": json.dumps(chat)}]))
        assert data.conversations() == [{"messages": turns("Q", "A")}]
    pair = {"chosen": json.dumps(turns("Q", "A")), "rejected": json.dumps(turns("Q", "B"))}
    data = load_dataset(write(tmp_path, "d", ".csv", [pair]))
    assert data.pairs() == [{"prompt": user("Q"), "chosen": answer("A"), "rejected": answer("B")}]
    row = {"prompt": "Q", "completion": json.dumps(answer("A"))}
    assert load_dataset(write(tmp_path, "d", ".csv", [row])).conversations() == [{"messages": turns("Q", "A")}]
    assert load_dataset(write(tmp_path, "d", ".csv", [{"turns": '["Q", "R"]'}])).prompts == [user("Q")]
    assert load_dataset(write(tmp_path, "d", ".csv", [{"conversations": '["Q", "A"]'}])).prompts == [user("Q")]


CHAT_TEXTS = {
    "Python": str(turns("Q", "A")),
    "numpy": "[{'content': 'Q', 'role': 'user'}\n {'content': 'A', 'role': 'assistant'}]",
    "array": "array([{'content': 'Q', 'role': 'user'}], dtype=object)",
    "ShareGPT": str([{"from": "human", "value": "Q"}]),
    "cut": json.dumps(turns("Q", "A"))[:-1] + ",]",
    "message": "{'role': 'user', 'content': 'Q'}",
}


@pytest.mark.parametrize("name", CHAT_TEXTS)
def test_chat_as_other_text_is_rejected(tmp_path, name):
    text = CHAT_TEXTS[name]
    for row in ({"prompt": text, "n": "1"}, {"prompt": "Q", "completion": text}, {"chosen": text, "rejected": text}):
        path = write(tmp_path, "d", ".csv", [row])
        with pytest.raises(SnpatchError, match=r"line 2: \w+: expected a text, or messages as JSON, .* json\.dumps"):
            load_dataset(path)
    with pytest.raises(SnpatchError, match=r"line 2: prompt: expected a non-empty string, got \{'role'"):
        load_dataset(write(tmp_path, "d", ".csv", [{"prompt": json.dumps(user("Q")[0])}]))
    with pytest.raises(SnpatchError, match=r"line 2: turns: expected a text, or messages as JSON, got .\['Q', 'R'\]"):
        load_dataset(write(tmp_path, "d", ".csv", [{"turns": "['Q', 'R']"}]))


@pytest.mark.parametrize(
    "text",
    [
        "[1] Who wrote it?",
        "{x} and [y]",
        "[{}]",
        '{"a": 1}',
        "Read [{'role': 'user', 'content': 'x'}] aloud",
        "[INST] a",
    ],
)
def test_text_with_brackets_is_a_prompt(tmp_path, text):
    assert load_dataset(write(tmp_path, "d", ".csv", [{"prompt": text}])).prompts == [user(text)]
    assert load_row(tmp_path, {"prompt": "Q", "output": str(turns("Q"))}).response == str(turns("Q"))


def test_text_file_has_one_prompt_per_line(tmp_path):
    path = tmp_path / "p.TXT"
    path.write_text("Make it\n\n  Do it \n")
    data = load_dataset(path)
    assert data.prompts == [user("Make it"), user("Do it")]
    assert data.row_notes == ["dropped 1 of 3 rows: a blank line"]
    assert data.examples[1].meta["row"] == 3
    (tmp_path / "p.json").write_text('["Make it",\n "Do it"]')
    assert load_dataset(tmp_path / "p.json").prompts == data.prompts


# ---- pairs ----------------------------------------------------------------------------------------------------------


def dialogue(*texts):
    return turns(*texts)


PAIRS = {
    "texts": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "answers as turns": {"prompt": "Q", "chosen": answer("A"), "rejected": answer("B")},
    "UltraFeedback": {"prompt": "Q", "prompt_id": "1", "chosen": turns("Q", "A"), "rejected": turns("Q", "B"),
                      "messages": turns("Q", "A"), "score_chosen": 8.5, "score_rejected": 1.0},
    "TRL with prompt": {"prompt": user("Q"), "chosen": answer("A"), "rejected": answer("B")},
    "TRL implicit": {"chosen": turns("Q", "A"), "rejected": turns("Q", "B")},
    "transcripts": {"chosen": talk("Q", "A"), "rejected": talk("Q", "B")},
    "transcripts with prompt": {"prompt": "Q", "chosen": talk("Q", "A"), "rejected": talk("Q", "B")},
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_published_pairs_are_read(tmp_path, name):
    data = load_dataset(write(tmp_path, "p", ".jsonl", [PAIRS[name]]))
    assert data.prompts == [user("Q")]
    assert data.pairs() == [{"prompt": user("Q"), "chosen": answer("A"), "rejected": answer("B")}]
    assert data.row_notes == []


def test_common_beginning_of_conversations_is_removed_as_in_trl(tmp_path):
    from trl import extract_prompt

    begin = [SYSTEM, *turns("Q", "A", "R")]
    row = {"chosen": begin + answer("C"), "rejected": begin + answer("D")}
    data = load_dataset(write(tmp_path, "p", ".jsonl", [row]))
    assert data.pairs() == [extract_prompt(row)] == [{"prompt": begin, "chosen": answer("C"), "rejected": answer("D")}]
    for prompt, context in (("Q", begin), (begin, begin), (user("Q"), begin)):
        example = load_row(tmp_path, {"prompt": prompt, **row})
        assert example.context == context
    with pytest.raises(SnpatchError, match="line 1: chosen and rejected do not both begin with the prompt"):
        load_row(tmp_path, {"prompt": "another", **row})


@pytest.mark.parametrize(
    ("chosen", "rejected", "why"),
    [
        (turns("Q", "A"), turns("Q", "A"), "both answers are the same"),
        (turns("Q", ""), turns("Q", "A"), "an answer is empty"),
        (turns("Q", "A", "R", "B"), turns("Q", "X", "R", "C"), "the texts differ before the last turn"),
        (turns("Q", "A", "R", "B"), turns("Q", "X"), "the texts differ before the last turn"),
    ],
)
def test_conversations_without_pair_are_counted(tmp_path, chosen, rejected, why):
    rows = [PAIRS["TRL implicit"], {"chosen": chosen, "rejected": rejected}]
    data = load_dataset(write(tmp_path, "p", ".jsonl", rows))
    assert data.prompts == [user("Q")] * 2
    assert data.source["no_pair"] == {why: 1}
    assert dict(data.pairs().dropped) == {why: 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": turns("Q", "A"), "rejected": turns("P", "B")},
            "begin with different turns, and there is no prompt",
        ),
        (
            {"chosen": "A", "rejected": "B"},
            "chosen and rejected: expected conversations that begin with the same prompt",
        ),
        ({"chosen": turns("Q", "A"), "rejected": "B"}, "expected the same form"),
        (
            {"prompt": "Q", "chosen": turns("Q", "A", "R"), "rejected": "B"},
            "chosen: expected a string or one assistant turn",
        ),
        ({"prompt": "P", "chosen": turns("Q", "A"), "rejected": turns("Q", "B")}, "do not both begin with the prompt"),
        ({"prompt": "P", "messages": turns("Q", "A")}, "messages begin with another text than prompt"),
    ],
)
def test_inconsistent_pairs_are_rejected_with_line(tmp_path, row, message):
    with pytest.raises(SnpatchError, match=f"data.jsonl, line 1: .*{message}"):
        load_row(tmp_path, row)


def test_conversation_with_prompt_column_is_used_for_training(tmp_path):
    """ultrachat: prompt is the first question, messages the whole conversation."""
    row = {"prompt": "Q", "prompt_id": "1", "messages": turns("Q", "A", "R", "B")}
    data = load_dataset(write(tmp_path, "u", ".jsonl", [row]))
    assert data.prompts == [user("Q")]
    assert data.conversations() == [{"messages": turns("Q", "A", "R", "B")}]


# ---- rows are counted -----------------------------------------------------------------------------------------------


def test_pairs_without_answer_are_counted(tmp_path):
    rows = [
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "b", "chosen": "x"},
        {"prompt": "c", "chosen": "", "rejected": "y"},
        {"prompt": "d", "chosen": None, "rejected": None},
    ]
    data = load_dataset(write(tmp_path, "p", ".jsonl", rows))
    whys = {"no rejected answer": 1, "no chosen answer": 1, "no chosen and rejected answer": 1}
    assert data.source["no_pair"] == whys
    assert data.row_notes == [f"1 of 4 rows have a prompt and no pair: {why}" for why in whys]
    pairs = data.pairs()
    assert (len(pairs), dict(pairs.dropped), pairs.source["rows"]) == (1, whys, 4)
    with pytest.raises(
        SnpatchError, match=r"has no pairs of a chosen and a rejected answer \(1 rows: no rejected answ"
    ):
        load_dataset(write(tmp_path, "p", ".jsonl", rows[1:])).pairs()


ANSWERS = {
    "response,completion": {"prompt": "p", "response": "x", "completion": "y"},
    "output,answer": {"prompt": "p", "output": "x", "answer": "y"},
    "response,output": {"instruction": "p", "response": "x", "output": "y"},
    "Response,answer": {"question": "p", "Response": "x", "answer": "y"},
    "messages,response": {"messages": turns("p", "x"), "response": "y"},
    "messages,completion": {"prompt": "p", "messages": turns("p", "x"), "completion": answer("y")},
}


@pytest.mark.parametrize("names", ANSWERS)
def test_two_different_answers_are_rejected_naming_both(tmp_path, names):
    row, (first, second) = ANSWERS[names], names.split(",")
    field = next(name for name in ("prompt", "messages", "instruction", "question") if name in row)
    with pytest.raises(
        SnpatchError, match=f"line 1: expected one answer, got ({first}, {second}|{second}, {first}), which differ"
    ) as caught:
        load_row(tmp_path, row)
    assert f"Remove all but one, or read the prompt alone with --column {field}" in str(caught.value)
    data = load_dataset(write(tmp_path, "data", ".jsonl", [row]), column=field)
    assert data.prompts == [user("p")]
    assert data.examples[0].response is None or field != "messages"
    equal = {name: ("x" if name in (second, "answer", "completion") else value) for name, value in row.items()}
    assert load_row(tmp_path, equal).response == "x"


def test_several_answers_of_named_prompt_are_counted(tmp_path):
    rows = [{"prompt": "p", "response": "x", "completion": "y"}, {"prompt": "q", "response": "x"}]
    data = load_dataset(write(tmp_path, "data", ".jsonl", rows), column="prompt")
    reason = "several answers (response, completion)"
    assert data.row_notes == [f"the answer of 1 of 2 rows is not used: {reason}"]
    conversations = data.conversations()
    assert (conversations, dict(conversations.dropped)) == ([{"messages": turns("q", "x")}], {reason: 1})


def test_empty_answer_beside_another_is_ignored(tmp_path):
    for row in ({"prompt": "p", "response": "x", "output": ""}, {"prompt": "p", "response": " ", "output": "x"}):
        assert load_row(tmp_path, row).response == "x"
    assert load_row(tmp_path, {"prompt": "p", "response": "", "completion": None}).response == ""


def test_pair_that_begins_with_assistant_is_rejected_with_remedy(tmp_path):
    good_row, row = (
        {"chosen": talk(*texts, "A"), "rejected": talk(*texts, "B")} for texts in (("Q",), ("Q", "x", "R"))
    )
    for name, value in row.items():
        row[name] = value.removeprefix("\n\nHuman: Q")
    path = write(tmp_path, "p", ".jsonl", [good_row, row])
    message = "line 2: chosen: expected a transcript that begins with 'Human:', got one that begins with 'Assistant:'"
    with pytest.raises(SnpatchError, match=rf"{message}\. Remove .* --format hh-harmless"):
        load_dataset(path)
    assert load_dataset(path, skip_invalid=True).skipped == 1
    assert load_dataset(path, format="hh-harmless").prompts == [user("Q"), user("R")]


def test_pair_of_equal_texts_is_counted(tmp_path):
    rows = [{"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "b", "chosen": "x", "rejected": " x"}]
    data = load_dataset(write(tmp_path, "p", ".jsonl", rows))
    assert data.row_notes == ["1 of 2 rows have a prompt and no pair: both answers are the same"]
    assert dict(data.pairs().dropped) == {"both answers are the same": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "b", "chosen": None, "rejected": "y"}, "no chosen answer"),
        ({"prompt": "b", "chosen": "x", "rejected": None}, "no rejected answer"),
        ({"chosen": turns("b", "x"), "rejected": None}, "no rejected answer"),
        ({"chosen": None, "rejected": turns("b", "x")}, "no chosen answer"),
    ],
)
def test_null_answers_of_pairs_are_counted(tmp_path, row, reason):
    data = load_dataset(write(tmp_path, "p", ".jsonl", [{"prompt": "a", "chosen": "x", "rejected": "y"}, row]))
    assert data.prompts == [user("a"), user("b")]
    assert dict(data.pairs().dropped) == data.source["no_pair"] == {reason: 1}


def test_null_answers_without_prompt_are_rejected_with_line(tmp_path):
    for row in ({"chosen": None, "rejected": None}, {"chosen": talk("a", "b"), "rejected": None}):
        with pytest.raises(SnpatchError, match=r"data\.jsonl, line 1: "):
            load_row(tmp_path, row)


def test_contradictory_rows_are_not_used_and_counted(tmp_path):
    labels = [("a", "x", 1), ("a", "x", 0), ("a", "y", 1), ("b", "x", 1)]
    rows = [{"prompt": p, "completion": c, "label": n} for p, c, n in labels]
    conversations = load_dataset(write(tmp_path, "kto", ".jsonl", rows)).conversations()
    assert conversations == [{"messages": turns("a", "y")}, {"messages": turns("b", "x")}]
    bad = "no answer but one that is labeled bad"
    assert dict(conversations.dropped) == {"another row labels the same answer as bad": 1, bad: 1}
    answers = [("a", "x", "y"), ("a", "y", "x"), ("a", "x", "z"), ("b", "x", "y")]
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in answers]
    pairs = load_dataset(write(tmp_path, "p", ".jsonl", rows)).pairs()
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [(answer("x"), answer(a)) for a in "zy"]
    assert dict(pairs.dropped) == {"another row prefers the other answer": 2}


LABEL_PAIRS = [
    (True, False), ("True", "False"), (" TRUE", "false "), (1, 0), ("1", "0"), (1.0, 0.0), ("1.0", "0.0"),
]  # fmt: skip


@pytest.mark.parametrize("labels", LABEL_PAIRS)
@pytest.mark.parametrize("column", ["label", "Label", "labels"])
@pytest.mark.parametrize("answer_column", ["completion", "response", "output"])
def test_answers_labeled_bad_are_not_used_for_training(tmp_path, labels, column, answer_column):
    """KTO's form."""
    good_row, bad_row = ({"prompt": p, answer_column: c, column: n} for p, c, n in zip("ab", "xy", labels, strict=True))
    rows = [good_row, bad_row, {"prompt": "c"}]
    data = load_dataset(write(tmp_path, "kto", ".jsonl", rows))
    assert data.prompts == [user("a"), user("b"), user("c")]
    conversations = data.conversations()
    assert conversations == [{"messages": turns("a", "x")}]
    assert dict(conversations.dropped) == {"no answer but one that is labeled bad": 1, "no answer": 1}


@pytest.mark.parametrize(
    "label", ["undesirable", "desirable", "safe", "bad", "no", -1, 2, 0.5, None, "", [], float("nan")]
)
def test_answers_with_unknown_label_are_not_used_and_counted(tmp_path, label):
    rows = [{"prompt": "a", "completion": "x", "label": label}, {"prompt": "b", "completion": "y", "label": True}]
    data = load_dataset(write(tmp_path, "kto", ".jsonl", rows))
    assert data.prompts == [user("a"), user("b")]
    reason = "label is not true, false, 1 or 0"
    assert data.row_notes == [f"the answer of 1 of 2 rows is not used: {reason}"]
    conversations = data.conversations()
    assert conversations == [{"messages": turns("b", "y")}]
    assert dict(conversations.dropped) == {reason: 1}
    with pytest.raises(SnpatchError, match=rf"has no responses to train on \(1 rows: {reason}\)"):
        load_dataset(write(tmp_path, "kto", ".jsonl", rows[:1])).conversations()


def test_label_of_prompt_without_answer_is_ignored(tmp_path):
    data = load_dataset(write(tmp_path, "xstest", ".jsonl", [{"prompt": "a", "label": "safe"}]))
    assert (data.prompts, data.row_notes) == ([user("a")], [])


def test_filter_accepts_values_as_json_strings(tmp_path):
    rows = [{"prompt": p, "is_safe": safe, "n": n} for p, safe, n in (("a", True, 1), ("b", False, 2))]
    data = load_dataset(write(tmp_path, "b", ".jsonl", rows))
    assert data.filter("is_safe", "true").prompts == data.filter("n", "1").prompts == [user("a")]
    with pytest.raises(SnpatchError, match="filter: expected one of the columns is_safe, n"):
        data.filter("safe", "true")


def test_labels_are_the_column_of_every_prompt(tmp_path):
    rows = [{"prompt": p, "category": c, "n": n} for p, c, n in (("a", "theft", 1), ("b", "fraud", None))]
    data = load_dataset(write(tmp_path, "b", ".jsonl", rows))
    assert data.labels("category") == ["theft", "fraud"]
    with pytest.raises(SnpatchError, match="labels: expected one of the columns category, n, file, row, got source"):
        data.labels("source")
    with pytest.raises(SnpatchError, match="got n"):
        data.labels("n")


# ---- completions of prompts -----------------------------------------------------------------------------------------


def test_completions_of_other_prompts_are_rejected(tmp_path):
    words = ("one", "two", "three", "four")
    path = write(tmp_path, "c", ".jsonl", [{"prompt": w, "completion": f"answer to {w}"} for w in words])
    chats = [user(w) for w in words]
    assert read_completions(path, None, chats) == [f"answer to {w}" for w in words]
    assert read_completions(path, 2, chats[:2]) == ["answer to one", "answer to two"]
    shifted = [chats[0], *chats[2:]]
    with pytest.raises(
        SnpatchError, match=r"c\.jsonl, line 2: expected the completion of the prompt 'three', .* 'two'"
    ):
        read_completions(path, 3, shifted)
    with pytest.raises(SnpatchError, match=r"c\.jsonl: expected one completion for each of 3 prompts, got 4"):
        read_completions(path, None, chats[:3])
    with pytest.raises(SnpatchError, match="expected one completion for each of 5 prompts, got 4"):
        read_completions(path, None, [*chats, user("five")])


def test_completions_of_conversations_are_compared_by_messages(tmp_path):
    chat = turns("Q", "A", "R")
    for row in (
        {"messages": chat, "completion": "B"},
        {"messages": [*chat, *answer("B")], "completion": "B"},
        {"prompt": "R", "completion": "B"},  # as `snpatch generate` writes it
        {"prompt": chat, "completion": "B"},
        {"prompt": talk("Q", "A", "R"), "completion": "B"},
        {"completion": "B"},
    ):
        assert read_completions(write(tmp_path, "c", ".jsonl", [row]), None, [chat]) == ["B"]
    for row in ({"prompt": "Q", "completion": "B"}, {"messages": turns("Q", "X", "R"), "completion": "B"}):
        with pytest.raises(SnpatchError, match="line 1: expected the completion of the prompt 'R'"):
            read_completions(write(tmp_path, "c", ".jsonl", [row]), None, [chat])
    with pytest.raises(SnpatchError, match="line 1: prompt: expected a non-empty string, got 7"):
        read_completions(write(tmp_path, "c", ".jsonl", [{"prompt": 7, "completion": "B"}]), None, [chat])


@pytest.mark.parametrize("column", ["prompt_text", "text", "user", "Frage"])
def test_completions_are_compared_by_given_column(tmp_path, caplog, column):
    chats = [user("one"), user("two")]
    path = write(tmp_path, "c", ".jsonl", [{column: w, "completion": f"re {w}"} for w in ("one", "two")])
    assert read_completions(path, None, chats, column) == ["re one", "re two"]
    assert caplog.messages == []
    with pytest.raises(
        SnpatchError, match=r"c\.jsonl, line 1: expected the completion of the prompt 'two', got that of 'o"
    ):
        read_completions(path, None, chats[::-1], column)
    path = write(tmp_path, "c", ".jsonl", [{"prompt": w, "completion": f"re {w}"} for w in ("one", "two")])
    with pytest.raises(SnpatchError, match="line 1: expected the completion of the prompt 'two', got that of 'one'"):
        read_completions(path, None, chats[::-1], column)


def test_completions_that_name_no_prompt_are_paired_by_position_with_warning(tmp_path, caplog):
    rows = [{"prompt": "one", "completion": "1"}, {"text": "x", "completion": "2"}]
    assert read_completions(write(tmp_path, "c", ".jsonl", rows), None, [user("one"), user("two")]) == ["1", "2"]
    (message,) = caplog.messages
    assert message.endswith(
        "1 of 2 rows name no prompt (columns: text, completion): they are paired with the prompts by position"
    )
    assert read_completions(tmp_path / "c.jsonl") == ["1", "2"]
    assert len(caplog.messages) == 1


# ---- files ----------------------------------------------------------------------------------------------------------

LINES = b'{"prompt": "a"}\n{"prompt": "b"}\n'
AB = [user("a"), user("b")]


@pytest.mark.parametrize("content", [LINES, json.dumps([{"prompt": "a"}, {"prompt": "b"}]).encode(), b"prompt\na\nb\n"])
def test_pipe_is_read(tmp_path, content):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(content,))
    writer.start()
    assert load_dataset(path).prompts == AB
    writer.join()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.JSONL", LINES),
        ("p.CSV", b"prompt\na\nb\n"),
        ("p.JSONL.GZ", gzip.compress(LINES)),
        ("p.json", json.dumps({"data": [{"prompt": "a"}, {"prompt": "b"}]}).encode()),
        ("p.json", json.dumps({"version": "1", "rows": [{"prompt": "a"}, {"prompt": "b"}]}, indent=2).encode()),
        ("p.json", json.dumps({"prompts": ["a", "b"]}).encode()),
    ],
)
def test_json_files_of_other_shapes_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert load_dataset(tmp_path / name).prompts == AB


TABLES = {
    "texts": {"prompt": ["a", "b"], "id": [1, 2]},
    "AdvBench": {"goal": ["a", "b"], "target": ["x", "y"]},
    "one row": {"prompt": ["a"]},
    "pairs": {"prompt": ["a", "b"], "chosen": ["x", "y"], "rejected": ["v", "w"]},
    "chats": {"messages": [user("a"), user("b")], "id": [1, 2]},
    "turns": {"turns": ["a", "b"], "id": [1, 2]},
    "objects": {"prompt": ["a", "b"], "meta": [{"x": 1}, {"x": 2}]},
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("name", TABLES)
def test_json_table_of_columns_gives_one_row_per_item(tmp_path, name, suffix, indent):
    path = tmp_path / f"p{suffix}"
    path.write_text(json.dumps(TABLES[name], indent=indent))
    data = load_dataset(path)
    assert data.prompts == (AB if len(next(iter(TABLES[name].values()))) > 1 else AB[:1])
    assert data.source["rows"] == len(data)


def test_json_table_of_named_column_and_named_format_is_read(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"text": ["a", "b"], "id": [1, 2]}))
    assert load_dataset(tmp_path / "p.json", column="text").prompts == AB
    (tmp_path / "p.json").write_text(json.dumps({"question": ["a", "b"]}))
    assert load_dataset(tmp_path / "p.json", format="jailbreak-llms").prompts == AB


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"prompt": ["a", "b"], "id": [1]}, r"p\.json: expected columns of one length, got 2 of prompt, 1 of"),
        ({"prompt": ["a", "b"], "source": "x"}, "1: prompt: expected a text or messages, got a list of texts"),
        ({"prompt": ["a", None]}, "item 2: prompt: expected a non-empty string, got None"),
        ({"prompt": [["a", "b"]]}, "item 1: prompt: expected a text or messages, got a list of texts"),
        ({"prompt": {"0": "a", "1": "b"}, "id": {"0": 1, "1": 2}}, "prompt: expected a non-empty string, got {'0'"),
        ({"0": {"prompt": "a"}, "1": {"prompt": "b"}}, "expected an object with prompt or messages, got 0, 1"),
        ({"columns": ["prompt"], "index": [0, 1], "data": [["a"], ["b"]]}, "got columns, index, data"),
        ({"columns": ["prompt"], "data": [["a"], ["b"]]}, "prompt or messages, got columns, data"),
        ({"columns": ["prompt"], "index": [], "data": []}, "prompt or messages, got columns, index, data"),
        ({"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}, "prompt or messages, got train, test"),
        ([{"prompt": ["a", "b"]}], "item 1: prompt: expected a text or messages, got a list of texts"),
    ],
)  # fmt: skip
def test_json_table_of_other_shape_is_rejected(tmp_path, table, message):
    (tmp_path / "p.json").write_text(json.dumps(table))
    with pytest.raises(SnpatchError, match=message):
        load_dataset(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "a", "tags": ["x", "y"]}, "a"),
        ({"conversations": ["a", "x"]}, "a"),
        ({"turns": ["a", "x"]}, "a"),
        ({"messages": turns("a", "x"), "tags": ["x", "y"]}, "a"),
        ({"prompt": user("a"), "chosen": answer("x"), "rejected": answer("y")}, "a"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "a"),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_object_of_one_row_is_one_row(tmp_path, row, prompt, indent):
    (tmp_path / "p.json").write_text(json.dumps(row, indent=indent))
    assert load_dataset(tmp_path / "p.json").prompts == [user(prompt)]


@pytest.mark.parametrize("orient", ["index", "split", "columns", "values"])
def test_json_of_pandas_other_than_records_is_rejected(tmp_path, orient):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"prompt": ["a", "b"], "id": [1, 2]})
    frame.to_json(tmp_path / "p.json", orient=orient)
    with pytest.raises(SnpatchError, match=r"p\.json, (item|line) 1: "):
        load_dataset(tmp_path / "p.json")
    for good in ("records", "table"):
        frame.to_json(tmp_path / "p.json", orient=good)
        assert load_dataset(tmp_path / "p.json").prompts == AB


def test_list_of_texts_in_jsonl_is_rejected_with_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": ["a", "b"]}\n{"prompt": ["c"]}\n')
    with pytest.raises(SnpatchError, match="line 1: prompt: expected a text or messages, got a list of texts"):
        load_dataset(tmp_path / "p.jsonl")


DOUBLED = [
    '{"prompt": "a", "prompt": "b"}',
    '{"prompt": "a", "id": 1, "id": 1}',
    '{"prompt": "a", "meta": [{"x": 1, "x": 2}]}',
    '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
]


@pytest.mark.parametrize("row", DOUBLED)
def test_json_object_with_doubled_keys_is_rejected_with_its_place(tmp_path, row):
    name = next(name for name in ("prompt", "id", "x", "content") if row.count(f'"{name}"') > 1)
    message = f"expected different keys in an object, got {name!r} twice. Remove or rename one"
    good_row = '{"prompt": "c"}'
    for name, content, place in (
        ("p.jsonl", row, "line 1"),
        ("p.jsonl", f"{good_row}\n\n{row}\n", "line 3"),
        ("p.jsonl", f"{row}\n{good_row}\n", "line 1"),
        ("p.json", f"[{good_row},\n{row}]", "item 2"),
        ("p.json", row.replace(", ", ",\n"), "item 1"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(SnpatchError) as caught:
            load_dataset(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}, {place}: {message}"
        if good_row in content:
            data = load_dataset(tmp_path / name, skip_invalid=True)
            assert (data.prompts, data.skipped) == ([user("c")], 1)
    (tmp_path / "p.json").write_text(f'{{"data": [{row}]}}')
    with pytest.raises(SnpatchError, match=rf"p\.json: {message}"):
        load_dataset(tmp_path / "p.json")


def test_doubled_keys_of_tables_and_completions_are_rejected(tmp_path):
    for content in ('{"prompt": ["a"], "prompt": ["b"]}', '{"data": ["a"], "x": 1, "x": 2}'):
        (tmp_path / "p.json").write_text(content)
        with pytest.raises(SnpatchError, match=r"p\.json: expected different keys in an object, got '\w+' twice"):
            load_dataset(tmp_path / "p.json")
    (tmp_path / "c.jsonl").write_text('{"completion": "a", "completion": "b"}\n')
    with pytest.raises(SnpatchError, match="line 1: expected different keys in an object, got 'completion' twice"):
        read_completions(tmp_path / "c.jsonl")


def test_json_object_on_several_lines_is_one_row(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"messages": turns("a", "b")}, indent=2))
    assert load_dataset(tmp_path / "p.json").conversations() == [{"messages": turns("a", "b")}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": turns("a", "b")}))
    assert load_dataset(tmp_path / "p.jsonl").conversations() == [{"messages": turns("a", "b")}]


def test_invalid_first_row_is_one_row(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "half\n' + LINES)
    with pytest.raises(SnpatchError, match=r"p\.jsonl, line 1: not JSON"):
        load_dataset(tmp_path / "p.jsonl")
    data = load_dataset(tmp_path / "p.jsonl", skip_invalid=True)
    assert (data.prompts, data.skipped, data.examples[1].meta["row"]) == (AB, 1, 3)


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.txt", "p.parquet", "p.json"])
def test_file_without_data_is_rejected(tmp_path, name):
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(SnpatchError, match="a pointer of Git LFS, not the data"):
        load_dataset(path)
    for encoding in ("utf-16", "utf-32"):
        path.write_bytes('{"prompt": "a"}'.encode(encoding))
        with pytest.raises(SnpatchError, match=f"expected UTF-8, got {encoding.upper()}"):
            load_dataset(path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.txt"])
def test_wide_encoding_without_byte_order_mark_is_named(tmp_path, name, encoding):
    (tmp_path / name).write_bytes('{"prompt": "a"}'.encode(encoding))
    with pytest.raises(SnpatchError, match=f"expected UTF-8, got {encoding[:6].upper()}. Convert it: iconv"):
        load_dataset(tmp_path / name)


def test_jsonl_with_carriage_returns_alone_names_the_remedy(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\r{"prompt": "b"}\r')
    with pytest.raises(SnpatchError, match=r"not JSON: Extra data.*convert them to LF"):
        load_dataset(tmp_path / "p.jsonl")


@pytest.mark.parametrize("field", ["tool_calls", "reasoning_content", "images"])
def test_message_with_more_than_text_is_rejected(tmp_path, field):
    message = {"role": "user", "content": "a", field: None}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"messages": [message]}))
    assert load_dataset(path).prompts == AB[:1]
    path.write_text(json.dumps({"messages": [{**message, field: ["x"]}]}))
    with pytest.raises(SnpatchError, match=f"line 1: messages: expected messages of text, got {field}"):
        load_dataset(path)


def test_folder_saved_by_datasets_library_is_read(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    rows.save_to_disk(tmp_path / "one")
    assert load_dataset(tmp_path / "one").prompts == AB
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert load_dataset(tmp_path / "two", split="test").prompts == AB[1:]
    with pytest.raises(SnpatchError, match="two: holds the splits train, test: choose one with split"):
        load_dataset(tmp_path / "two")
    with pytest.raises(SnpatchError, match="one: expected the columns goal, got prompt"):
        load_dataset(tmp_path / "one", column="goal")


def test_parquet_bytes_are_rejected_as_text(tmp_path):
    with pytest.raises(SnpatchError, match=r"row 1: prompt: expected a non-empty string, got b'a'"):
        load_dataset(write(tmp_path, "p", ".parquet", [{"prompt": b"a"}]))


def test_hh_file_without_format_equals_named_format(tmp_path):
    """The form of hh-rlhf's own files, with the rows that have no pair."""
    rows = [
        {"chosen": talk("a", "b"), "rejected": talk("a", "c")},
        {"chosen": talk("a", "b", "c", "d"), "rejected": talk("a", "x", "c", "y")},
        {"chosen": talk("a", "b"), "rejected": talk("a", "")},
    ]
    path = write(tmp_path, "hh", ".jsonl", rows)
    by_name, by_content = load_dataset(path, format="hh-harmless"), load_dataset(path)
    assert by_content.fingerprint == by_name.fingerprint
    assert by_content.source["no_pair"] == by_name.source["no_pair"]
