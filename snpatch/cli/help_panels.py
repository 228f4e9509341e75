"""Panels of `--help`: options grouped by subject, common ones first.

Assigned by name when the command line starts, because most options are made from dataclasses that know no commands.
"""

PANELS = {
    "Model": (
        "model", "base", "model_name", "adapter", "checkpoint", "lora", "sft", "config", "backend", "template",
        "chat_template_kwargs",
    ),
    "Data": (
        "prompt", "form", "split", "column", "revision", "filter", "objective", "limit", "sample", "sample_seed",
        "skip_invalid",
    ),
    "Patch": (
        "patch", "recipient", "donor", "ranking", "constant", "window", "windows", "k", "positions", "strength",
        "strengths", "generate_with", "completions", "exclude_layer", "no_exclude_layers", "controls", "control_kind",
        "extra_controls", "coherence", "overlapping_controls", "target_effect", "monotone", "score_range", "blocks",
    ),
    "Guard": ("guard", "harm_threshold", "folds", "threshold", "refusal", "strengths", "balanced"),
    "Experiments": ("dry_run", "only", "start_at", "use_adapter", "launcher", "seed", "setting"),
    "Training": (
        "method", "learning_rate", "epochs", "batch_size", "micro_batch_size", "max_length", "max_prompt_length",
        "beta", "warmup_steps", "lr_scheduler_type", "weight_decay", "weight_decay_target", "lora_rank", "lora_targets",
        "max_dropped", "as_published", "seed", "gradient_checkpointing", "save_steps",
    ),
    "Sampling": (
        "max_tokens", "temperature", "top_p", "top_k", "min_tokens", "stop", "seed", "logprobs", "samples",
    ),
    "Judges": ("judge", "judge_format"),
    "Server": ("open_route", "allow_upload", "drain_s", "print_config"),
    "Output": ("out", "report_to", "as_json"),
    "Advanced": (
        "dtype", "device", "batch_size", "shard", "ray", "gpus", "max_restarts", "allow_untested", "engine_arg",
        "trust_config", "help",
    ),
    "Limits": (
        "max_requests", "max_waiting", "max_completions", "max_prompt_chars", "max_logprob_values", "max_grammar_chars",
        "max_sweep_windows", "max_sweep_completions", "max_uploads", "max_body_bytes", "max_incoming_bytes",
        "max_body_values", "body_timeout_s", "send_timeout_s",
    ),
}  # fmt: skip
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}
OTHER_PANEL = {  # (command, option): the name has another meaning there
    ("reproduce", "seed"): "Experiments",
    ("fit", "strengths"): "Guard",
    **{(command, name): "Training" for command in ("sft", "dpo") for name in ("batch_size", "seed")},
}
GROUPED_BY = ("engine_arg", "learning_rate")  # commands with one of these have many options


def arrange(command, parent=None) -> None:
    """Assign the options of a click command, or of all commands of a group, to panels.

    Flags show no value type.

    Args:
        command: The command.
        parent: Context of its group, which names its help option.
    """
    import typer

    context = typer.Context(command, parent=parent, info_name=command.name, **command.context_settings)
    for subcommand in getattr(command, "commands", {}).values():
        arrange(subcommand, context)
    options = [option for option in command.get_params(context) if option.param_type_name == "option"]
    for option in options:
        if getattr(option, "is_flag", False):
            option.metavar = ""
    if not any(option.name in GROUPED_BY for option in options):
        return  # few options
    for option in options:
        option.rich_help_panel = OTHER_PANEL.get((command.name, option.name), PANEL_OF.get(option.name, "Advanced"))
    command.params.sort(key=_place)


def _place(option) -> tuple[int, int]:
    """Return the place of an option: of its panel, and in it.

    Arguments come first, options without a place last.
    """
    panel = getattr(option, "rich_help_panel", None)
    if panel not in PANELS:
        return -1, 0
    names = PANELS[panel]
    return [*PANELS].index(panel), names.index(option.name) if option.name in names else len(names)
