"""Log-likelihoods by a trie against plain conditional probabilities and lm-evaluation-harness, and their engine."""

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPOSITORY

from tinyr1_utils import evaluation, likelihood
from tinyr1_utils.chat_templates import TEMPLATES
from tinyr1_utils.config import load_config, stage_parameters
from tinyr1_utils.engines import Request
from tinyr1_utils.generation import requests
from tinyr1_utils.likelihood import (
    OPENING,
    OPTION_OPENING,
    Query,
    ancestors,
    answer_log_likelihoods,
    batches,
    check_full_attention,
    letter_query,
    likelihood_engine,
    option_query,
    parse_values,
    token_trie,
    tokens_of,
)
from tinyr1_utils.micro_problems import generate
from tinyr1_utils.prompts import chat, shown
from tinyr1_utils.records import LETTERS, Problem

MODEL = REPOSITORY / "models" / "micro-backbone"
PARAMETERS = stage_parameters(load_config(REPOSITORY / "configs/micro.yaml"), "evaluation", "backbone").model_copy(
    update={"choice_scoring": "log_likelihood", "dtype": "float32"}
)
CHOICE = Problem("c", "science", "s", "Which one?", "choice", "B", ("iron", "a gas", "tin"))


@pytest.fixture(scope="module")
def loaded():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return network, AutoTokenizer.from_pretrained(MODEL)


def one_by_one(network, shared, answer) -> float:
    """log p by the chain rule, one token and one unpadded forward pass at a time."""
    import torch

    total = 0.0
    for place, token in enumerate(answer):
        ids = torch.tensor([[*shared, *answer[:place]]])
        with torch.inference_mode():
            total += float(network(ids).logits[0, -1].double().log_softmax(-1)[token])
    return total


def random_batch(rng: random.Random, n_queries: int) -> list[tuple[list[int], list[list[int]]]]:
    """Queries whose contexts share beginnings of any length; answers of which some are alike or begin alike."""
    stem, batch = [rng.randrange(4, 1000) for _ in range(30)], []
    for _ in range(n_queries):
        shared = stem[: rng.randint(1, 30)] + [rng.randrange(4, 1000) for _ in range(rng.randint(0, 6))]
        own = [[rng.randrange(4, 1000) for _ in range(rng.randint(1, 6))] for _ in range(3)]
        batch.append((shared, [*own, own[0], own[1][:1], [*own[2], 7]]))
    return batch


def flat(values: list[list[float]]) -> list[float]:
    return [value for row in values for value in row]


@pytest.mark.parametrize("seed", range(3))
def test_every_answer_has_its_plain_conditional_log_probability(loaded, seed):
    network, _ = loaded
    batch = random_batch(random.Random(seed), 4)
    found = answer_log_likelihoods(network, batch)
    for (shared, own), values in zip(batch, found, strict=True):
        assert values == pytest.approx([one_by_one(network, shared, answer) for answer in own], abs=1e-4)
        assert values[3] == values[0], "equal answers"
    assert found == answer_log_likelihoods(network, batch)


