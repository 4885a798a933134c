"""The runner of the pretrained study on a small random Llama, its peers and its questions, against arithmetic done apart."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import VOCABULARY, build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, Gemma3TextConfig, PreTrainedTokenizerFast

import sketchkv
from sketchkv import texts
from sketchkv.study import measured, measuring, pretrained, pretrained_tables
from sketchkv.study.methods import fit, full_nbytes, make_cache, nbytes
from sketchkv.study.questions import DEPTHS, FORMS, TASKS, instances
from sketchkv.texts import Documents

TOKENS = 320


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCABULARY]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Random ids in the form of `prepare`: two documents a text, two instances, three to choose a form on."""
    path, draw = tmp_path_factory.mktemp("ids") / "ids.npz", torch.Generator().manual_seed(0)
    arrays, names = {}, {f"development_{TOKENS}": ["a", "b", "c"], f"test_{TOKENS}": ["d", "e"]}

    def add(name, label, *shape):
        arrays[name] = (
            torch.randint(1, VOCABULARY, (*shape, TOKENS), generator=draw).numpy().astype(np.uint16)
        )
        names[name] = label

    for text in measured.TEXTS:
        add(f"{text}_{TOKENS}", [f"{text} 0", f"{text} 1"], 2)
    for task in TASKS:
        for form in FORMS:
            add(f"test_{TOKENS}_{task}_{form}", [2, 9], 2, len(DEPTHS))
            add(f"development_{TOKENS}_{task}_{form}", [2, 9], 3, 1)
    np.savez_compressed(path, names=np.array(json.dumps(names)), **arrays)
    return path


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(measured, "LENGTH", TOKENS)
    monkeypatch.setattr(measured, "SHARES", (1 / 2,))
    monkeypatch.setattr(measured, "FIRST", ("streaming", "decayed", "sketch"))
    keep = ("streaming", "decayed", "sketch", "h2o")
    monkeypatch.setattr(measured, "BOUNDED", {name: measured.BOUNDED[name] for name in keep})
    monkeypatch.setattr(measured, "WHOLE", {"kivi2": measured.WHOLE["kivi2"]})
    monkeypatch.setattr(measured, "ASKED", ("full", "streaming"))
    monkeypatch.setattr(measured, "NEAR", 64)


def start(weights, prepared, out, **own):
    return pretrained.Run(prepared, weights, out, "cpu", "abc", out / "none", **own)


