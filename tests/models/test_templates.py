"""The Tulu template against the published format, in generation, training and judging; the choice of templates."""

import pytest
import tiny
from jinja2.exceptions import TemplateError

from snpatch import SnpatchError
from snpatch.judges.score_format import ScoreFormat
from snpatch.models.templates import TEMPLATE_FILE, TULU, ChatTemplate, load_template, render_tulu

CHAT = [
    {"role": "system", "content": " be kind \n"},
    {"role": "user", "content": "bala bale"},
    {"role": "assistant", "content": "bama "},
    {"role": "user", "content": "bana"},
    {"role": "assistant", "content": "bara"},
    {"role": "user", "content": "dala"},
]


def published(chat: list[dict], eos: str) -> str:
    """open-instruct's create_prompt_with_tulu_chat_format, without BOS."""
    text = ""
    for message in chat:
        text += f"<|{message['role']}|>\n" + message["content"].strip()
        text += (eos if message["role"] == "assistant" else "") + "\n"
    return text + "<|assistant|>\n"


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()


@pytest.mark.parametrize("turns", range(1, len(CHAT) + 1))
def test_tulu_equals_published_format_over_several_turns(tokenizer, turns):
    assert render_tulu(CHAT[:turns], tokenizer) == published(CHAT[:turns], "</s>")


def test_assistant_turn_ends_with_eos_id(tokenizer):
    ids = ChatTemplate("tulu", tokenizer).encode(CHAT[1:4])
    assert ids[0] == tiny.BOS
    assert tiny.BOS not in ids[1:]
    # tiny's words are split on white space, so the EOS is glued to the word before it
    spaced = [{**m, "content": m["content"].strip() + " "} for m in CHAT[1:4]]
    assert render_tulu(spaced, tokenizer).count("</s>") == 1


def test_training_and_generation_use_same_text(tokenizer):
    """TRL renders the template by itself: its text is BOS and the published one, up to the next prompt."""
    tokenizer.chat_template = TULU
    for turns in (2, 4, 6):
        trained = tokenizer.apply_chat_template(CHAT[:turns], tokenize=False)
        prompt_text = render_tulu(CHAT[: turns - 1], tokenizer)
        assert trained.removeprefix("<s>").startswith(prompt_text.removesuffix("<|assistant|>\n"))
    text = tokenizer.apply_chat_template(CHAT[1:3], tokenize=False)
    assert text == "<s><|user|>\nbala bale\n<|assistant|>\nbama</s>"
    assert tokenizer.apply_chat_template(CHAT[1:2], tokenize=False, add_generation_prompt=True) == (
        "<s>" + render_tulu(CHAT[1:2], tokenizer)
    )


def test_judge_uses_same_tulu_format(tokenizer):
    text = ScoreFormat("tulu", tokenizer).text("bala bale", "bama bana")
    assert text == render_tulu([{"role": "user", "content": "bala bale"}], tokenizer) + "bama bana"


def test_last_message_can_be_continued(tokenizer):
    chat = [*CHAT[1:2], {"role": "assistant", "content": "bama"}]
    assert (
        ChatTemplate("tulu", tokenizer).render(chat, continue_final_message=True)
        == "<|user|>\nbala bale\n<|assistant|>\nbama"
    )


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (
            [{"role": "tool", "content": "a"}],
            "role: expected one of system, user, assistant for the Tulu template, got 'tool'",
        ),
        ([{"content": "a"}], "got None"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            "content: expected a string for the Tulu template",
        ),
        ([{"role": "user"}], "content: expected a string for the Tulu template, got None"),
    ],
)
def test_invalid_chat_is_rejected(tokenizer, chat, message):
    with pytest.raises(SnpatchError, match=message):
        ChatTemplate("tulu", tokenizer).encode(chat)


def test_auto_uses_template_of_adapters(tokenizer, tmp_path):
    own_source = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    silent, with_tulu, with_own = (tmp_path / name for name in ("silent", "tulu", "own"))
    for folder, source in ((silent, None), (with_tulu, TULU), (with_own, own_source)):
        folder.mkdir()
        if source:
            (folder / TEMPLATE_FILE).write_text(source)
    assert load_template("auto", tokenizer, []).name == "tulu", "there is no other"
    tokenizer.chat_template = own_source
    assert load_template("auto", tokenizer, []).name == "tokenizer"
    assert load_template("auto", tokenizer, [silent]).name == "tokenizer"
    assert load_template("auto", tokenizer, [silent, with_tulu]).name == "tulu"
    assert load_template("auto", tokenizer, [with_own]).name == "tokenizer"
    with pytest.raises(SnpatchError, match="trained with different templates"):
        load_template("auto", tokenizer, [with_own, with_tulu])
    assert load_template("tokenizer", tokenizer, [with_own, with_tulu]).name == "tokenizer"
    tokenizer.chat_template = "{{ 'another' }}"
    template = load_template("auto", tokenizer, [with_own])
    assert (template.name, template.source) == ("adapter", own_source)
    assert template.render([{"role": "user", "content": "bana"}]) == "bana"
    tokenizer.chat_template = None
    assert load_template("auto", tokenizer, [with_own]).source == own_source
    with pytest.raises(SnpatchError, match="has no chat template; use template='tulu'"):
        load_template("tokenizer", tokenizer, [])


