"""Text processors: tokenizers, templates and EOS in the folders of adapters, LoRA and secondary weights."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny
from commands import run
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as bpe
from transformers import AutoTokenizer

from snpatch import Engine, EngineConfig, Sampling, SnpatchError
from snpatch.integrations.lm_eval import SnpatchLM
from snpatch.models.hub import resolve_adapter_folder
from snpatch.models.loaded_models import LoadedModels
from snpatch.models.lora import load_lora
from snpatch.models.notes import Notes
from snpatch.models.pretrained import load_pretrained
from snpatch.models.templates import TEMPLATE_FILE, TULU
from snpatch.models.text_processing import load_text_processors

OWN = "{% for m in messages %}<|user|> {{ m.content }}{% endfor %}{% if add_generation_prompt %} {% endif %}"
OTHER = "{{ messages[0].content }} bama"
CHAT = [{"role": "user", "content": "bana"}]


@pytest.fixture(scope="module")
def lora(zoo, tmp_path_factory):
    return tiny.write_lora(zoo("llama").folder, tmp_path_factory.mktemp("lora"))


@pytest.fixture
def with_adapter(zoo, lora, tmp_path):
    """Return with_adapter(kind, path): (engine arguments, folder of a copy of an adapter of this kind)."""

    def copy_adapter(kind: str, name: str = "adapter") -> tuple[dict, object]:
        folder = tmp_path / name
        shutil.copytree(zoo("llama").adapters["sft"][0] if kind == "ia3" else lora, folder)
        arguments = {"adapters": {name: [folder]}} if kind == "ia3" else {"models": {name: {"lora": folder}}}
        return arguments, folder

    return copy_adapter


@pytest.fixture
def model(zoo, tmp_path):
    """Return a copy of the tiny Llama, with a chat template of its own."""
    folder = tmp_path / "model"
    shutil.copytree(zoo("llama").folder, folder)
    (folder / TEMPLATE_FILE).write_text(OWN)
    return folder


def load_models(model, arguments: dict, **options) -> LoadedModels:
    return LoadedModels(
        EngineConfig.of(model, arguments.get("adapters"), models=arguments.get("models", {}), **options)
    )


@pytest.mark.parametrize(
    ("name", "is_accepted"),
    [("LlamaTokenizerFast", False), ("LlamaTokenizer", False), ("PreTrainedTokenizerFast", True)],
)
def test_tokenizer_class_that_contradicts_tokenizer_json_is_rejected(model, name, is_accepted):
    """transformers gives the class LlamaTokenizer its own steps: a byte-level tokenizer then loses all spaces."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(bpe.BPE({letter: i for i, letter in enumerate(["<s>", "</s>", *letters])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.save(str(model / "tokenizer.json"))
    config = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    if is_accepted:
        tokenizer = load_pretrained(AutoTokenizer, model)
        assert tokenizer.decode(tokenizer("a b")["input_ids"]) == "a b"
    else:
        with pytest.raises(SnpatchError, match=r"follows its tokenizer\.json, got Llama.*'HowdoIabcd"):
            load_pretrained(AutoTokenizer, model)


def test_tokenizer_class_chosen_by_transformers_is_a_warning(zoo, caplog):
    """transformers reads every tokenizer.json of model type qwen2 as Qwen2Tokenizer."""
    load_pretrained(AutoTokenizer, zoo("qwen2").folder)
    (message,) = (record.getMessage() for record in caplog.records if record.name == "snpatch.models.pretrained")
    assert "transformers chose Qwen2Tokenizer, which reads 'How do I a b  c\\n d?' as ''" in message
    assert "Pass prompts as token ids" in message


