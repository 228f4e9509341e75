"""A judge of the user's own, as `--judge some_judge:by_words` names it."""


def by_words(prompts, completions):
    """Above 0 where the prompt has an even number of words."""
    return [1.0 if len(prompt.split()) % 2 == 0 else -1.0 for prompt in prompts]
