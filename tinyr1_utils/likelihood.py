"""Owns the second way to score multiple choice: the log-likelihood of given answers, without sampling.

An engine like those of `engines`, so that its completions are saved, resumed and graded like any other. A batch is one
trie of tokens, each of which attends to its own path from the root: what sequences begin with alike is computed once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyr1_utils.config import GenerationParameters
from tinyr1_utils.engines import Engine, Keep, Request
from tinyr1_utils.records import LETTERS, TRUTHS, Completion, Problem

OPENING = "The answer is \\boxed{"
OPTION_OPENING = "The answer is:"
# Attention costs nodes x nodes, whatever the mask leaves out: larger tries share more, but attend more in vain. On two
# cores 512 to 2048 are within a tenth of each other, 256 takes a third to a half longer.
MAX_NODES = 1024

Tokenised = tuple[list[int], list[list[int]]]  # a query's tokens: those that all answers share, each answer's own


@dataclass(frozen=True)
class Query:
    """What is scored together: a context and the texts that may follow it."""

    key: str  # the problem's id
    context: str  # the rendered prompt up to and with what opens the model's turn
    answers: tuple[str, ...]  # the continuations
    labels: tuple[str, ...]  # what a completion calls them: letters, True and False, or Yes and No


def labels_of(problem: Problem) -> tuple[str, ...]:
    """What the answers to a problem are called. ValueError where there are no answers to choose from."""
    if problem.answer_kind in TRUTHS:
        return TRUTHS[problem.answer_kind]
    if problem.answer_kind != "choice" or len(problem.options) < 2:
        raise ValueError(f"problem {problem.id} has no options, which choice_scoring 'log_likelihood' needs")
    return tuple(LETTERS[: len(problem.options)])


def _opened(tokenizer, messages: Sequence[dict[str, str]], opening: str) -> str:
    """The rendered prompt and `opening`; a thinking block that the template opens is closed in between."""
    prompt = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    if prompt.rstrip().endswith("<think>"):
        prompt = prompt.rstrip() + "\n\n</think>\n\n"
    return prompt + opening


def letter_query(tokenizer, messages: Sequence[dict[str, str]], problem: Problem) -> Query:
    """Asks for the label of the answer (a letter, True or False, Yes or No) behind OPENING. Errors as `labels_of`."""
    labels = labels_of(problem)
    return Query(problem.id, _opened(tokenizer, messages, OPENING), labels, labels)


def option_query(tokenizer, messages: Sequence[dict[str, str]], problem: Problem) -> Query:
    """Asks for the text of the answer behind OPTION_OPENING; `messages` are to ask without showing the options.

    Errors as `labels_of`.
    """
    labels = labels_of(problem)
    answers = tuple(f" {text}" for text in (problem.options if problem.answer_kind == "choice" else labels))
    return Query(problem.id, _opened(tokenizer, messages, OPTION_OPENING), answers, labels)


def tokens_of(tokenizer, query: Query) -> Tokenised:
    """The tokens that all answers share and each answer's own, of the whole texts context + answer.

    An answer's own tokens begin where those of any answer's whole text first differ from those of the context alone:
    every token of an answer counts and none of the context's, as in lm-evaluation-harness. But a token that straddles
    the boundary counts, and then its place counts for all answers. Raises ValueError for an empty answer or context.
    """
    texts = [query.context, *(query.context + answer for answer in query.answers)]
    context, *rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    columns = enumerate(zip(context, *rows, strict=False))
    shared = next((place for place, column in columns if len(set(column)) > 1), min(map(len, [context, *rows])))
    own = [row[shared:] for row in rows]
    if not shared or not all(query.answers) or not all(own):
        empty = "answer has no log-likelihood: restore its text or drop the problem" if shared else "context"
        raise ValueError(f"{query.key}: an empty {empty}")
    return context[:shared], own


def _grow(nodes: dict[tuple[int, int], int], row: Sequence[int]) -> list[int]:
    """Add a row to the trie `nodes`, (parent, token) -> number; the numbers of the row's tokens. The root is -1."""
    place, path = -1, []
    for token in row:
        place = nodes.setdefault((place, token), len(nodes))
        path.append(place)
    return path


def _rows(tokenised: Tokenised) -> list[list[int]]:
    """What the network reads of a query, a row per answer: nothing is asked of an answer's last token."""
    shared, own = tokenised
    return [[*shared, *tokens[:-1]] for tokens in own]


def token_trie(rows: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[list[int]]]:
    """Rows of token ids as one trie: tokens, depths and parents of its N nodes, and the nodes of each row's tokens.

    Three integer arrays of shape (N,). A prefix that several rows share is there once. A parent has a smaller number
    than its children; at depth 0 it is -1.
    """
    nodes: dict[tuple[int, int], int] = {}
    paths = [_grow(nodes, row) for row in rows]
    parent, tokens = (np.array(column, dtype=np.int64) for column in zip(*nodes, strict=True))
    depth = np.zeros_like(parent)
    for path in paths:
        depth[path] = np.arange(len(path))
    return tokens, depth, parent, paths


def ancestors(parent: np.ndarray) -> np.ndarray:
    """(N, N) booleans: whether the column's node lies on the path from the root to the row's node, itself included."""
    on_path = np.eye(len(parent), dtype=bool)
    for node, above in enumerate(parent):
        if above >= 0:
            on_path[node] |= on_path[above]
    return on_path


