"""Fixed date for chat templates that ask for today's, as tomorrow's prompt would be another one.

Why the date is written into the template's source: everything that renders it (the sandbox, vLLM's server, TRL) gives
the same string, and a fingerprint of the source covers the date.
"""

FIXED_DATE = "26 Jul 2024"  # as Llama 3's templates write where there is no clock
STRFTIME_VALUES = {  # on Friday, 26 July 2024, 00:00:00 UTC
    **{"%-d": "26", "%-m": "7", "%-H": "0", "%-I": "12", "%-M": "0", "%-S": "0", "%-j": "208", "%-y": "24"},
    **{"%F": "2024-07-26", "%D": "07/26/24", "%x": "07/26/24", "%T": "00:00:00", "%X": "00:00:00", "%R": "00:00"},
    **{"%c": "Fri Jul 26 00:00:00 2024", "%d": "26", "%e": "26", "%m": "07", "%y": "24", "%Y": "2024", "%G": "2024"},
    **{"%A": "Friday", "%a": "Fri", "%B": "July", "%b": "Jul", "%h": "Jul", "%u": "5", "%w": "5", "%j": "208"},
    **{"%U": "29", "%V": "30", "%W": "30", "%C": "20", "%H": "00", "%I": "12", "%M": "00", "%S": "00"},
    **{"%f": "000000", "%p": "AM", "%s": "1721952000", "%z": "+0000", "%Z": "UTC", "%%": "%"},
}
CLOCK_FUNCTION = "strftime_now"  # templates call it to get the date
_FIXED_CLOCK = (
    f"{{%- macro {CLOCK_FUNCTION}(format) -%}}{{{{ format"
    + "".join(f"|replace('{directive}', '{value}')" for directive, value in STRFTIME_VALUES.items())
    + " }}{%- endmacro -%}{{ '' }}"
)


def fix_date(template: str) -> str:
    """Return a chat template's source with its clock stopped at FIXED_DATE; unchanged if it uses no clock."""
    needs_fix = uses_clock(template) and not template.startswith(_FIXED_CLOCK)
    return _FIXED_CLOCK + template if needs_fix else template


def uses_clock(template: str) -> bool:
    """Return whether a chat template's source asks for the date."""
    return CLOCK_FUNCTION in template
