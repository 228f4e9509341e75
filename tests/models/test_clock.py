"""Chat templates that ask for the date render equally on every day."""

from datetime import UTC, datetime

import pytest
import tiny
from transformers.utils.chat_template_utils import render_jinja_template

from snpatch.models.clock import FIXED_DATE, STRFTIME_VALUES, fix_date
from snpatch.models.templates import TEMPLATE_FILE, TULU, ChatTemplate, load_template

CHAT, FRIDAY = [{"role": "user", "content": "hello"}], datetime(2024, 7, 26, tzinfo=UTC)


def render(source):
    """Return a chat as a tokenizer's own template writes it."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = source
    return ChatTemplate("tokenizer", tokenizer).render(CHAT)


LLAMA_3 = (
    "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n'
    '        {%- set date_string = "26 Jul 2024" %}\n    {%- endif %}\n{%- endif %}\n'
    '{{- "Today Date: " + date_string + "\\n\\n" }}{%- for message in messages %}{{- message.content }}{%- endfor %}'
)


@pytest.mark.parametrize("form", [*STRFTIME_VALUES, "%Y-%m-%d", "%d %b %Y", "%A, %B %d, %Y at %H:%M:%S", "%I:%M %p"])
def test_template_clock_is_fixed(form):
    moment = datetime(2024, 7, 26, tzinfo=UTC)
    assert moment.strftime("%d %b %Y") == FIXED_DATE
    assert render(f"{{{{ strftime_now('{form}') }}}}") == moment.strftime(form)


def test_templates_with_date_render_equally_on_every_day():
    assert render(LLAMA_3) == "<s>Today Date: 26 Jul 2024\n\nhello"
    beginning = "\n{%- set today = strftime_now('%Y-%m-%d') -%}\n {{ today.split('-')[0] | int + 1 }}"
    for source in (
        LLAMA_3,
        beginning,
        "\n x{{ strftime_now('%Y') }}",
        "{% if true %}\n{{ strftime_now('%d') }}{% endif %}",
    ):
        fixed = fix_date(source)
        assert fix_date(fixed) == fixed
        expected = render_jinja_template([CHAT], chat_template=source, bos_token="<s>", strftime_now=FRIDAY.strftime)
        assert render(source) == expected[0][0]


def test_fixed_date_changes_only_fingerprints_of_templates_with_clock(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = LLAMA_3
    assert ChatTemplate("tokenizer", tokenizer).source == fix_date(LLAMA_3) != LLAMA_3
    (tmp_path / TEMPLATE_FILE).write_text(LLAMA_3)
    assert load_template("auto", tokenizer, [tmp_path]).source == fix_date(LLAMA_3)
    (tmp_path / TEMPLATE_FILE).write_text(fix_date(LLAMA_3))
    assert load_template("auto", tokenizer, [tmp_path]).source == fix_date(LLAMA_3)
    tokenizer.chat_template = TULU
    assert ChatTemplate("tokenizer", tokenizer).source == TULU
