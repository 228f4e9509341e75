"""The date that chat templates write: the same in every run, as a prompt of today would be another text tomorrow.

Why it is put into the template's source: whoever renders it (the sandbox, vLLM's server, TRL) writes the same, and what
names texts by content names the date, too.
"""

DATE = "26 Jul 2024"  # what Llama 3's templates write where there is no clock
PARTS = {  # of strftime, for Friday, 26 July 2024, 00:00:00 UTC
    **{"%-d": "26", "%-m": "7", "%-H": "0", "%-I": "12", "%-M": "0", "%-S": "0", "%-j": "208", "%-y": "24"},
    **{"%F": "2024-07-26", "%D": "07/26/24", "%x": "07/26/24", "%T": "00:00:00", "%X": "00:00:00", "%R": "00:00"},
    **{"%c": "Fri Jul 26 00:00:00 2024", "%d": "26", "%e": "26", "%m": "07", "%y": "24", "%Y": "2024", "%G": "2024"},
    **{"%A": "Friday", "%a": "Fri", "%B": "July", "%b": "Jul", "%h": "Jul", "%u": "5", "%w": "5", "%j": "208"},
    **{"%U": "29", "%V": "30", "%W": "30", "%C": "20", "%H": "00", "%I": "12", "%M": "00", "%S": "00"},
    **{"%f": "000000", "%p": "AM", "%s": "1721952000", "%z": "+0000", "%Z": "UTC", "%%": "%"},
}
CLOCK = "strftime_now"  # the function by which templates ask for the date
_FIXED = (
    f"{{%- macro {CLOCK}(format) -%}}{{{{ format"
    + "".join(f"|replace('{part}', '{value}')" for part, value in PARTS.items())
    + " }}{%- endmacro -%}{{ '' }}"
)


def fix_date(template: str) -> str:
    """Return the source of a chat template with its clock standing at DATE; one without a clock is as it was."""
    return _FIXED + template if uses_clock(template) and not template.startswith(_FIXED) else template


def uses_clock(template: str) -> bool:
    """Return whether the source of a chat template asks for the date."""
    return CLOCK in template