def test_quality_is_measured_once_and_written(weights, prepared, small, tmp_path, capsys):
    done, failed, left = start(weights, prepared, tmp_path).run("quality", 600)
    table = pd.read_csv(tmp_path / "pretrained_quality.csv")
    assert (done, failed, left) == (5, 0, 0) and list(table.columns) == list(measured.QUALITY)
    assert list(table.name.unique()) == ["near", "streaming", "decayed", "h2o", "kivi2"]
    assert table.groupby(["name", "text"]).size().eq(2).all()
    notes = json.loads((tmp_path / "pretrained_quality.json").read_text())
    assert len(notes["left_out"]) == 1 and "sketch" in notes["left_out"][0]  # its counters alone are more

    lm = sketchkv.enable(build("llama"))
    ids = torch.from_numpy(np.load(prepared)["code_320"].astype(np.int64))
    full = torch.nn.functional.cross_entropy(
        lm(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    kept = table[(table.name == "streaming") & (table.text == "code")]
    own = sketchkv.SketchCache(lm.config, int(kept.max_cache_size.iloc[0]), policy=sketchkv.Window(), bits=16)
    losses = sketchkv.score(lm, ids, own)
    assert np.allclose(kept.nll_full, full.mean(1), atol=1e-5)
    assert np.allclose(kept.nll, losses.mean(1), atol=1e-5)
    assert np.allclose(kept.nll_late, losses[:, TOKENS // 2 :].mean(1), atol=1e-5)
    assert (kept.kl > 0).all() and kept.top1.between(0, 1).all()
    assert (kept.bytes_total <= kept.bytes_full / 2).all() and (
        kept.bytes_total > 0.9 * kept.bytes_full / 2
    ).all()
    assert np.allclose(kept.bytes_total, kept.bytes_held, rtol=0.01)

    # What is there is not measured again; another setting is, and replaces it.
    before = (tmp_path / "pretrained_quality.csv").read_bytes()
    assert start(weights, prepared, tmp_path).run("quality", 600) == (0, 0, 0)
    assert (tmp_path / "pretrained_quality.csv").read_bytes() == before
    measured.BOUNDED["decayed"] = measured.BOUNDED["decayed"] | {"decay": 0.9}
    assert start(weights, prepared, tmp_path).run("quality", 600)[0] == 1
    again = pd.read_csv(tmp_path / "pretrained_quality.csv")
    assert len(again) == len(table) and set(again.settings) - set(table.settings)
    assert start(weights, prepared, tmp_path / "other").run("quality", 0) == (0, 0, 6)


def test_several_processes_give_the_same(weights, prepared, tmp_path):
    for workers in (1, 2):
        run = start(weights, prepared, tmp_path / str(workers))
        group = {"table": "pretrained_quality", "texts": ["code"], "tokens": TOKENS, "share": 0.5}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                measured, "groups", lambda piece: [group | {"name": n} for n in ("streaming", "tova")]
            )
            assert run.run("quality", 300, workers) == (2, 0, 0)
    one, two = (
        pd.read_csv(tmp_path / n / "pretrained_quality.csv").sort_values(["name", "document"]) for n in "12"
    )
    assert np.allclose(one.nll, two.nll, atol=1e-6) and list(one.settings) == list(two.settings)


def test_recall_counts_cells_that_the_full_cache_answers(weights, prepared, small, tmp_path, monkeypatch):
    start(weights, prepared, tmp_path).run("recall-4096", 600)
    table = pd.read_csv(tmp_path / "pretrained_recall.csv")
    assert set(table.name) == {"full"} and len(table) == len(TASKS) * len(DEPTHS) * 2  # random: none answered
    monkeypatch.setattr(measured, "COUNTS", 0)
    assert start(weights, prepared, tmp_path).run("recall-4096", 600)[0] == len(TASKS)
    table = pd.read_csv(tmp_path / "pretrained_recall.csv")
    assert len(table) == 2 * len(TASKS) * len(DEPTHS) * 2
    forms = json.loads((tmp_path / "pretrained_recall.json").read_text())["forms"]
    assert all(form["n"] == 3 and form["form"] in FORMS for form in forms.values()) and len(forms) == len(
        TASKS
    )


@pytest.mark.parametrize(
    "method",
    [None, {"method": "streaming", "max_cache_size": 400}, {"method": "recall", "max_cache_size": 400}],
)
def test_answers_are_what_greedy_decoding_gives(method, llama):
    ids = torch.randint(1, VOCABULARY, (3, 200), generator=torch.Generator().manual_seed(3))
    greedy = sketchkv.generate(llama, ids[:, :-4], max_new_tokens=4)[:, -4:]
    ids[:2, -4:] = greedy[:2]  # two rows get the right answer, the third a wrong one
    ids[2, -4:] = (greedy[2] + 1) % VOCABULARY
    cache = make_cache(llama.config, **method) if method else DynamicCache(config=llama.config)
    exact, loglik = measuring.answers(llama, ids, 4, 30, cache)
    logprobs = llama(ids).logits.log_softmax(-1)
    expected = logprobs[:, -5:-1].gather(-1, ids[:, -4:, None]).mean((1, 2))
    if method is None or method["method"] == "streaming":
        assert exact == [1, 1, 0] and np.allclose(loglik, expected, atol=1e-4)
    else:  # keys and values in codes
        assert exact[2] == 0 and np.allclose(loglik, expected, atol=2)


def test_near_losses_are_those_of_texts_cut_short(llama):
    ids = torch.randint(1, VOCABULARY, (2, 45), generator=torch.Generator().manual_seed(4))
    got = measuring.near_losses(llama, ids, seen=12, stride=4)
    assert got.shape == (2, 44)
    for at in range(44):
        begin = 0 if at < 12 else at - at % 4 + 4 - 12
        assert at + 1 - begin <= 12 and (at < 12 or at + 1 - begin > 8)
        logprobs = llama(ids[:, begin : at + 1]).logits[:, -1].log_softmax(-1)
        assert torch.allclose(got[:, at], -logprobs.gather(1, ids[:, at + 1, None])[:, 0], atol=1e-4)


@pytest.fixture(scope="module")
def llama():
    return sketchkv.enable(build("llama"))


def test_h2o_as_published_gives_half_to_the_newest(llama):
    ids = torch.randint(1, VOCABULARY, (1, 200), generator=torch.Generator().manual_seed(5))
    cache = make_cache(llama.config, "h2o", max_cache_size=60, recent_share=0.5)
    sketchkv.score(llama, ids[:, :188], cache)  # 60 and 8 blocks of 16: right after an eviction
    for layer in range(2):
        kept = cache.kept_positions(layer)
        newest = torch.arange(188 - 30, 188)
        assert (kept[..., None] == newest).any(2).all()
        assert ((kept >= 0) & (kept < 188 - 30)).sum(-1).eq(30).all()


def test_expected_attention_beside_numpy(llama):
    """Queries before their rotation, caught behind the projection; rotations as complex numbers."""
    queries, tokens, cap = {}, 72, 40
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(
            lambda module, given, out, at=i: queries.setdefault(at, []).append(out.detach().double().numpy())
        )
        for i, layer in enumerate(llama.model.layers)
    ]
    ids = torch.randint(1, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(6))
    cache = make_cache(llama.config, "expected", max_cache_size=cap, evict_every=tokens - cap + 8, future=20)
    sketchkv.score(llama, ids, cache, chunk_size=24)
    for hook in hooks:
        hook.remove()
    frequencies = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    angle = np.exp(1j * (tokens + np.arange(20))[:, None] * frequencies).mean(0)
    for at, layer in enumerate(cache.layers):
        own = np.concatenate(queries[at], 1).reshape(2, tokens, 4, 16)[:, 4:]
        as_complex = lambda x: x[..., :8] + 1j * x[..., 8:]  # noqa: E731
        turned = as_complex(own) * angle
        ahead = np.concatenate([turned.real, turned.imag], -1)  # averaging turns is linear
        keys = layer.slots["keys"].double().numpy()
        values = np.linalg.norm(layer.slots["values"].double().numpy(), axis=-1)
        score = layer.policy.score(layer.slots, tokens).numpy()
        for row in range(2):
            for head in range(2):
                attention = 0
                for query in (2 * head, 2 * head + 1):
                    mean = ahead[row, :, query].mean(0)
                    spread = np.cov(ahead[row, :, query].T, bias=True)
                    logits = (
                        keys[row, head] @ mean / 4
                        + np.einsum("ud,de,ue->u", keys[row, head], spread, keys[row, head]) / 32
                    )
                    weights = np.exp(logits[4:] - logits[4:].max())
                    attention = attention + weights / weights.sum() / 2
                expected = attention * values[row, head, 4:]
                assert np.allclose(score[row, head, 4:], expected, rtol=2e-3, atol=1e-6)


def test_expected_attention_refuses_turned_keys(llama):
    cache = make_cache(llama.config, "expected", max_cache_size=40, bits=4)
    with pytest.raises(ValueError, match="bits=16"):
        sketchkv.score(llama, torch.ones(1, 60, dtype=torch.long), cache)


@pytest.mark.parametrize("name", ["compact", "recall", "h2o", "snapkv", "expected"])
def test_caps_fill_the_budget_and_no_more(name, llama):
    method = {"method": name} if name in ("compact", "recall") else {"method": name, "bits": 16}
    method |= {"h2o": {"recent_share": 0.5}, "recall": {"store": "device"}}.get(name, {})
    budget = full_nbytes(llama.config, 4096) // 4
    cap = fit(llama.config, budget, length=4096, **method)
    held = [nbytes(llama.config, 4096, max_cache_size=cap + more, **method)["total"] for more in (0, 1)]
    assert held[0] <= budget < held[1]


@pytest.mark.parametrize("name", ["compact", "recall", "decayed"])
def test_of_a_hybrid_the_layers_count_that_attend_to_the_whole_text(name):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        num_hidden_layers=3, layer_types=kinds, sliding_window=600, num_key_value_heads=2, head_dim=16
    )
    # Keys and values, whole-text layers, heads, numbers, tokens, bytes.
    assert full_nbytes(config, 4096) == 2 * 1 * 2 * 16 * 4096 * 2
    method, budget = measured.BOUNDED[name], full_nbytes(config, 4096) // 8
    cap = fit(config, budget, length=4096, **method)
    cache = make_cache(config, length=4096, max_cache_size=cap, **method)
    assert [layer.max_cache_size for layer in cache.layers] == [600, cap, 600]  # windows stay whole
    held = [nbytes(config, 4096, max_cache_size=cap + more, **method)["total"] for more in (0, 1)]
    assert held[0] <= budget < held[1]


def test_texts_are_prepared_for_a_model_that_nobody_can_ask(tmp_path, monkeypatch):
    alphabet = {letter: i + 70000 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(alphabet, [])))
    found = Documents(torch.tensor([[70001, 70002]]), ["a"])
    monkeypatch.setattr(texts, "documents", lambda *asked: found)
    measured.prepare(tmp_path / "ids.npz", tokenizer)
    ids, names = measured.prepared(str(tmp_path / "ids.npz"))
    assert torch.equal(ids["prose_4096"], found.input_ids)  # larger than 16 bits
    assert names["code_4096"] == ["a"] and not any("needle" in name for name in ids)


