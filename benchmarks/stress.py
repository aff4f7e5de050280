"""The stress test's cost: making changes, and scoring with every shared prefix computed once beside plain rows.

    .venv/bin/python benchmarks/stress.py --data-root DATA

Part `changes`: every rule-based change of every problem of three benchmarks, with its proof, on one core; the fastest
of five passes. `made_per_s` are changed problems, `tried_per_s` problems looked at: nouns leave most untouched.

Part `scoring`: ARC-Challenge items, each as it is and with its right or its wrong options lengthened at four ratios, by
letter and by text, on the micro backbone and on SmolLM2-135M in float32. `plain`: the rows of one query (context and
answer, without the last token, of which nothing is asked) as one padded batch, logits at the answers' places only.
`trie`: `likelihood.batches` of all forms of one item. Both score the same tokens; tokenising is outside of both. By
turns, item by item, until each took --seconds; the trie, being faster, several times per item. `tokens` are those of
the plain rows in both cases, so that the ratio of `tokens_per_s` is that of the times. Every value is compared: above
1e-3 apart the run ends with an error. Writes benchmarks/stress.csv, in place of the old rows of the same part
and model.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from make_run import processor
from transformers import AutoModelForCausalLM

from tinyr1_utils.backbones import resolve_backbone
from tinyr1_utils.chat_templates import load_tokenizer
from tinyr1_utils.likelihood import (
    MAX_NODES,
    Tokenised,
    answer_log_likelihoods,
    batches,
    letter_query,
    option_query,
    token_trie,
    tokens_of,
)
from tinyr1_utils.perturbations import Materials, make_changes, parse_changes
from tinyr1_utils.problem_type import Pool
from tinyr1_utils.prompts import chat
from tinyr1_utils.records import Problem
from tinyr1_utils.sources import load
from tinyr1_utils.stress import usable

RESULTS = Path(__file__).with_name("stress.csv")
MODELS = ("models/micro-backbone", "smollm2-135m-instruct")
LENGTHENED = "longer_right@1.5/2/3/4,longer_wrong@1.5/2/3/4"
BY_RULE = {
    "arc-challenge": "longer_right@4,longer_wrong@4,longer_one@4,longer_all@4,longer_right:restatement@4,"
    "longer_right:elaboration@4,shorter_wrong,true_false,yes_no,distractor,none_added,none_right,nouns,right_last",
    "mmlu-stem": "longer_right@4,longer_wrong@4,true_false,yes_no,open,distractor,none_added,none_right,nouns",
    "gsm8k": "four_way,true_false,yes_no,nouns,nouns:han",
}
PASSES = 5
TRIE_TURNS = 5
APART = 1e-3


def forms(problem: Problem) -> list[Problem]:
    """The item as it is, then with the right and with the wrong options lengthened at four ratios."""
    made = [make_changes(problem, change, Materials())[0] for change in parse_changes(LENGTHENED)]
    return [problem, *(changed.problem for changed in made)]


def changes(arguments: argparse.Namespace) -> list[dict]:
    """A row per benchmark and change, and one of all together."""
    done = []
    for name, labels in BY_RULE.items():
        problems = usable(load(name, arguments.data_root).problems)[0]
        materials = Materials(0, Pool.of(problems))
        for change in parse_changes(labels):
            seconds = []
            for _ in range(PASSES):
                started = time.perf_counter()
                made = sum(len(make_changes(problem, change, materials)) for problem in problems)
                seconds.append(time.perf_counter() - started)
            done.append(
                {"model": name, "what": change.label, "items": made, "tried": len(problems), "seconds": min(seconds)}
            )
    done.append(
        {"model": "all", "what": "all"} | {key: sum(row[key] for row in done) for key in ("items", "tried", "seconds")}
    )
    for row in done:
        row |= {"made_per_s": round(row["items"] / row["seconds"]), "tried_per_s": round(row["tried"] / row["seconds"])}
    return done


def tokenised(tokenizer, problem: Problem) -> list[Tokenised]:
    """Letter queries of all forms, then option queries of all forms."""
    question = [{"role": "user", "content": problem.question}]
    letters = [letter_query(tokenizer, chat(form), form) for form in forms(problem)]
    texts = [option_query(tokenizer, question, form) for form in forms(problem)]
    return [tokens_of(tokenizer, query) for query in (*letters, *texts)]


def rows(query: Tokenised) -> list[list[int]]:
    """What a network has to read of one query, an answer a row."""
    shared, own = query
    return [[*shared, *answer[:-1]] for answer in own]


def plain(network, queries: list[Tokenised]) -> list[list[float]]:
    """log p of every answer: one forward pass per query over its rows, padded on the right, which no token sees."""
    found = []
    for query in queries:
        (shared, own), lines = query, rows(query)
        width = max(map(len, lines))
        padded = torch.tensor([line + [0] * (width - len(line)) for line in lines])
        kept = list(range(len(shared) - 1, width))
        with torch.inference_mode():
            logs = network(padded, logits_to_keep=kept, use_cache=False).logits.float().log_softmax(-1)
        picked = [logs[number, range(len(answer)), answer].sum() for number, answer in enumerate(own)]
        found.append(torch.stack(picked).tolist())
    return found


def by_trie(network, queries: list[Tokenised], max_nodes: int) -> list[list[float]]:
    """The same by shared prefixes."""
    return [values for batch in batches(queries, max_nodes) for values in answer_log_likelihoods(network, batch)]


def apart(left: list[list[float]], right: list[list[float]]) -> float:
    """The largest difference of two lists of answers' values."""
    pairs = zip(itertools.chain(*left), itertools.chain(*right), strict=True)
    return max(abs(a - b) for a, b in pairs)


