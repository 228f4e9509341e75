"""Custom judges, for `--judge some_judge:by_words`."""


def by_words(prompts, completions):
    """Return scores above 0 for prompts with an even number of words."""
    return [1.0 if len(prompt.split()) % 2 == 0 else -1.0 for prompt in prompts]


def by_letters(prompts, completions):
    """Return scores that depend only on the completion."""
    return [sum(map(ord, completion)) % 97 / 10 for completion in completions]