def test_a_store_on_the_device_gives_the_same(llama):
    ids = torch.randint(1, VOCABULARY, (2, 230), generator=torch.Generator().manual_seed(7))
    caches = [
        make_cache(llama.config, "recall", max_cache_size=100, exact_prompts=False, store=store)
        for store in ("host", "device")
    ]
    host, device = (sketchkv.score(llama, ids, cache) for cache in caches)
    assert torch.equal(host, device)
    cache = make_cache(llama.config, "recall", max_cache_size=100, store="device")
    plain = make_cache(llama.config, "recall", max_cache_size=100)
    assert torch.equal(
        sketchkv.generate(llama, ids, cache, max_new_tokens=5),
        sketchkv.generate(llama, ids, plain, max_new_tokens=5),
    )


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of single bytes, which has a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", TASKS)
def test_questions_can_be_answered_from_the_text(task, form, letters):
    filler = "A sentence of the filler text. " * 100
    fillers = torch.tensor([letters(f"{start}{filler}")["input_ids"][:2600] for start in "xyz"])
    seen = []
    for depth in (0.1, 0.9):
        ids, answer, tail = instances(task, letters, fillers, depth, form)
        assert ids.shape == fillers.shape and answer == 6
        for row in ids:
            text = letters.decode(row)
            number, asked = text[-5:], text[:-6].rsplit(" of the ", 1)[1].removesuffix(" is")
            before = text[: len(text) - tail]
            assert number.isdigit() and before.count(number) == 1
            assert ("<user>" in text) == (form == "chat") and text.endswith(f"{asked} is {number}")
            if task in ("needle", "four_keys"):
                assert f"The secret number of the {asked} is {number}." in before
            elif task == "key_value":
                assert f"{asked}: {number}" in before and before.count(": ") >= 8
            else:  # the chain leads from the name that is asked for to the number
                for _ in range(2):
                    asked = before.split(f"of the {asked} is the same as the code of the ")[1].split(".")[0]
                assert f"The code of the {asked} is {number}." in before
            place = before.index(number) / len(before)
            assert abs(place - depth) < 0.25
            seen.append(number)
    assert len(set(seen)) == 3  # the same at each depth
    with pytest.raises(ValueError, match="no room"):
        instances(task, letters, fillers[:, :200], 0.5, form)
    with pytest.raises(ValueError, match="choose a task"):
        instances("riddle", letters, fillers, 0.5)


