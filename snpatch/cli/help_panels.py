"""Panels of `--help`: options grouped by subject, common ones first.

Assigned by name when the command line starts, because most options are made from dataclasses that know no commands.
"""

PANELS = {
    "Data": ("prompt", "form", "column", "skip_bad", "skip_invalid", "limit"),
    "Model": ("adapter", "checkpoint", "lora", "backend", "template", "chat_template_kwargs"),
    "Recipient, donor and neurons": (
        "recipient", "donor", "ranking", "window", "windows", "k", "positions", "strength", "generate_with",
        "completions", "exclude_layer", "no_exclude_layers", "controls", "control_kind", "overlapping_controls",
    ),
    "Sampling": (
        "max_tokens", "temperature", "top_p", "top_k", "min_tokens", "stop", "seed", "logprobs", "samples",
    ),
    "Judges": ("judge", "judge_format"),
    "Output": ("out", "as_json"),
    "Advanced": ("dtype", "device", "batch_size", "allow_untested", "engine_arg", "trust_config"),
}  # fmt: skip
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}
OTHER_MEANING = {("reproduce", "seed")}  # (command, option): the name has another meaning there


def arrange(command) -> None:
    """Assign the options of a click command, or of all commands of a group, to panels.

    Flags show no value type.
    """
    for subcommand in getattr(command, "commands", {}).values():
        arrange(subcommand)
    for option in command.params:
        if getattr(option, "is_flag", False):
            option.metavar = ""
    if not any(option.name == "engine_arg" for option in command.params):
        return  # no model is run: few options
    order = [*PANELS]
    for option in command.params:
        if option.param_type_name == "option" and (command.name, option.name) not in OTHER_MEANING:
            option.rich_help_panel = PANEL_OF.get(option.name)
    command.params.sort(key=lambda option: _place(option, order))


def _place(option, order: list[str]) -> tuple[int, int]:
    panel = getattr(option, "rich_help_panel", None)
    if panel not in PANELS:
        return -1, 0
    names = PANELS[panel]
    return order.index(panel), names.index(option.name) if option.name in names else len(names)