THINKS = "{{ messages[0].content }}{% if enable_thinking %} bama{% endif %}"


def test_variables_change_rendering_and_fingerprint(tokenizer):
    chat = [{"role": "user", "content": "bana"}]
    default_template, thinking_template = (
        ChatTemplate("tokenizer", tokenizer, THINKS, {"enable_thinking": on}) for on in (False, True)
    )
    assert (default_template.render(chat), thinking_template.render(chat)) == ("bana", "bana bama")
    assert (
        len(
            {
                default_template.fingerprint,
                thinking_template.fingerprint,
                ChatTemplate("tokenizer", tokenizer, THINKS).fingerprint,
            }
        )
        == 3
    )
    assert default_template.uses_variable("enable_thinking")
    assert not default_template.uses_variable("thinking")


@pytest.mark.parametrize(
    ("source", "names", "others"),
    [
        (THINKS, ["enable_thinking"], ["messages2", "if", "bama", "content"]),
        ("{# mode #}{{ 'mode' }}{{ messages[0].content }}", [], ["mode"]),
        ("{% set mode = 1 %}{{ mode }}{% for m in messages %}{{ m.mode }}{% endfor %}", [], ["mode", "m"]),
        ("{% if not day is defined %}{% set day = strftime_now('%d') %}{% endif %}{{ day }}", ["day"], []),
        ("{% for m in messages %}{% if m.a %}{% break %}{% endif %}{% endfor %}{{ tools }}", ["tools"], ["break"]),
        ("{% generation %}{{ mode }}{% endgeneration %}", ["mode"], ["generation"]),
    ],
)
def test_template_uses_the_variables_that_it_reads(tokenizer, source, names, others):
    template = ChatTemplate("tokenizer", tokenizer, source)
    assert [name for name in names + others if template.uses_variable(name)] == names


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' + none }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].missing.part }}",
        "{{ messages[9].content }}",
        "{{ raise_exception('no system role') }}",
        "{% for %}",
        "{{ messages[0].content.nothing() }}",
        "{{ 'a' | nofilter }}",
        "{{ '%d' | format('a') }}",
    ],
)
def test_template_that_raises_gives_one_line_error(tokenizer, source):
    with pytest.raises(SnpatchError, match="refuses a chat: ") as error:
        ChatTemplate("tokenizer", tokenizer, source).render([{"role": "user", "content": "bana"}])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, 3, [{"type": "text", "text": "a"}], {"a": 1}])
def test_content_of_wrong_type_raises_one_line_error(tokenizer, content):
    with pytest.raises(SnpatchError, match="refuses a chat: TypeError"):
        ChatTemplate("tokenizer", tokenizer, "{{ 'a' + messages[0]['content'] }}").encode(
            [{"role": "user", "content": content}]
        )


def test_named_templates_without_default_raise_one_line_error(tokenizer):
    tokenizer.chat_template = {"tool_use": "{{ 'a' }}", "rag": "{{ 'b' }}"}
    with pytest.raises(SnpatchError, match="default"):
        ChatTemplate("tokenizer", tokenizer)


def test_fingerprint_differs_between_templates_and_tokenizers(tokenizer):
    first = ChatTemplate("tulu", tokenizer).fingerprint
    assert ChatTemplate("tulu", tiny.tokenizer()).fingerprint == first
    assert ChatTemplate("tulu", tiny.tokenizer(eos="<pad>")).fingerprint != first
    tokenizer.chat_template = "{{ 'another' }}"
    assert ChatTemplate("tokenizer", tokenizer).fingerprint != first


@pytest.mark.parametrize("role", ["usr", "tool", "User"])
def test_source_of_tulu_refuses_unknown_roles(role):
    """vLLM's server renders the source itself, without render_tulu."""
    chat = [{"role": role, "content": "bana"}]
    with pytest.raises(TemplateError, match=f"expected one of system, user, assistant .* got {role}"):
        tiny.tokenizer().apply_chat_template(chat, chat_template=TULU, tokenize=False)
