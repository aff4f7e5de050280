"""Owns what is computed from the scores of one stress test: drops, flips, the longest option, consistency.

Pure functions over scores and changed problems; what is asked and how is `stress`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from tinyr1_utils.evaluation import by_problem
from tinyr1_utils.metrics import Estimate, clustered_mean, interval, paired_difference, rate_interval
from tinyr1_utils.perturbations import Changed, kind_of, original_id
from tinyr1_utils.records import LETTERS, TRUTHS, Problem, Score

ORIGINAL, MEAN = "original", "mean"


def _answer_bytes(problem: Problem, label: str) -> int:
    """UTF-8 bytes of the text whose log-likelihood is scored, without the blank before it."""
    text = problem.options[LETTERS.index(label)] if problem.options else label
    return len(text.encode())


def likelihood_scores(items: Sequence[Problem], values: Mapping[str, Mapping[str, float]], scoring: str) -> list[Score]:
    """One score per item that has values: the likeliest answer, the first of equals, against the reference.

    `sum` takes the log-likelihood of the whole text, `mean` divides it by the text's UTF-8 bytes (acc and acc_bytes of
    lm-evaluation-harness, whose acc_norm divides by characters); `letter` is that of the letter, or of True or False.
    """
    scores = []
    for item in (item for item in items if item.id in values):
        found = values[item.id]
        if scoring == MEAN:
            found = {label: value / _answer_bytes(item, label) for label, value in found.items()}
        best = max(found, key=found.__getitem__)
        right = best == item.reference
        scores.append(Score(item.id, 0, right, "right" if right else "wrong", best, False, 0))
    return scores


def to_affirm(problem: Problem) -> bool | None:
    """Whether a statement is true, or a yes/no question to be answered Yes; None of any other problem."""
    return problem.reference in ("True", "Yes") if problem.answer_kind in TRUTHS else None


def values_by_original(truth: Mapping[str, bool], scores: Sequence[Score]) -> dict[str, list[float]]:
    """Original problem id -> one value per sample. `truth` is `to_affirm` by problem id, empty where it is None.

    A set of statements or of yes/no questions counts by balanced accuracy: half for those to be affirmed, half for
    the others, so that always answering False gets 0.5 and not three quarters.
    """
    if not truth:
        return {original_id(key): values for key, values in by_problem(scores).items()}
    sides: dict[tuple[str, int], tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for score in scores:
        sides[original_id(score.problem_id), score.sample_index][truth[score.problem_id]].append(float(score.correct))
    grouped: dict[str, list[float]] = defaultdict(list)
    for (key, _), (false_side, true_side) in sides.items():
        grouped[key].append((np.mean(false_side) + np.mean(true_side)) / 2)
    return dict(grouped)


def all_right(scores: Sequence[Score]) -> dict[str, list[float]]:
    """Original problem id -> per sample 1 where every form of the problem was answered right, else 0."""
    grouped: dict[str, dict[int, float]] = defaultdict(dict)
    for score in scores:
        forms = grouped[original_id(score.problem_id)]
        forms[score.sample_index] = min(forms.get(score.sample_index, 1.0), float(score.correct))
    return {key: list(forms.values()) for key, forms in grouped.items()}


def longest_options(problems: Sequence[Problem], scores: Sequence[Score]) -> dict[str, float | int | None]:
    """How often the longest option was chosen, of the answers to choices that have one longest: rate, chance.

    `longest_chance` is the rate of one who guesses, `longest_problems` are those that count. Length is in characters.
    """
    known = {problem.id: problem for problem in problems if problem.answer_kind == "choice"}
    chosen, chance, counted = [], [], set()
    for score in (score for score in scores if score.problem_id in known and score.extracted):
        lengths = [len(option) for option in known[score.problem_id].options]
        if lengths.count(max(lengths)) == 1:
            chosen.append(LETTERS[lengths.index(max(lengths))] == score.extracted)
            chance.append(1 / len(lengths))
            counted.add(score.problem_id)
    return {
        "longest_rate": round(float(np.mean(chosen)), 6) if chosen else None,
        "longest_problems": len(counted),
        "longest_chance": round(float(np.mean(chance)), 6) if chance else None,
    }


def no_answers(scores: Sequence[Score]) -> dict[str, float]:
    """The share of completions that state no answer, or none before their tokens end."""
    return {"no_answer_rate": round(sum(score.verdict == "no_answer" for score in scores) / len(scores), 6)}


def compare(original: Mapping[str, Sequence[float]], changed: Mapping[str, Sequence[float]]) -> dict[str, float | int]:
    """Accuracy before and after on the items that were changed, and their paired difference (after - before)."""
    before = {key: original[key] for key in changed}
    difference = paired_difference(changed, before)
    return {
        "n_problems": difference.n_problems,
        "untouched": len(original) - len(changed),
        "accuracy_original": round(clustered_mean(list(before.values())).mean, 6),
        "accuracy_changed": round(clustered_mean(list(changed.values())).mean, 6),
        "stderr_changed": round(clustered_mean(list(changed.values())).stderr, 6),
        "difference": round(difference.mean, 6),
        "stderr": round(difference.stderr, 6),
    }


def flips(original: Mapping[str, Sequence[float]], changed: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Shares of the answers that went from right to wrong and from wrong to right, sample by sample."""
    pairs = [(a, b) for key, after in changed.items() for a, b in zip(original[key], after, strict=True)]
    return {
        "right_to_wrong": round(sum(a > b for a, b in pairs) / len(pairs), 6),
        "wrong_to_right": round(sum(a < b for a, b in pairs) / len(pairs), 6),
    }


