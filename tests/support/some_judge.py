"""A judge of the user's own, as `--judge some_judge:by_words` names it."""


def by_words(prompts, completions):
    """Above 0 where the prompt has an even number of words."""
    return [1.0 if len(prompt.split()) % 2 == 0 else -1.0 for prompt in prompts]


def by_letters(prompts, completions):
    """Some number that depends on the text alone."""
    return [sum(map(ord, completion)) % 97 / 10 for completion in completions]