@pytest.mark.parametrize("piece", ["sweep", "attention"])
def test_other_pieces_are_measured_once(piece, weights, prepared, small, tmp_path, monkeypatch):
    groups = measured.groups(piece)
    assert len({group["name"] for group in groups}) == len(groups) == {"sweep": 144, "attention": 2}[piece]
    kept = [g | {"tokens": TOKENS, "ids": f"code_{TOKENS}"} for g in groups[:: max(1, len(groups) // 3)]]
    monkeypatch.setattr(measured, "groups", lambda piece: kept)
    monkeypatch.setattr(measuring, "WATCHED", ("streaming", "decayed"))
    assert start(weights, prepared, tmp_path).run(piece, 600)[1:] == (0, 0)
    table = pd.read_csv(tmp_path / f"pretrained_{piece}.csv")
    assert list(table.columns) == list(measured.TABLES[f"pretrained_{piece}"])
    if piece == "attention":
        assert {"each query", "foresight", "oracle", "decayed", "sinks"} <= set(table.chosen)
        assert table.mass.between(0, 1.001).all()
    assert start(weights, prepared, tmp_path).run(piece, 600) == (0, 0, 0)


def test_tables_of_the_notebook_are_means_over_documents():
    swept = pretrained_tables.swept().set_index("configuration")
    rows = pd.read_csv(measured.BENCHMARKS / "pretrained_sweep.csv")
    assert set(swept.index) == set(rows.name) and swept.n.eq(8).all() and rows.evicted.gt(0).all()
    own = rows[rows.name == "aggregate 128x6 cap 256"]
    row = swept.loc["aggregate 128x6 cap 256"]
    assert row["mean"] == pytest.approx((own.nll - own.nll_full).mean()) and row.low < row["mean"] < row.high
    assert (row.width, row.depth, row.max_cache_size) == (128, 6, 256)
    attended = pretrained_tables.attended()
    rules = attended[attended.loss.notna()]
    assert (rules.mass < rules.bound).all() and rules.loss.idxmin() == rules.index[rules.chosen == "oracle"][
        0
    ]
    at = attended[attended["of"] == 0.1].set_index("chosen").mass
    assert at["each query"] > at["hindsight"] > at["foresight"]