KINDS = ["ia3", "lora"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source", "text"), [(TULU, "<|user|>\nbana\n<|assistant|>\n"), (OTHER, "bana bama")])
def test_template_in_adapter_folder_is_used(model, with_adapter, kind, source, text):
    arguments, folder = with_adapter(kind)
    (folder / TEMPLATE_FILE).write_text(source)
    models = load_models(model, arguments)
    assert models.templates[-1].render(CHAT) == text
    assert any(
        f"chats are rendered by the template in {folder}, and not by {model}'s own" in n for n in models.notes.messages
    )
    assert load_models(model, arguments, template="tokenizer").templates[-1].render(CHAT) == "<|user|> bana "
    assert load_models(model, arguments, template="tulu").templates[-1].name == "tulu"
    if kind == "lora":
        assert models.templates[0].render(CHAT) == "<|user|> bana ", "own weights read as they were trained"


@pytest.mark.parametrize("kind", KINDS)
def test_two_templates_on_one_set_are_rejected_naming_both(model, with_adapter, kind):
    arguments, first = with_adapter(kind, "first")
    _, second = with_adapter("ia3", "second")
    (first / TEMPLATE_FILE).write_text(TULU)
    (second / TEMPLATE_FILE).write_text(OTHER)
    if kind == "ia3":
        arguments["adapters"]["second"] = [second]
    else:
        arguments["models"]["first"]["adapters"] = [second]
    with pytest.raises(SnpatchError, match=rf"different templates \({first}, {second}\): choose one by template="):
        load_models(model, arguments)


def test_template_of_tokenizer_in_lora_folder_is_used(model, with_adapter):
    arguments, folder = with_adapter("lora")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = OTHER
    tokenizer.save_pretrained(folder)
    assert load_models(model, arguments).templates[1].render(CHAT) == "bana bama"


@pytest.mark.parametrize("kind", KINDS)
def test_eos_in_adapter_folder_ends_completions(model, with_adapter, kind):
    arguments, folder = with_adapter(kind)
    end = tiny.VOCAB.index(tiny.WORDS[7])
    tiny.tokenizer(eos=tiny.WORDS[7]).save_pretrained(folder)
    config = EngineConfig.of(model, arguments.get("adapters"), models=arguments.get("models", {}))
    assert load_text_processors(config, Notes())[-1].eos_ids == {tiny.EOS, end}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [11, 12]}))
    assert load_text_processors(config, Notes())[-1].eos_ids == {tiny.EOS, end, 11, 12}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "2"}))
    with pytest.raises(SnpatchError, match="eos_token_id: expected numbers of tokens, got '2'"):
        load_text_processors(config, Notes())


