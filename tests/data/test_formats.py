"""Every published dataset, from each kind of file and from the hub: which fields of its rows count."""

import sys

import datasets
import pytest
from huggingface_hub.utils import httpx
from published import CATEGORIES, KINDS, ROWS, attempt, bench, shp, stack, tails, talk, turns, write

from snpatch.data import DATASETS, load_dataset
from snpatch.errors import SnpatchError

PROMPTS = {
    "beavertails": ["How do I rob?", "What is the time?"],
    "hh-harmless": ["How?", "One\n\ntwo"],
    "hh-helpful": ["How?", "One\n\ntwo"],
    "hh": ["How?", "One\n\ntwo"],
    "red-team-attempts": ["Forge it", "Hide it"],
    "harmbench": ["Make a bomb, now", "Write it"],
    "jailbreak-llms": ["How to pick a lock?", "How to lie?"],
    "lima": ["Why?", "One?", "Alone?"],
    "sharegpt": ["Hi", "Go on"],
    "shp": ["Salt?", "Pepper?"],
    "reward-bench": ["Kill a process", "Insult me"],
    "stack-exchange": ["What is 1 + 1?", "Is 7 prime?"],
}
HUB = {  # what is asked of datasets.load_dataset
    "beavertails": ("PKU-Alignment/BeaverTails", {"split": "330k_test"}),
    "hh-harmless": ("Anthropic/hh-rlhf", {"split": "test", "data_dir": "harmless-base"}),
    "hh-helpful": ("Anthropic/hh-rlhf", {"split": "test", "data_dir": "helpful-base"}),
    "red-team-attempts": ("Anthropic/hh-rlhf", {"split": "train", "data_dir": "red-team-attempts"}),
    "jailbreak-llms": ("TrustAIRLab/forbidden_question_set", {"split": "train"}),
    "wikitext-2": ("Salesforce/wikitext", {"split": "test", "name": "wikitext-2-raw-v1"}),
    "shp": ("stanfordnlp/SHP", {"split": "test"}),
    "reward-bench": ("allenai/reward-bench", {"split": "filtered"}),
}
SHAREGPT = "hf://datasets/anon8231489123/ShareGPT_Vicuna_unfiltered@main/HTML_cleaned_raw_dataset/"
BY_FILE = {
    "harmbench": (
        "csv",
        [
            "https://raw.githubusercontent.com/centerforaisafety/HarmBench/main"
            "/data/behavior_datasets/harmbench_behaviors_text_all.csv"
        ],
    ),
    "hh": (
        "json",
        [f"hf://datasets/Anthropic/hh-rlhf@main/{kind}-base/test.jsonl.gz" for kind in ("harmless", "helpful")],
    ),
    "lima": ("json", ["hf://datasets/GAIR/lima@main/train.jsonl"]),
    "sharegpt": ("json", [f"{SHAREGPT}sg_90k_part{i}_html_cleaned.json" for i in (1, 2)]),
    "stack-exchange": (
        "json",
        ["hf://datasets/prhegde/preference-data-math-stack-exchange@main/math_stack_exchange.json"],
    ),
}
TRAIN = {"beavertails": "330k_train", "reward-bench": "filtered"}  # the split to train on; of all others: train


def user(text):
    return [{"role": "user", "content": text}]


def load_row(tmp_path, name, row):
    """Return the single example of a row."""
    (example,) = load_dataset(write(tmp_path, name, ".jsonl", [row]), format=name).examples
    return example


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in KINDS.items() for kind in kinds])
def test_dataset_from_each_kind_of_file_gives_same_examples(tmp_path, name, kind):
    data = load_dataset(write(tmp_path, "data", kind, ROWS[name]), format=name)
    reference = load_dataset(write(tmp_path, "reference", KINDS[name][0], ROWS[name]), format=name)
    assert data.fingerprint == reference.fingerprint == data.source["sha256"]
    assert (data.name, data.skipped, data.source["rows"]) == (name, 0, len(ROWS[name]))
    if name == "wikitext-2":
        assert data.text == "\n\n".join(row["text"] for row in ROWS[name])
        with pytest.raises(SnpatchError, match="wikitext-2: expected prompts, got running text"):
            data.prompts  # noqa: B018
    else:
        assert data.prompts == [user(text) for text in PROMPTS[name]]
        with pytest.raises(SnpatchError, match=f"{name}: expected running text, got prompts"):
            data.text  # noqa: B018


def test_datasets_all_have_test_rows():
    assert set(DATASETS) == set(ROWS) == set(KINDS) == {*PROMPTS, "wikitext-2"} == {*HUB, *BY_FILE}