def check_full_attention(config) -> None:
    """ValueError where a layer of the model does not attend to all that stands before a token."""
    layers = getattr(config, "layer_types", None)
    if set(layers or ["full_attention"]) != {"full_attention"} or (not layers and getattr(config, "sliding_window", 0)):
        raise ValueError(
            "log-likelihoods need full attention in every layer, this model has others: set choice_scoring 'generated'"
        )


def answer_log_likelihoods(network, batch: Sequence[Tokenised]) -> list[list[float]]:
    """log p(answer | context) in nats of every answer of every query, by one forward pass over one trie of all of them.

    The softmax is in float32, whatever the network's dtype. Deterministic for one batch; the same query in another
    batch may differ in the last digits (float32: below 1e-4), since other shapes are summed in another order. Raises
    ValueError as `check_full_attention`.
    """
    import torch

    check_full_attention(network.config)
    tokens, depth, parent, paths = token_trie(row for query in batch for row in _rows(query))
    answers = [(len(shared), answer) for shared, own in batch for answer in own]
    # An answer's first token is predicted by the last shared one.
    asked = [node for path, (length, _) in zip(paths, answers, strict=True) for node in path[length - 1 :]]
    wanted = [token for _, answer in answers for token in answer]
    kept, lines = np.unique(asked, return_inverse=True)
    mask = torch.full((len(tokens), len(tokens)), torch.finfo(network.dtype).min, dtype=network.dtype)
    mask[torch.from_numpy(ancestors(parent))] = 0
    with torch.inference_mode():
        logits = network(
            input_ids=torch.from_numpy(tokens)[None].to(network.device),
            attention_mask=mask[None, None].to(network.device),  # 4-D: taken as it is, in place of a causal one
            position_ids=torch.from_numpy(depth)[None].to(network.device),
            logits_to_keep=kept.tolist(),  # a list, which indexes on whatever GPU the last layer lies
            use_cache=False,
        ).logits[0]
        totals = torch.cat([part.float().logsumexp(-1) for part in logits.split(256)])  # few rows in float32 at once
        logs = iter((logits[lines, wanted].float() - totals[lines]).tolist())
    return [[sum(next(logs) for _ in answer) for answer in own] for _, own in batch]


def batches(tokenised: Iterable[Tokenised], max_nodes: int = MAX_NODES) -> Iterator[list[Tokenised]]:
    """Consecutive queries whose trie has at most `max_nodes` nodes; a larger query goes alone."""
    batch, nodes = [], {}
    for query in tokenised:
        rows = _rows(query)
        for row in rows:
            _grow(nodes, row)
        if batch and len(nodes) > max_nodes:
            yield batch
            batch, nodes = [], {}
            for row in rows:
                _grow(nodes, row)
        batch.append(query)
    if batch:
        yield batch


def _completion(request: Request, query: Query, tokenised: Tokenised, values: Sequence[float]) -> Completion:
    best = query.labels[max(range(len(values)), key=values.__getitem__)]
    listed = ", ".join(f"{label} {value:.6f}" for label, value in zip(query.labels, values, strict=True))
    return Completion(*request.key, f"{listed}\n\\boxed{{{best}}}", "stop", len(tokenised[0]), 0)


def parse_values(text: str) -> dict[str, float]:
    """Label -> log-likelihood in nats, from the text of a completion of `likelihood_engine`. ValueError for another."""
    pairs = [part.split(" ") for part in text.partition("\n")[0].split(", ")]
    return {label: float(value) for label, value in pairs}


def likelihood_engine(model: Path, parameters: GenerationParameters, query_of: Callable[[Request], Query]) -> Engine:
    """An engine that answers each request with the likeliest answer of its query.

    A completion lists every answer's label and log-likelihood and boxes the best, the first of equals; `prompt_tokens`
    are those of the context. `keep` is called once per batch. The same chunk gives the same bytes again, but values may
    differ in the last digits where requests are batched otherwise; a chunk that was cut off between two batches goes on
    with the same batches. Runs in transformers, over all GPUs there are. Raises ValueError as `check_full_attention`,
    and for a query that is longer than max_seq_tokens.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    check_full_attention(AutoConfig.from_pretrained(model, trust_remote_code=False))
    torch.set_num_threads(parameters.threads)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    settings = {"dtype": getattr(torch, parameters.dtype), "attn_implementation": "sdpa"}
    settings |= {"device_map": "auto"} if torch.cuda.is_available() else {}
    network = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False, **settings).eval()

    def complete(chunk: Sequence[Request], keep: Keep = lambda done: None) -> list[Completion]:
        queries = [query_of(request) for request in chunk]
        tokenised = [tokens_of(tokenizer, query) for query in queries]
        for query, (shared, own) in zip(queries, tokenised, strict=True):
            if (length := len(shared) + max(map(len, own))) > parameters.max_seq_tokens:
                raise ValueError(f"{query.key} has {length} tokens, max_seq_tokens is too low: raise it")
        completions: list[Completion] = []
        for batch in batches(tokenised, MAX_NODES):
            part = slice(len(completions), len(completions) + len(batch))
            values = answer_log_likelihoods(network, batch)
            done = list(map(_completion, chunk[part], queries[part], batch, values))
            keep(done)
            completions += done
        return completions

    return complete