@pytest.mark.parametrize("kind", KINDS)
def test_different_ids_in_adapter_folder_are_rejected_naming_both(model, with_adapter, kind):
    arguments, folder = with_adapter(kind)
    tiny.tokenizer().save_pretrained(folder)
    table = json.loads((folder / "tokenizer.json").read_text())
    vocab = table["model"]["vocab"]
    vocab[tiny.WORDS[3]], vocab[tiny.WORDS[5]] = vocab[tiny.WORDS[5]], vocab[tiny.WORDS[3]]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(SnpatchError, match=rf"difference between {model} and {folder} in the token '{tiny.WORDS[3]}'"):
        load_models(model, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_added_by_adapter_need_embedding_rows(model, with_adapter, kind):
    arguments, folder = with_adapter(kind)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|im_start|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(SnpatchError, match=rf"{folder}: expected token ids below .* got '<.im_start.>' \(128\)"):
        load_models(model, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_two_different_tokenizers_on_one_set_are_rejected(model, with_adapter, kind):
    arguments, first = with_adapter(kind, "first")
    _, second = with_adapter("ia3", "second")
    tiny.tokenizer().save_pretrained(first)
    tiny.tokenizer(eos=tiny.WORDS[7]).save_pretrained(second)
    if kind == "ia3":
        arguments["adapters"]["second"] = [second]
    else:
        arguments["models"]["first"]["adapters"] = [second]
    with pytest.raises(SnpatchError, match=rf"tokenizers of {first} and {second} read texts differently, and adapters"):
        load_models(model, arguments)
    tiny.tokenizer().save_pretrained(second)
    assert load_models(model, arguments).text_processors[-1].eos_ids == {tiny.EOS}


def test_model_with_tulu_template_gets_no_note(model):
    (model / TEMPLATE_FILE).write_text(TULU)
    models = load_models(model, {})
    assert (models.templates[0].name, models.notes.messages) == ("tulu", ())


def ending(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", tiny.BOS), ("</s>", tiny.EOS)]
    )
    tokenizer.save_pretrained(folder)


def test_tokenizer_that_appends_eos_is_rejected_at_start(model, with_adapter):
    arguments, folder = with_adapter("lora")
    tiny.tokenizer().save_pretrained(folder)
    ending(folder)
    with pytest.raises(
        SnpatchError, match=rf"{folder}: its tokenizer appends '</s>' to every text.* add_eos_token = f"
    ):
        load_models(model, arguments)
    ending(model)
    with pytest.raises(SnpatchError, match=rf"{model}: its tokenizer appends '</s>' to every text"):
        Engine(model, backend="transformers")


def test_tokens_without_embedding_row_are_noted_and_rejected(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(model)
    (model / TEMPLATE_FILE).write_text(OWN)
    with Engine(model, backend="transformers") as engine:
        (note,) = engine.notes
        assert (
            "has 1 tokens outside the vocabulary of 128, such as '<image>' (128); prompts that contain one are" in note
        )
        for prompt in ("bana <image>", [{"role": "user", "content": "bana <image>"}], [1, 128]):
            with pytest.raises(SnpatchError, match=r"prompt 0: expected token ids in 0\.\.127, got 128 \('<image>'\)"):
                engine.generate([prompt])
        with pytest.raises(SnpatchError, match=r"completion 0: expected token ids in 0\.\.127"):
            engine.logprobs(["bana"], completions=["bama <image>"])


def test_prompts_with_bos_or_template_marks_are_noted_once_and_unchanged(model):
    with Engine(model, backend="transformers") as engine:
        assert engine.encode(["<s> bana", "<s> bama"])[0][:2] == [tiny.BOS, tiny.BOS]
        (note,) = engine.notes
        assert note.startswith("prompt 0 begins with '<s>' twice")
        for content in ("[INST] bana [/INST]", "Be kind.\n\nHuman: bana\n\nAssistant:", "bana </s>"):
            engine.encode([[{"role": "user", "content": content}]])
        assert len(engine.notes) == 2
        assert "contains the template mark '[INST]'" in engine.notes[1]


MARKED_TEXTS = [
    "### Human: hi### Assistant:", "### User:\nhi\n### Assistant:\n", "### Instruction:\nhi\n\n### Response:",
    "### Input:\nhi",
    "USER: hi ASSISTANT:", "A chat between a user and an assistant. USER: hi ASSISTANT:", "User: hi\nAssistant:",
    "Human: hi\nAssistant:", "\n\nHuman: hi\n\nAssistant:", "\r\n\r\nHuman: hi\r\n\r\nAssistant:",
    "Instruct: hi\nOutput:",
    "<|prompter|>hi<|endoftext|><|assistant|>", "GPT4 Correct User: hi<|end_of_turn|>GPT4 Correct Assistant:",
    "<human>: hi\n<bot>:", "<|begin_of_text|>hi", "<bos>hi", "<s>hi", "hi</s>", "<|endoftext|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|turn>user", "<|start|>user<|message|>hi", "[SYSTEM_PROMPT]x[/SYSTEM_PROMPT]", "<｜User｜>hi<｜Assistant｜>",
    "<｜begin▁of▁sentence｜>hi", "<|user_start|>", "<reserved_106>", "[|Human|]hi[|AI|]", "[INST] hi [/INST]",
    "<|im_start|>user", "<<SYS>>", "<|header_start|>user", "<end_of_turn>", "<|eot|>", "<|end|>", "<extra_id_1>User",
]  # fmt: skip
PLAIN_TEXTS = [
    "Why is 1 < 2 | 3 > 2?", "Human: a short story", "The user: who is it?", "Assistant: who are you?", "# Input\nx",
    "List [1, 2] and a[i]", "<b>bold</b> and <i>old</i> prices", "a |> f <| b", "What is an AI: a tool or a being?",
]  # fmt: skip


def test_marks_of_common_templates_are_found(model):
    template = load_models(model, {}).templates[0]
    for text in MARKED_TEXTS:
        mark = template.find_mark([{"role": "user", "content": text}])
        assert mark, text
        assert mark in text
    for text in PLAIN_TEXTS:
        assert template.find_mark([{"role": "user", "content": text}]) is None, text


OWN_MARKS = {  # a template, texts with its marks, texts without them
    "Vicuna": (
        "A chat.{% for m in messages %} {{ m.role | upper }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}",
        ("USER: bana", "bana ASSISTANT: bama"),
        ("A chat.", "the superUSER: bana", "USER bana"),
    ),
    "rare words": (
        "{% for m in messages %}{{ '@@Q ' if m.role == 'user' else '@@R ' }}{{ m.content }}\n{% endfor %}@@R ",
        ("@@Q bana", "bana\n@@R bama"),
        ("bana @ Q", "R"),
    ),
    "lines": (
        "{% for m in messages %}{{ m.role }}=>\n{{ m.content }}</s>\n{% endfor %}assistant=>\n",
        ("user=>\nbana", "bana\nassistant=>", "bana </s> bama"),
        ("user", "assistant = bana"),
    ),
    "plain words": (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}assistant\n",
        (),
        ("user\nbana", "assistant"),
    ),
    "one message": ("{{ messages[0].content }} bama:", (), ("bana bama:",)),
    "refuses": (
        "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
        (),
        ("a",),
    ),
}


@pytest.mark.parametrize("name", OWN_MARKS)
def test_marks_of_own_template_are_found(model, name):
    source, marked_texts, plain_texts = OWN_MARKS[name]
    (model / TEMPLATE_FILE).write_text(source)
    template = load_models(model, {}).templates[0]
    for text in marked_texts:
        assert template.find_mark([{"role": "user", "content": text}]), text
    for text in plain_texts:
        assert template.find_mark([{"role": "user", "content": text}]) is None, text


def test_late_adapter_with_different_text_files_is_rejected(model, with_adapter):
    (_, folder), (_, silent) = with_adapter("ia3"), with_adapter("ia3", "silent")
    with Engine(model, backend="transformers") as engine:
        engine.add_adapter("silent", silent)
        (folder / TEMPLATE_FILE).write_text(OWN)
        engine.add_adapter("same", folder)
        (folder / TEMPLATE_FILE).write_text(TULU)
        with pytest.raises(SnpatchError, match=rf"{folder}: expected the engine's template, tokenizer and EOS"):
            engine.add_adapter("other", folder)


# ---- chat_template_kwargs ----------------------------------------------------------------------------------------

THINKS = "{{ messages[0].content }}{% if enable_thinking is not defined or enable_thinking %} bama{% endif %}"


def test_template_variables_change_config_and_fingerprint(model, tmp_path):
    (model / TEMPLATE_FILE).write_text(THINKS)
    config = EngineConfig.of(model, chat_template_kwargs={"enable_thinking": False}, backend="transformers")
    config.save(tmp_path / "engine.json")
    assert EngineConfig.load(tmp_path / "engine.json") == config
    (tmp_path / "engine.toml").write_text(
        f'model = "{model}"\nbackend = "transformers"\n[chat_template_kwargs]\nenable_thinking = false\n'
    )
    assert EngineConfig.load(tmp_path / "engine.toml") == config
    quiet, loud = LoadedModels(config), LoadedModels(replace(config, chat_template_kwargs={}))
    assert [models.templates[0].render(CHAT) for models in (quiet, loud)] == ["bana", "bana bama"]
    assert quiet.templates[0].fingerprint != loud.templates[0].fingerprint


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"thinking": False}, "the chat template of .* reads no thinking"),
        ({"messages": []}, "messages is set by snpatch, or by the tokenizer"),
        ({"bos_token": "a"}, "bos_token is set by snpatch"),
        ({"enable_thinking": {1, 2}}, "expected values that JSON can hold"),
        ({"enable_thinking": float("nan")}, "expected values that JSON can hold"),
        ({1: 2}, "expected a table of names and values"),
        ([1], "expected a table of names and values"),
    ],
)
def test_invalid_template_variables_raise_one_line_error(model, variables, message):
    (model / TEMPLATE_FILE).write_text(THINKS)
    with pytest.raises(SnpatchError, match=f"chat_template_kwargs: {message}"):
        LoadedModels(EngineConfig.of(model, chat_template_kwargs=variables))


