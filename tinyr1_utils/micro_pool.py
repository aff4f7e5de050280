"""Owns the micro sets as `sources` serves them: held-out problems, and a raw pool of teacher traces with its faults.

Generates; reads no file. Deterministic in (domain, split, limit, seed).
"""

import random

from tinyr1_utils import micro_problems
from tinyr1_utils.records import Problem, Trace

# What is added to a run's seed: a split's problems are drawn apart from the training set's.
SEEDS = {"test": 1_000_000, "validation": 2_000_000}
HELD_OUT_PROBLEMS = {"test": 140, "validation": 130}  # of a set read whole; science holds little more
TRAIN_PROBLEMS = 2000
# Shares of the raw pool that curation has to find, as a crawled pool would hold them.
WRONG_SHARE, UNFINISHED_SHARE, REPEATED_SHARE, LEAKED_SHARE = 0.15, 0.03, 0.03, 0.02


def held_out(domain: str, split: str, limit: int, seed: int) -> list[Problem]:
    """`limit` problems of a validation or test split (0: HELD_OUT_PROBLEMS)."""
    return micro_problems.generate(domain, split, limit or HELD_OUT_PROBLEMS[split], seed + SEEDS[split])


def raw_pool(domain: str, limit: int, seed: int) -> tuple[list[Problem], dict[str, Trace]]:
    """`limit` training problems (0: TRAIN_PROBLEMS) with the scripted teacher's traces by problem id, in random order.

    Some traces are wrong or unfinished, some problems come twice and some are of the test split.
    """
    n_problems = limit or TRAIN_PROBLEMS
    rng = random.Random(f"micro-{domain}-train|{seed}")
    leaked = micro_problems.generate(domain, "test", int(n_problems * LEAKED_SHARE), seed + SEEDS["test"])
    problems = micro_problems.generate(domain, "train", n_problems - len(leaked), seed) + leaked
    shares = {"wrong_share": WRONG_SHARE, "unfinished_share": UNFINISHED_SHARE}
    traces = {problem.id: micro_problems.teach(problem, seed=seed, **shares) for problem in problems}
    problems += rng.sample(problems, int(n_problems * REPEATED_SHARE))
    rng.shuffle(problems)
    return problems, traces