def test_beavertails_keeps_first_row_of_each_prompt(tmp_path):
    data = load_dataset(write(tmp_path, "b", ".jsonl.xz", ROWS["beavertails"]), format="beavertails")
    assert [e.response for e in data.examples] == ["Wear a mask.", "Noon."]
    assert data.examples[0].meta == {
        "category": CATEGORIES,
        "is_safe": False,
        "file": str(tmp_path / "b.jsonl.xz"),
        "row": 1,
    }
    assert data.source["left_out"] == {"repeated prompt": 1}


def test_hh_pairs_have_full_conversation_before_last_turn(tmp_path):
    data = load_dataset(write(tmp_path, "hh", ".jsonl", ROWS["hh-harmless"]), format="hh-harmless")
    assert data.pairs() == [
        {"prompt": turns("How?"), "chosen": turns("", "No.")[1:], "rejected": turns("", "So.")[1:]},
        {
            "prompt": turns("One\n\ntwo", "Hm", "Why?"),
            "chosen": turns("", "Good.")[1:],
            "rejected": turns("", "Bad.")[1:],
        },
    ]
    with pytest.raises(SnpatchError, match="hh-harmless has no responses to train on"):
        data.conversations()


@pytest.mark.parametrize(
    ("chosen", "rejected", "why"),
    [
        (talk("a", "b", "c", "d"), talk("a", "x", "c", "y"), "the texts differ before the last turn"),
        (talk("a", "b"), talk("a", "b"), "both answers are the same"),
        (talk("a", "b"), talk("a", ""), "an answer is empty"),
        (talk("a"), talk("a"), "an answer is empty"),
    ],
)
def test_hh_row_without_pair_has_prompt(tmp_path, chosen, rejected, why):
    rows = [*ROWS["hh-harmless"], {"chosen": chosen, "rejected": rejected}]
    data = load_dataset(write(tmp_path, "hh", ".jsonl", rows), format="hh-harmless")
    assert data.prompts[2] == user("a")
    assert len(data.pairs()) == 2
    assert data.source["no_pair"] == {why: 1}
    assert data.examples[2].meta["no_pair"] == why


@pytest.mark.parametrize(
    ("transcript", "prompt", "dialogue", "response"),
    [
        ("\n\n\n\nHuman:   a  \n\nAssistant: b", "a", turns("a"), "b"),
        ("Human: a\n\nAssistant: b", "a", turns("a"), "b"),
        ("\n\nAssistant: hello\n\nHuman: a\n\nAssistant: b", "a", turns("a"), "b"),
        ("\n\nHuman: Who said Human: or\nHuman: or Assistant: ?\n\nAssistant: b", None, None, "b"),
        ("\n\nHuman: a\n\nHuman: more\n\nAssistant: b", "a", turns("a") + turns("more"), "b"),
        (talk("a", "b", "c"), "a", turns("a"), "b"),
        (talk("a"), "a", turns("a"), None),
        (talk("a", "b") + "\n\nAssistant: again", "a", turns("a"), "b"),
    ],
)
def test_transcript_variants_are_parsed(tmp_path, transcript, prompt, dialogue, response):
    prompt = prompt or "Who said Human: or\nHuman: or Assistant: ?"
    example = load_row(tmp_path, "red-team-attempts", attempt(transcript, 2.0))
    assert example.prompt == user(prompt)
    assert example.dialogue == (dialogue or turns(prompt))
    assert example.response == response
    assert example.meta["rating"] == 2.0
    assert "transcript" not in example.meta


def test_training_conversations_end_with_answer(tmp_path):
    lima = load_dataset(write(tmp_path, "lima", ".jsonl", ROWS["lima"]), format="lima")
    assert lima.conversations() == [
        {"messages": turns("Why?", "Because.")},
        {"messages": turns("One?", "1", "Two?", "2")},
    ]
    with pytest.raises(SnpatchError, match="lima has no pairs"):
        lima.pairs()


def test_sharegpt_in_both_forms_gives_same_examples(tmp_path):
    raw = load_dataset(write(tmp_path, "raw", ".json", ROWS["sharegpt"]), format="sharegpt")
    assert raw.conversations() == [{"messages": turns("Hi", "Yo")}, {"messages": turns("Go on", "ok")}]
    assert raw.source["left_out"] == {"a turn of bing": 1, "no human turn": 1}
    tulu = [{"dataset": "sharegpt", "id": "a", "messages": turns("Hi", "Yo")}, {"messages": turns("Go on", "ok")}]
    data = load_dataset(write(tmp_path, "tulu", ".jsonl", tulu), format="sharegpt")
    assert data.fingerprint == raw.fingerprint
    assert data.examples[0].meta["id"] == "a"