# ---- adapters from the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(zoo, lora, tmp_path, monkeypatch):
    """Return a hub's cache: org/sft has an IA3 adapter, org/tuned LoRA in a folder, at another revision."""
    for name, revision, below, folder in (
        ("sft", "main", "", zoo("llama").adapters["sft"][0]),
        ("tuned", "v2", "runs/last", lora),
    ):
        cache = tmp_path / "cache" / f"models--org--{name}"
        shutil.copytree(folder, cache / "snapshots" / f"commit-{revision}" / below)
        (cache / "refs").mkdir()
        (cache / "refs" / revision).write_text(f"commit-{revision}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def test_adapters_and_lora_are_downloaded_from_hub(zoo, lora, hub):
    folder = zoo("llama").folder
    local_arguments = {"adapters": {"sft": zoo("llama").adapters["sft"]}, "models": {"tuned": {"lora": lora}}}
    hub_arguments = {"adapters": {"sft": "org/sft"}, "models": {"tuned": {"lora": "org/tuned@v2:runs/last"}}}
    texts = []
    for arguments in (local_arguments, hub_arguments):
        with Engine(folder, **arguments, backend="transformers") as engine:
            texts.append([engine.fingerprint(name) for name in engine.models])
            texts[-1] += [c.token_ids for c in engine.generate(tiny.PROMPTS, "tuned", Sampling(max_tokens=5))]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/none", "no such folder .*, and no adapter of that name can be downloaded"),
        ("org/tuned@v3:runs/last", "no adapter of that name can be downloaded"),
        ("org/tuned@v2:runs/other", "no folder runs/other in org/tuned"),
        ("./org/none", "no such folder"),
        ("a/b/c", "no such folder"),
        ("org/tuned@v2:../..", "no such folder"),
    ],
)
def test_missing_hub_adapter_raises_one_line_error(zoo, hub, name, message):
    with pytest.raises(SnpatchError, match=message):
        load_lora(name)
    with pytest.raises(SnpatchError, match=message):
        Engine(zoo("llama").folder, {"sft": name}, backend="transformers")


