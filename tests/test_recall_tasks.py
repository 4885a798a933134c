"""Recall in small tasks: facts stand where they should, a full cache loses nothing, and one pass gives what decoding gives."""

import pandas as pd
import pytest
import torch
from conftest import VOCABULARY
from transformers import AutoTokenizer, DynamicCache

from sketchkv import loading
from sketchkv.decode import generate, score
from sketchkv.study import recall
from sketchkv.study.methods import make_cache
from sketchkv.texts import Documents

FULL = {"method": "full"}
SMALL = {"method": "streaming", "max_cache_size": 32, "bits": 16}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(loading.EMBEDDED)


@pytest.fixture
def stub(gpt2, monkeypatch):
    """A small random model in the place of a loaded one, and random documents for it."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(recall, "_model", lambda name, device: (gpt2, None))
    monkeypatch.setattr(
        recall,
        "read_documents",
        lambda dataset, tokenizer, split, count, length: Documents(
            torch.randint(1, VOCABULARY, (count, length), generator=generator.manual_seed(0)),
            [f"d{i}" for i in range(count)],
        ),
    )
    return gpt2


@pytest.mark.parametrize("task", recall.TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_facts_stand_at_their_depth_and_the_answer_at_the_end(tokenizer, task, depth):
    filler = tokenizer("\n".join(f"x{i} = {i}" for i in range(400)), add_special_tokens=False)["input_ids"][
        :300
    ]
    fillers = torch.tensor([filler] * 6)
    ids, starts, answers = recall.make_instances(task, tokenizer, fillers, depth, seed=3)
    again = recall.make_instances(task, tokenizer, fillers, depth, seed=3)
    assert ids.shape == (6, 300) and torch.equal(ids, again[0]) and starts == again[1]
    assert not torch.equal(ids, recall.make_instances(task, tokenizer, fillers, depth, seed=4)[0])
    for row, start, count in zip(ids, starts, answers):
        answer = tokenizer.decode(row[-count:])
        fact = tokenizer.decode(row[start:])
        assert fact.startswith("\n") and abs(start - depth * 280) < 40
        # The answer is in the fact, once more at the end, and nowhere else.
        assert tokenizer.decode(row).count(answer.strip()) == 2 and fact.index(answer.strip()) < 80


def test_bad_recall_tasks_are_refused(tokenizer):
    fillers = torch.zeros(1, 300, dtype=torch.long)
    with pytest.raises(ValueError, match="choose one of needle"):
        recall.make_instances("riddle", tokenizer, fillers, 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        recall.make_instances("needle", tokenizer, fillers, 2)
    with pytest.raises(ValueError, match="longer one"):
        recall.make_instances("needle", tokenizer, fillers[:, :30], 0.5)


def test_one_pass_says_what_greedy_decoding_gives(gpt2):
    prompt = torch.randint(1, VOCABULARY, (2, 90), generator=torch.Generator().manual_seed(2))
    greedy = generate(gpt2, prompt, make_cache(gpt2.config, **SMALL), max_new_tokens=5)
    wrong = greedy.clone()
    wrong[1, -2] = (wrong[1, -2] + 1) % VOCABULARY
    for ids, expected in ((greedy, [1, 1]), (wrong, [1, 0])):
        found = recall.answer(gpt2, ids, [5, 3], make_cache(gpt2.config, **SMALL))
        nll = score(gpt2, ids, make_cache(gpt2.config, **SMALL))
        assert [exact for exact, _ in found] == expected
        assert [loglik for _, loglik in found] == pytest.approx(
            [-nll[0, -5:].mean().item(), -nll[1, -3:].mean().item()], rel=1e-4
        )


def test_a_row_tells_what_a_cache_answers(stub, monkeypatch):
    ids = torch.randint(1, VOCABULARY, (3, 120), generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(recall, "make_instances", lambda *a: (ids, [10, 20, 30], [2, 3, 2]))
    expected = recall.answer(stub, ids, [2, 3, 2], DynamicCache(config=stub.config))
    full, rows = (
        recall.recall(method, task="needle", depth=0.1, length=120, instances=3) for method in (FULL, SMALL)
    )
    assert [row["loglik"] for row in full] == pytest.approx([loglik for _, loglik in expected], abs=1e-5)
    assert set(rows[0]) == set(recall.COLUMNS) and [row["distance"] for row in rows] == [108, 97, 88]
    assert all(row["evicted"] > 0 for row in rows) and not any(row["evicted"] for row in full)
    assert all(row["loglik"] != whole["loglik"] for row, whole in zip(rows, full))


def test_shares_are_counted_near_and_far():
    rows = [
        {
            "method": name,
            "distance": distance,
            "exact": int(name == "full" or (name == "x" and distance == 10)),
        }
        for name in ("full", "x", "y")
        for distance in (10, 90)
        for _ in range(8)
    ]
    found = recall.shares(pd.DataFrame(rows), 50).set_index(["method", "where"])
    assert found.right.to_dict() == {
        ("full", "near"): 8,
        ("full", "far"): 8,
        ("x", "near"): 8,
        ("x", "far"): 0,
        ("y", "near"): 0,
        ("y", "far"): 0,
    }
    # None of 8: the exact upper limit solves (1 - p)^8 = 0.025.
    assert found.high["x", "far"] == pytest.approx(1 - 0.025 ** (1 / 8)) and found.low["x", "far"] == 0
    said = recall.caption(found.reset_index(), 50, 100, {"x": "X", "y": "Y"})
    assert said.startswith(
        "scores alone keep none of 8 facts beyond the cap. The full cache answers 8; 2 of 2"
    )