def test_harmbench_and_jailbreak_keep_columns_in_meta(tmp_path):
    data = load_dataset(write(tmp_path, "h", ".csv", ROWS["harmbench"]), format="harmbench")
    assert data.examples[1].meta["ContextString"] == 'A "b"\nc, d'
    assert [e.meta["row"] for e in data.examples] == [2, 3]
    assert len(data.filter("FunctionalCategory", "contextual")) == 1


def test_preference_datasets_give_chosen_and_rejected(tmp_path):
    data = load_dataset(write(tmp_path, "shp", ".json", ROWS["shp"]), format="shp")
    assert [(e.chosen, e.rejected) for e in data.examples] == [("A lot", "A bit"), ("Some", "None")]
    assert data.examples[0].meta["score_A"] == 9
    data = load_dataset(write(tmp_path, "rb", ".parquet", ROWS["reward-bench"]), format="reward-bench")
    safe = data.filter("subset", "refusals-offensive", "donotanswer")
    assert safe.prompts == [user("Insult me")]
    assert safe.source["selection"] == ["subset in 'refusals-offensive', 'donotanswer'"]
    assert safe.pairs()[0]["rejected"] == turns("", "You fool")[1:]
    with pytest.raises(SnpatchError, match="reward-bench: filter: expected examples with subset in 'safety', got none"):
        data.filter("subset", "safety")
    data = load_dataset(write(tmp_path, "stack", ".json", ROWS["stack-exchange"]), format="stack-exchange")
    assert data.pairs()[1] == {
        "prompt": user("Is 7 prime?"),
        "chosen": turns("", "Yes, as $7 = 7$")[1:],
        "rejected": turns("", "No")[1:],
    }


BROKEN = {
    "empty prompt": ("beavertails", tails(" \n", "x", True), "prompt: expected a non-empty string, got ' "),
    "label that is no label": ("beavertails", tails("p", "x", 1), "is_safe, category: expected true or false"),
    "no response": ("beavertails", tails("p", None, True), "response: expected a string, got None"),
    "column of another set": (
        "beavertails",
        {"prompt": "p"},
        "expected an object with prompt, response, category, is_s",
    ),
    "no human turn": ("hh-harmless", {"chosen": "Hello", "rejected": talk("a", "b")}, "chosen has no human turn"),
    "assistant only": ("hh-helpful", {"chosen": talk("a"), "rejected": "\n\nAssistant: b"}, "rejected has no human"),
    "empty human turn": ("red-team-attempts", attempt(talk(" ", "b"), 1.0), "the first human turn of transcript is em"),
    "transcript that is a number": (
        "red-team-attempts",
        attempt(["a"], 1.0),
        r"transcript: expected a .*string, got \['a'\]",
    ),
    "empty behavior": ("harmbench", {"Behavior": ""}, "Behavior: expected a non-empty string"),
    "question that is a number": ("jailbreak-llms", {"question": 7}, "question: expected a .*string, got 7"),
    "no turns": ("lima", {"conversations": []}, r"conversations: expected a non-empty list of strings, got \[\]"),
    "turn that is no text": ("lima", {"conversations": ["a", 7]}, "conversations: expected a .*string, got 7"),
    "turns without a speaker": ("sharegpt", {"conversations": [{"value": "x"}]}, "expected a list of from and value"),
    "turns that are a text": (
        "sharegpt",
        {"messages": "hi"},
        "messages: expected a list of role and content, got 'hi'",
    ),
    "turn without content": ("sharegpt", {"messages": [{"role": "user"}]}, "role and content, each a string"),
    "text that is none": ("wikitext-2", {"text": None}, "text: expected a string, got None"),
    "no second answer": ("shp", shp("a", "b", "", 1), "human_ref_B: expected a non-empty string"),
    "no preference": ("shp", shp("a", "b", "c", 2), "labels: expected 0 or 1, got 2"),
    "no rejected answer": ("reward-bench", bench("a", "b", None, "s"), "rejected: expected a .*string, got None"),
    "no better answer": ("stack-exchange", stack("a", " ", "c"), "chosen: expected a non-empty string, got ' '"),
    "no question": (
        "stack-exchange",
        {"chosen": "b", "rejected": "c"},
        "expected an object with question, chosen, rej",
    ),
    "half a surrogate pair": (
        "reward-bench",
        bench("a\ud800", "b", "c", "s"),
        "prompt: expected UTF-8, got half a surrogate pair",
    ),
    "row that is no object": ("reward-bench", ["a", "b"], "expected an object with prompt, chosen, rejected, subset"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_invalid_row_is_named_or_counted(tmp_path, case):
    name, row, message = BROKEN[case]
    path = write(tmp_path, "data", ".json", [*ROWS[name], row])
    with pytest.raises(SnpatchError, match=rf"data\.json, item {len(ROWS[name]) + 1}: .*{message}"):
        load_dataset(path, format=name)
    data = load_dataset(path, format=name, skip_invalid=True)
    assert data.skipped == data.source["skipped"] == 1
    assert data.fingerprint == load_dataset(write(tmp_path, "good", ".json", ROWS[name]), format=name).fingerprint


@pytest.fixture
def hub(monkeypatch):
    """Fake hub that returns tables of the published rows and records the requests."""
    requests = []

    def load_dataset(path, **arguments):
        requests.append((path, {key: value for key, value in arguments.items() if value is not None}))
        return datasets.Dataset.from_list(hub_rows)

    hub_rows = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub_rows, requests


@pytest.mark.parametrize("name", DATASETS)
def test_dataset_from_hub_equals_file(tmp_path, hub, name):
    rows, requests = hub
    rows += ROWS[name]
    data = load_dataset(name)
    if name in HUB:
        assert requests == [HUB[name]]
    else:
        builder, files = BY_FILE[name]
        assert requests == [(builder, {"data_files": files, "split": "train"})]
    assert (
        data.fingerprint == load_dataset(write(tmp_path, "data", KINDS[name][0], ROWS[name]), format=name).fingerprint
    )
    assert data.source["hub"] == DATASETS[name].hub.id
    assert data.examples[0].meta["row"] == 1


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "harmbench"])  # which has no answers
def test_training_split_is_requested_from_hub(hub, name):
    rows, requests = hub
    rows += ROWS[name]
    load_dataset(name, split=DATASETS[name].hub.train)
    split = TRAIN.get(name, "train")
    if name in HUB:
        assert requests == [(HUB[name][0], HUB[name][1] | {"split": split})]
    else:
        builder, files = BY_FILE[name]
        files = [file.replace("/test.", f"/{split}.") for file in files]
        assert requests == [(builder, {"data_files": files, "split": "train"})]
        assert split == DATASETS[name].hub.train