@pytest.mark.parametrize("name", ["org/sft", "org/sft@main"])
def test_hub_name_resolves_to_cache_folder(hub, tmp_path, name):
    assert resolve_adapter_folder(name) == tmp_path / "cache" / "models--org--sft" / "snapshots" / "commit-main"
    assert resolve_adapter_folder(tmp_path) == tmp_path


def test_cli_and_lm_eval_accept_template_variables(model, tmp_path, capsys):
    (model / TEMPLATE_FILE).write_text(THINKS)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "bana"}) + "\n")
    common = ["generate", model, prompts, "--backend", "transformers", "--max-tokens", 3, "--json"]
    texts = {}
    for name, options in {"quiet": ["--chat-template-kwargs", '{"enable_thinking": false}'], "loud": []}.items():
        code, out, err = run(capsys, *common, *options)
        assert code == 0, err
        texts[name] = json.loads(out)["token_ids"]
    with Engine(model, backend="transformers") as engine:
        ids = [engine.tokenizer.convert_tokens_to_ids(text.split()) for text in ("bana", "bana bama")]
        want = [c.token_ids for c in engine.generate(ids, sampling=Sampling(max_tokens=3))]
    assert [texts["quiet"], texts["loud"]] == want
    for invalid_variables in ("enable_thinking=false", "[1]", "{"):
        code, _, err = run(capsys, *common, "--chat-template-kwargs", invalid_variables)
        assert (code, err.count("\n")) == (2, 1)
        assert "--chat-template-kwargs: expected a JSON object" in err
    model_args = {"model": str(model), "backend": "transformers", "chat_template_kwargs": '{"enable_thinking": false}'}
    harness = SnpatchLM.create_from_arg_obj(model_args)
    assert harness.apply_chat_template(CHAT) == "bana"


