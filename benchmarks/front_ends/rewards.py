"""A reward for `python -m trl.scripts.grpo --reward_funcs rewards.distinct`."""


def distinct(completions: list[str], **kwargs: object) -> list[float]:
    """How many different characters a completion has."""
    return [float(len(set(completion))) for completion in completions]