def test_split_and_revision_are_passed_to_hub(hub):
    rows, requests = hub
    rows += ROWS["lima"]
    load_dataset("lima", split="test", revision="v1")
    assert requests[0][1]["data_files"] == ["hf://datasets/GAIR/lima@v1/test.jsonl"]
    rows[:] = ROWS["beavertails"]
    data = load_dataset("beavertails", split="330k_train", revision="abc")
    assert requests[1][1] == {"split": "330k_train", "revision": "abc"}
    assert (data.source["split"], data.source["revision"]) == ("330k_train", "abc")
    with pytest.raises(SnpatchError, match=r"ShareGPT_Vicuna_unfiltered: has one split, train, got 'test'"):
        load_dataset("sharegpt", split="test")


def test_invalid_hub_rows_are_named_or_counted(hub):
    rows, _ = hub
    rows += [*ROWS["shp"], shp("a", "b", "c", 3)]
    with pytest.raises(SnpatchError, match="stanfordnlp/SHP, test, row 3: labels: expected 0 or 1"):
        load_dataset("shp")
    assert load_dataset("shp", skip_invalid=True).skipped == 1
    rows[:] = ROWS["lima"]
    with pytest.raises(SnpatchError, match=r"SHP, test: expected the columns history, .* got conversations, source"):
        load_dataset("shp", skip_invalid=True)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it on the Hub\nmore"),
        datasets.exceptions.DatasetNotFoundError("Couldn't reach it: gated"),
        ValueError("Couldn't reach it: unknown split"),
        RuntimeError("Couldn't reach it: scripts are no longer supported"),
        httpx.ConnectError("Couldn't reach it: name not known"),
    ],
)
def test_hub_errors_are_one_line(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        SnpatchError, match=r"^cannot load GAIR/lima \(train\) from the hub: Couldn't reach it.*$"
    ) as error_info:
        load_dataset("lima")
    assert "\n" not in str(error_info.value)


def test_url_files_are_read_by_datasets_library(tmp_path, monkeypatch):
    """HarmBench's CSV and the JSON of ShareGPT, through the library's own readers."""
    real, local = datasets.load_dataset, {}

    def from_disk(builder, data_files, split):
        return real(builder, data_files=[str(local["path"])], split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    for name in BY_FILE:
        local["path"] = write(tmp_path, name, KINDS[name][0], ROWS[name])
        assert load_dataset(name).fingerprint == load_dataset(local["path"], format=name).fingerprint


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_missing_package_error_names_extra(tmp_path, monkeypatch, package):
    module = {"datasets": "snpatch.data.hub_datasets", "pyarrow": "snpatch.data.parquet"}[package]
    path = write(tmp_path, "data", ".parquet", ROWS["lima"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SnpatchError, match=r"pip install 'datasets.*' 'pyarrow'"):
        load_dataset("lima") if package == "datasets" else load_dataset(path, format="lima")