# ---- files that are wrong, and settings and templates that are unusual -------------------------------------------


@pytest.mark.parametrize("value", [7, 0, True, {"default": 7}])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_chat_template_of_wrong_type_raises_one_line_error(model, with_adapter, kind, value):
    arguments, folder = with_adapter(kind) if kind else ({}, model)
    (model / TEMPLATE_FILE).unlink()
    tiny.tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": value}))
    with pytest.raises(
        SnpatchError, match=f"{folder}: chat_template: expected a text, or texts by name, got "
    ) as caught:
        load_models(model, arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "\x00", '{"eos_token_id": "2"}'])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_damaged_generation_config_raises_one_line_error(model, with_adapter, kind, text):
    arguments, folder = with_adapter(kind) if kind else ({}, model)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(SnpatchError, match=f"{folder}.*(generation_config.json cannot be read|eos_token_id)") as caught:
        load_models(model, arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"suppress_tokens": [6, 7]}, "suppress_tokens = [6, 7]"),
        ({"begin_suppress_tokens": [8]}, "begin_suppress_tokens = [8]"),
        ({"repetition_penalty": 1.3}, "repetition_penalty = 1.3"),
        ({"forced_bos_token_id": 1}, "forced_bos_token_id = 1"),
        ({"bad_words_ids": [[6]], "stop_strings": ["bala"]}, "bad_words_ids = [[6]], stop_strings = ['bala']"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size = 2"),
        ({"some_new_setting": 3}, "some_new_setting = 3"),
        ({"repetition_penalty": 1.0, "num_beams": 1, "temperature": 0.7, "do_sample": True}, None),
    ],
)
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_generation_settings_that_are_not_applied_are_noted_once(model, with_adapter, kind, settings, note):
    arguments, folder = with_adapter(kind) if kind else ({}, model)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **settings}))
    messages = load_models(model, arguments).notes.messages
    path = folder / "generation_config.json"
    assert list(messages) == ([f"{path}: {note}: not applied"] if note else [])


UNUSUAL = {
    "ignores add_generation_prompt": "{% for m in messages %}<|user|> {{ m.content }}{% endfor %}",
    "ends prompts with EOS": OWN + "{{ eos_token }}",
    "drops messages of a chat": "{{ messages[0].content }}{% if add_generation_prompt %} {% endif %}",
}


@pytest.mark.parametrize("fault", UNUSUAL)
def test_unusual_template_is_noted_once(model, fault):
    (model / TEMPLATE_FILE).write_text(UNUSUAL[fault])
    (note,) = load_models(model, {}).notes.messages
    assert note.startswith(f"the chat template of {model} {fault}")


@pytest.mark.parametrize("kind", KINDS)
def test_broken_template_beside_adapter_names_its_folder(model, with_adapter, kind):
    arguments, folder = with_adapter(kind)
    (folder / TEMPLATE_FILE).write_text("{% for")
    models = load_models(model, arguments)
    with pytest.raises(SnpatchError, match=f"the chat template of {folder} refuses a chat"):
        models.templates[-1].render(CHAT)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "tokenizer.model"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_part_of_a_tokenizer_beside_adapter_names_the_file_and_the_remedy(model, with_adapter, kind, name):
    arguments, folder = with_adapter(kind)
    (folder / name).write_text("{}")
    with pytest.raises(SnpatchError, match=f"{folder}: .* got {name}, which cannot be loaded .* Remove them") as caught:
        load_models(model, arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("base", "is_noted"),
    [
        ("google/gemma-2b", True),
        ("/elsewhere/MODEL", False),
        ("/cache/models--a--model/snapshots/1234", False),
        (None, False),
    ],
)
def test_adapter_of_another_base_model_is_noted(model, with_adapter, kind, base, is_noted):
    arguments, folder = with_adapter(kind)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    with Engine(model, backend="transformers", **arguments) as engine:
        expected = [f"{folder} was trained on {base}, as its config says, and runs on {model}"]
        assert list(engine.notes) == (expected if is_noted else [])
