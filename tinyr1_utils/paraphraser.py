"""Owns longer options that a language model writes: each is judged by the model before it counts, and all are cached.

The second way to lengthen an option; the first, by rule, is `option_length`. Asks an OpenAI-compatible endpoint.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from tinyr1_utils.answers import extract_truth
from tinyr1_utils.artifacts import sha256_json
from tinyr1_utils.config import StressParameters
from tinyr1_utils.endpoints import endpoint_engine, endpoint_model
from tinyr1_utils.engines import Engine, Request
from tinyr1_utils.generation import CompletionsFile, draw_into, sample_seed
from tinyr1_utils.perturbations import PARAPHRASE, Change
from tinyr1_utils.problem_type import require_choice
from tinyr1_utils.records import Problem
from tinyr1_utils.sources import benchmark_name, source_named

WRITE = (
    "Below are a multiple-choice question and one of its options. Rewrite the option so that it has about {target} "
    "characters (it has {length} now). It must say the same: add no fact, no reason, no example and no number, drop "
    "nothing, and do not hint whether it is right. Reply with the rewritten option alone.\n\n"
    "Question: {question}\nOption: {option}"
)
JUDGE = (
    "Below are a question and two wordings of one answer to it. Do both wordings say exactly the same, so that nobody "
    "could call one right and the other wrong, and does neither add or drop anything? Put Yes or No in \\boxed{{}}.\n\n"
    "Question: {question}\nFirst wording: {option}\nSecond wording: {paraphrase}"
)
PARAPHRASER_URL = "paraphraser_url"  # what a paraphraser that does not answer is set by
ENOUGH = 0.75  # of the length that was asked for, or the text is no longer option
_DIGITS = re.compile(r"\d+")


def _wanted(problems: Sequence[Problem], changes: Sequence[Change]) -> dict[tuple[str, int, float], Problem]:
    """(problem id, option, ratio) -> problem, for every option that a paraphrasing change may lengthen."""
    wanted = {}
    for change in (change for change in changes if change.manner == PARAPHRASE):
        for problem in (problem for problem in problems if problem.answer_kind == "choice"):
            right = require_choice(problem)
            for index in range(len(problem.options)):
                side = "right" if index == right else "wrong"
                if change.name in ("longer_all", f"longer_{side}") or (side == "wrong" and change.name == "longer_one"):
                    wanted[problem.id, index, change.ratio] = problem
    return wanted


def _keeps(option: str, paraphrase: str, ratio: float) -> bool:
    """Whether a paraphrase is of the asked length and holds the option's numbers and no others."""
    long_enough = len(paraphrase) >= 1 + ENOUGH * (ratio * len(option) - 1) > len(option)
    return long_enough and sorted(_DIGITS.findall(option)) == sorted(_DIGITS.findall(paraphrase))


def _request(key: tuple[str, int, float], task: str, text: str, seed: int) -> Request:
    name = f"{key[0]}|{key[1]}|{key[2]:g}|{task}"
    return Request(name, 0, ({"role": "user", "content": text},), [], sample_seed(seed, name, 0))


def asking(parameters: StressParameters) -> StressParameters:
    """The parameters with the paraphraser in the place of the model under test."""
    update = {"endpoint_url": parameters.paraphraser_url, "endpoint_model": parameters.paraphraser_model}
    return parameters.model_copy(update=update | {"backend": "endpoint"})


def writer(parameters: StressParameters) -> str:
    """The paraphraser's name: `paraphraser_model` as it stands, else the first that its endpoint lists."""
    return parameters.paraphraser_model or endpoint_model(asking(parameters), PARAPHRASER_URL)


def paraphrases(
    problems: Sequence[Problem],
    changes: Sequence[Change],
    parameters: StressParameters,
    cache: Path,
    on_line: Callable[[str], None] = print,
) -> dict[tuple[str, int, float], str]:
    """(problem id, option's index, ratio) -> longer option, of those that were judged to say the same.

    The model writes, and in a second request judges what it wrote; numbers and length are checked first. Every answer
    is kept in a file of the folder `cache` that is known by model, benchmark and prompts: what is there is not asked
    again, by no run. An option without a paraphrase leaves its problem untouched. Raises ConnectionError when the
    endpoint does not answer (what has come is kept), ValueError for a confidential benchmark.
    """
    benchmark = benchmark_name(parameters.benchmark)
    if source_named(benchmark).confidential:
        raise ValueError(f"{benchmark} is confidential: its text is sent to no paraphraser; choose another manner")
    told = asking(parameters)
    known = {"model": writer(parameters), "benchmark": benchmark, "prompts": [WRITE, JUDGE], "seed": told.seed}
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{benchmark}-{sha256_json(known)[:12]}.jsonl"
    with FileLock(f"{path}.lock"):
        return _drawn(_wanted(problems, changes), CompletionsFile(path), told, on_line)


def _drawn(wanted, file: CompletionsFile, told: StressParameters, on_line) -> dict[tuple[str, int, float], str]:
    def engine() -> Engine:
        return endpoint_engine(told, setting=PARAPHRASER_URL)

    def ask(task: str, texts: dict[tuple[str, int, float], str]) -> dict[tuple[str, int, float], str]:
        requests = [_request(key, task, text, told.seed) for key, text in texts.items()]
        completions = draw_into(file, requests, told, engine, on_line)
        return {key: done.text.strip() for key, done in zip(texts, completions, strict=True)}

    options = {key: problem.options[key[1]] for key, problem in wanted.items()}
    lengths = {key: (len(option), round(key[2] * len(option))) for key, option in options.items()}
    written = ask(
        "write",
        {
            key: WRITE.format(target=target, length=length, question=wanted[key].question, option=options[key])
            for key, (length, target) in lengths.items()
        },
    )
    kept = {key: text for key, text in written.items() if _keeps(options[key], text, key[2])}
    judged = ask(
        "judge",
        {
            key: JUDGE.format(question=wanted[key].question, option=options[key], paraphrase=text)
            for key, text in kept.items()
        },
    )
    equal = {key: kept[key] for key, answer in judged.items() if extract_truth(answer, "yes_no") == "Yes"}
    on_line(f"paraphrases: {len(wanted)} written, {len(kept)} of fitting length and numbers, {len(equal)} judged equal")
    return equal