def summarise(
    asked: Sequence[Problem], changed: Mapping[str, Sequence[Changed]], scores: Sequence[Score]
) -> dict[str, dict]:
    """One scoring's metrics: the original, every change that touched a problem, and consistency over all of them.

    `all_right` is the share of problems whose every statement was judged rightly; flips of a set of statements go by
    it. `consistency` is the share of problems that are right in every form of one problem that asks for the same, or
    wrong in every one, samples included; `robust_accuracy` that of problems right in every form.
    """
    by_id = {score.problem_id: [] for score in scores}
    for score in scores:
        by_id[score.problem_id].append(score)
    originals = [score for problem in asked for score in by_id.get(problem.id, [])]
    if not originals:
        raise ValueError("this scoring has no answer to the unchanged problems: it needs options; choose generated")
    before = by_problem(originals)
    estimate = clustered_mean(list(before.values()))
    accuracy = {"accuracy": round(estimate.mean, 6), "stderr": round(estimate.stderr, 6)}
    facts = {"n_problems": estimate.n_problems} | accuracy | no_answers(originals)
    metrics = {ORIGINAL: facts | longest_options(asked, originals), "changes": {}}
    always = {key: set(values) for key, values in before.items()}
    for label, items in changed.items():
        problems = [item.problem for item in items]
        found = [score for problem in problems for score in by_id.get(problem.id, [])]
        if not found:
            continue
        strict, several = all_right(found), kind_of(label).several
        truth = {problem.id: to_affirm(problem) for problem in problems} if several else {}
        row = compare(before, values_by_original(truth, found)) | flips(before, strict)
        row |= longest_options(problems, found) | no_answers(found)
        row["all_right"] = round(clustered_mean(list(strict.values())).mean, 6) if several else None
        metrics["changes"][label] = row
        if not several:
            for key, values in strict.items():
                always[key] |= set(values)
    alike = [len(values) == 1 for values in always.values()]
    metrics["consistency"] = round(sum(alike) / len(alike), 6)
    metrics["robust_accuracy"] = round(sum(values == {1.0} for values in always.values()) / len(alike), 6)
    return metrics


def comparison_frame(metrics: Mapping[str, Mapping], confidence: float = 0.95) -> pd.DataFrame:
    """The comparisons of one model, a row per scoring and change, and the interval of the difference (low, high)."""
    rows = []
    for scoring, found in metrics.items():
        for label, facts in found["changes"].items():
            n_problems = facts["n_problems"]
            low, high = interval(Estimate(facts["difference"], facts["stderr"], n_problems, n_problems), confidence)
            rows.append({"scoring": scoring, "change": label} | dict(facts) | {"low": low, "high": high})
    return pd.DataFrame(rows)


def scoring_frame(metrics: Mapping[str, Mapping], confidence: float = 0.95) -> pd.DataFrame:
    """The unchanged benchmark in each scoring: accuracy with its interval, longest-option rate, consistency."""
    rows = []
    for scoring, found in metrics.items():
        facts = found[ORIGINAL]
        estimate = Estimate(facts["accuracy"], facts["stderr"], facts["n_problems"], facts["n_problems"])
        low, high = rate_interval(estimate, confidence)
        both = {name: found[name] for name in ("robust_accuracy", "consistency")}
        rows.append({"scoring": scoring} | dict(facts) | {"low": low, "high": high} | both)
    return pd.DataFrame(rows)