def compared(network, items: Iterator[list[Tokenised]], seconds: float, max_nodes: int) -> dict[str, float]:
    """Both ways by turns on item after item: seconds and tokens of each, nodes, and how far values are apart."""
    found = dict.fromkeys(("items", "plain_s", "trie_s", "tokens", "nodes", "apart"), 0)
    while min(found["plain_s"], found["trie_s"]) < seconds:
        queries = next(items)
        started = time.monotonic()
        expected = plain(network, queries)
        between = time.monotonic()
        for _ in range(TRIE_TURNS):
            values = by_trie(network, queries, max_nodes)
        ended = time.monotonic()
        found["apart"] = max(found["apart"], apart(values, expected))
        if found["apart"] > APART:
            raise ValueError(f"the two ways are {found['apart']} apart: the comparison is void")
        tries = [token_trie(row for query in batch for row in rows(query)) for batch in batches(queries, max_nodes)]
        found["items"] += 1
        found["plain_s"] += between - started
        found["trie_s"] += ended - between
        found["tokens"] += sum(len(row) for query in queries for row in rows(query))
        found["nodes"] += sum(len(tokens) for tokens, *_ in tries)
    return found


def scoring(arguments: argparse.Namespace) -> list[dict]:
    """Two rows per model: plain and trie."""
    done = []
    for name in arguments.models:
        folder = resolve_backbone(name)
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        tokenizer = load_tokenizer(folder)
        problems = load("arc-challenge", arguments.data_root, arguments.limit).problems
        items = (tokenised(tokenizer, problem) for problem in itertools.cycle(problems))
        compared(network, items, 0.1, arguments.max_nodes)  # to warm up
        found = compared(network, items, arguments.seconds, arguments.max_nodes)
        load_average = round(os.getloadavg()[0], 1)  # 2 where nothing else runs on two cores
        common = {"model": Path(name).name, "dtype": "float32", "load": load_average, "items": found["items"]}
        speed = found["tokens"] / found["plain_s"], TRIE_TURNS * found["tokens"] / found["trie_s"]
        done.append(common | {
            "what": "plain", "turns": 1, "tokens": found["tokens"], "seconds": round(found["plain_s"], 2),
            "tokens_per_s": round(speed[0], 1), "items_per_s": round(found["items"] / found["plain_s"], 3),
        })  # fmt: skip
        done.append(common | {
            "what": "trie", "turns": TRIE_TURNS, "tokens": found["tokens"], "seconds": round(found["trie_s"], 2),
            "tokens_per_s": round(speed[1], 1), "items_per_s": round(TRIE_TURNS * found["items"] / found["trie_s"], 3),
            "times_plain": round(speed[1] / speed[0], 2), "nodes_per_token": round(found["nodes"] / found["tokens"], 4),
            "max_nodes": arguments.max_nodes, "largest_difference": float(f"{found['apart']:.1e}"),
        })  # fmt: skip
    return done


PARTS: dict[str, Callable[[argparse.Namespace], list[dict]]] = {"changes": changes, "scoring": scoring}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--data-root", default="", help="folder with local data files, absolute")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--limit", type=int, default=200, help="items of ARC-Challenge, taken in turn")
    parser.add_argument("--seconds", type=float, default=60, help="how long each way is measured at least")
    parser.add_argument("--max-nodes", type=int, default=MAX_NODES)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--note", default="", help="what else ran on the machine, for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = {"threads": arguments.threads, "cores": os.cpu_count(), "processor": processor(), "note": arguments.note}
    frame = pd.DataFrame([
        {"part": part} | row | machine for part in arguments.parts for row in PARTS[part](arguments)
    ])  # fmt: skip
    if RESULTS.is_file():  # parts and models that were not measured now keep their rows
        old, measured = pd.read_csv(RESULTS), set(zip(frame["part"], frame["model"], strict=True))
        kept = [pair not in measured for pair in zip(old["part"], old["model"], strict=True)]
        frame = pd.concat([old[kept], frame], ignore_index=True)
    frame.to_csv(RESULTS, index=False)
    print(frame.to_string(index=False))


if __name__ == "__main__":
    main()
