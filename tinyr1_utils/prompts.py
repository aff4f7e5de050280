"""Owns how a problem becomes the user's turn. Does not tokenise: the chat template belongs to the model."""

from tinyr1_utils.records import LETTERS, Problem

# The same words for every model and every size, in training and in evaluation: a template that differs
# between the two is one of the differences that the public TinyR1 scripts carry silently.
INSTRUCTIONS = {
    "number": "Reason step by step and put the final answer in \\boxed{}.",
    "expression": "Reason step by step and put the final answer in \\boxed{}.",
    "choice": "Reason step by step and put the letter of the right option in \\boxed{}.",
    "true_false": "Reason step by step and put True or False in \\boxed{}.",
    "code": "Reason step by step and put the final program in one Python code block.",
}


def options_block(options: tuple[str, ...]) -> str:
    """Options one a line as `A) text`."""
    return "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


def user_turn(problem: Problem) -> str:
    """The text of the user's turn: question, options if any, tests that the code must pass if any, instruction.

    A code problem shows its first test, as MBPP's prompt does, since only that fixes the function's name and types.
    """
    parts = [problem.question]
    if problem.options:
        parts.append(options_block(problem.options))
    if problem.answer_kind == "code" and problem.tests and problem.tests[0].startswith("assert"):
        parts.append(f"It must pass: {problem.tests[0]}")
    parts.append(INSTRUCTIONS[problem.answer_kind])
    return "\n".join(parts)


def chat(problem: Problem) -> list[dict[str, str]]:
    """The conversation up to the model's turn, for `tokenizer.apply_chat_template(..., add_generation_prompt=True)`."""
    return [{"role": "user", "content": user_turn(problem)}]