@pytest.mark.parametrize(
    ("family", "heads"), [("Llama", {"num_key_value_heads": 1}), ("Qwen2", {"num_key_value_heads": 2})]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_families_and_dtypes(family, heads, dtype):
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = getattr(transformers, f"{family}Config")(**shape, num_attention_heads=2, **heads)
    network = getattr(transformers, f"{family}ForCausalLM")(config).eval().to(getattr(torch, dtype))
    batch = random_batch(random.Random(5), 3)
    expected = [one_by_one(network, shared, answer) for shared, own in batch for answer in own]
    assert flat(answer_log_likelihoods(network, batch)) == pytest.approx(
        expected, abs=1e-4 if dtype == "float32" else 0.1
    )


@pytest.mark.parametrize("max_nodes", [1, 60, 120])
def test_where_a_batch_ends_changes_nothing(loaded, max_nodes):
    network, _ = loaded
    tokenised = random_batch(random.Random(9), 8)
    parts = list(batches(tokenised, max_nodes))
    assert [query for part in parts for query in part] == tokenised
    assert len(parts) > 1 and (max_nodes > 1 or len(parts) == len(tokenised))
    found = [value for part in parts for value in answer_log_likelihoods(network, part)]
    assert flat(found) == pytest.approx(flat(answer_log_likelihoods(network, tokenised)), abs=1e-4)


def test_batches_are_as_large_as_they_may_be():
    tokenised = [([1, 2, 3], [[4, 5], [6, 7]]), ([1, 2, 3], [[4, 8], [9, 9]]), ([5] * 9, [[1]])]  # 5, 6 and 15 nodes
    assert [len(part) for part in batches(tokenised, 5)] == [1, 1, 1]
    assert [len(part) for part in batches(tokenised, 6)] == [2, 1]
    assert [len(part) for part in batches(tokenised, 14)] == [2, 1]
    assert [len(part) for part in batches(tokenised, 15)] == [3]
    assert list(batches([], 5)) == []


def test_a_trie_holds_every_prefix_once():
    rows = [[1, 2, 3], [1, 2, 4], [1, 2], [1, 2, 3], [2, 2, 3]]
    tokens, depth, parent, paths = token_trie(rows)
    assert tokens.tolist() == [1, 2, 3, 4, 2, 2, 3] and depth.tolist() == [0, 1, 2, 2, 0, 1, 2]
    assert parent.tolist() == [-1, 0, 1, 1, -1, 4, 5]
    assert paths == [[0, 1, 2], [0, 1, 3], [0, 1], [0, 1, 2], [4, 5, 6]]
    seen = ancestors(parent)
    for path in paths:
        assert np.flatnonzero(seen[path[-1]]).tolist() == path


def test_fewer_nodes_than_plain_tokens(loaded):
    _, tokenizer = loaded
    problems = generate("science", "test", 5, 1_000_000)
    queries = [letter_query(tokenizer, chat(problem), problem) for problem in problems]
    rows = [row for query in queries for row in likelihood._rows(tokens_of(tokenizer, query))]
    nodes, plain = len(token_trie(rows)[0]), sum(map(len, rows))
    assert nodes * 3 < plain


def test_letters_and_texts_are_asked_behind_their_openings(loaded):
    _, tokenizer = loaded
    messages = [{"role": "user", "content": "Which one?"}]
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if opened.endswith("<think>\n"):
        opened += "\n</think>\n\n"
    letters = letter_query(tokenizer, messages, CHOICE)
    assert letters == Query("c", opened + OPENING, ("A", "B", "C"), ("A", "B", "C"))
    texts = option_query(tokenizer, messages, CHOICE)
    assert texts == Query("c", opened + OPTION_OPENING, (" iron", " a gas", " tin"), ("A", "B", "C"))
    for query in (letters, texts):
        shared, own = tokens_of(tokenizer, query)
        assert [tokenizer.decode([*shared, *answer]) for answer in own] == [
            query.context + answer for answer in query.answers
        ]


@pytest.mark.parametrize(("kind", "labels"), [("true_false", ("True", "False")), ("yes_no", ("Yes", "No"))])
def test_statements_are_answered_by_their_words(loaded, kind, labels):
    _, tokenizer = loaded
    problem = SimpleNamespace(id="s", answer_kind=kind, options=())
    messages = [{"role": "user", "content": "Is it so?"}]
    assert letter_query(tokenizer, messages, problem).answers == labels
    texts = option_query(tokenizer, messages, problem)
    assert texts.labels == labels and texts.answers == tuple(f" {label}" for label in labels)


def test_a_thinking_block_that_the_template_opens_is_closed(loaded):
    _, tokenizer = loaded
    opens = TEMPLATES["chatml"].replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    messages = [{"role": "user", "content": "Which one?"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, chat_template=opens)
    assert rendered.endswith("<think>\n")
    stub = SimpleNamespace(apply_chat_template=lambda *a, **k: rendered)
    assert letter_query(stub, messages, CHOICE).context.endswith(f"<think>\n\n</think>\n\n{OPENING}")


class Splits:
    """A tokenizer that takes the longest of some pieces at each place."""

    def __init__(self, *pieces: str):
        self.pieces = sorted(pieces, key=len, reverse=True)

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [self.ids(text) for text in texts]}

    def ids(self, text: str) -> list[int]:
        found = []
        while text:
            piece = next(piece for piece in self.pieces if text.startswith(piece))
            found.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return found


def test_every_token_of_an_answer_counts_and_none_of_the_context():
    tokenizer = Splits("a", "b", "{", "x", "y")
    shared, own = tokens_of(tokenizer, Query("k", "ab{", ("xx", "xy"), ("A", "B")))
    assert (shared, own) == (tokenizer.ids("ab{"), [tokenizer.ids("xx"), tokenizer.ids("xy")])


def test_a_token_astride_the_boundary_counts_for_all_answers_alike():
    tokenizer = Splits("a", "b", "{", "x", "y", "{x")
    shared, own = tokens_of(tokenizer, Query("k", "ab{", ("x", "y"), ("A", "B")))
    assert (shared, own) == (tokenizer.ids("ab"), [tokenizer.ids("{x"), tokenizer.ids("{y")])


@pytest.mark.parametrize(("context", "answers"), [("ab", ("a", "")), ("", ("a", "b"))])
def test_nothing_to_score_or_to_go_by_is_refused(context, answers):
    with pytest.raises(ValueError, match="k7: an empty"):
        tokens_of(Splits("a", "b"), Query("k7", context, answers, ("A", "B")))


def test_a_problem_without_answers_is_refused(loaded):
    number = Problem("n1", "math", "s", "How many?", "number", "4")
    with pytest.raises(ValueError, match="n1 has no options"):
        letter_query(loaded[1], chat(number), number)


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({"layer_types": ["full_attention"] * 2, "sliding_window": 64}, True),
        ({"layer_types": ["full_attention", "sliding_attention"]}, False),
        ({"layer_types": ["linear_attention", "full_attention"]}, False),
        ({"sliding_window": 64}, False),
        ({"sliding_window": None}, True),
        ({}, True),
    ],
)
def test_other_than_full_attention_is_refused(fields, fits):
    if fits:
        return check_full_attention(SimpleNamespace(**fields))
    with pytest.raises(ValueError, match="choice_scoring 'generated'"):
        check_full_attention(SimpleNamespace(**fields))


def test_the_engine_refuses_a_sliding_window_before_it_reads_weights(tmp_path):
    from transformers import Qwen2Config

    config = Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=1, num_hidden_layers=3)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="full attention in every layer"):
        likelihood_engine(tmp_path, PARAMETERS, lambda request: None)


def test_a_query_that_is_too_long_is_refused(loaded):
    query = letter_query(loaded[1], [{"role": "user", "content": "Which one?"}], CHOICE)
    engine = likelihood_engine(MODEL, PARAMETERS.model_copy(update={"max_seq_tokens": 8}), lambda request: query)
    with pytest.raises(ValueError, match=r"c has .* max_seq_tokens"):
        engine([Request("c", 0, (), [], 0)])


def test_as_lm_evaluation_harness(loaded):
    """The reference that someone else wrote: its own tokens, batches and sums of (context, continuation) pairs."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    network, tokenizer = loaded
    harness = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=2)
    problems = generate("science", "test", 4, 1_000_000)
    queries = [query(tokenizer, chat(p), p) for p in problems for query in (letter_query, option_query)]
    pairs = [(query.context, answer) for query in queries for answer in query.answers]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    expected = [value for value, _ in harness.loglikelihood(asked, disable_tqdm=True)]
    found = answer_log_likelihoods(network, [tokens_of(tokenizer, query) for query in queries])
    assert flat(found) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("make", [letter_query, option_query])
def test_the_engine_boxes_the_likeliest_answer(loaded, make, monkeypatch):
    network, tokenizer = loaded
    monkeypatch.setattr(likelihood, "MAX_NODES", 150)
    problems = {problem.id: problem for problem in generate("science", "test", 5, 1_000_000)}
    drawn = [Request(p.id, sample, tuple(chat(p)), [], 0) for p in problems.values() for sample in (0, 1)]
    kept, calls = [], []

    def keep(done):
        kept.extend(done)
        calls.append(len(done))

    engine = likelihood_engine(
        MODEL, PARAMETERS, lambda request: make(tokenizer, request.messages, problems[request.problem_id])
    )
    completions = engine(drawn, keep)
    assert completions == kept == engine(drawn) and len(calls) > 1
    for request, completion in zip(drawn, completions, strict=True):
        problem = problems[request.problem_id]
        shared, own = tokens_of(tokenizer, make(tokenizer, request.messages, problem))
        values = [one_by_one(network, shared, answer) for answer in own]
        assert completion.text.endswith(f"\\boxed{{{LETTERS[values.index(max(values))]}}}")
        assert parse_values(completion.text) == pytest.approx(dict(zip(LETTERS, values, strict=False)), abs=1e-3)
        assert (completion.problem_id, completion.sample_index) == request.key
        assert (completion.finish_reason, completion.prompt_tokens, completion.output_tokens) == (
            "stop",
            len(shared),
            0,
        )


def test_evaluation_asks_every_sample_with_its_own_order_of_options(loaded):
    network, tokenizer = loaded
    problem = dataclasses.replace(CHOICE, metadata={"shuffled": "c"})
    wanted = requests([problem], tokenizer, PARAMETERS.model_copy(update={"n_samples": 4}))
    assert len({request.messages[0]["content"] for request in wanted}) > 1
    completions = evaluation.lazy_engine(MODEL, PARAMETERS, [problem])()(wanted)
    for request, completion in zip(wanted, completions, strict=True):
        seen = shown(problem, PARAMETERS.seed, request.sample_index)
        shared, own = tokens_of(tokenizer, letter_query(tokenizer, chat(seen), seen))
        values = [one_by_one(network, shared, answer) for answer in own]
        assert parse_values(completion.text) == pytest.approx(dict(zip(LETTERS, values, strict=False)), abs=1e-4)


def test_values_are_read_back_and_the_first_of_equals_is_boxed():
    request, query = Request("p", 3, (), [], 0), Query("p", "c", ("x", "y", "z"), ("A", "B", "C"))
    completion = likelihood._completion(request, query, ([1, 2], []), [-2.5, -1.25, -1.25])
    assert completion.text == "A -2.500000, B -1.250000, C -1.250000\n\\boxed{B}"
    assert parse_values(completion.text) == {"A": -2.5, "B": -1.25, "C": -1.25}
    with pytest.raises(ValueError):
        parse_values("I think that it is B.")
