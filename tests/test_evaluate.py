"""Grid points of the study: the grid, the methods by name, and scores against what they are defined as."""

import pytest
import torch

from sketchkv import SketchCache, score
from sketchkv.study import evaluate, methods, sweep

MODEL = "embedded"
SETTINGS = dict(split="development", documents=2, length=128)


def test_the_sweep_has_144_configurations_of_which_108_choose_k():
    grid = sweep.configurations()
    assert len({c["configuration"] for c in grid}) == len(grid) == 144
    assert sum(c["use"] == "topk" for c in grid) == 108
    assert all((c["attend_topk"] > 0) == (c["use"] == "topk") == (c["summary_slots"] == 0) for c in grid)
    assert all(c in grid for c in sweep.small())


def test_every_configuration_and_method_makes_a_cache_of_its_size():
    lm, _ = evaluate._model(MODEL, "cpu")
    for c in sweep.configurations(4):
        layer = methods.make_cache(lm.config, **sweep.method(c)).layers[0]
        slots = layer.summary.count if layer.summary else 0
        assert layer.max_cache_size + slots == c["max_cache_size"]
        assert (layer.policy.width, layer.policy.depth) == (c["width"], c["depth"])
        assert layer.attend_topk == min(c["attend_topk"] or 10**6, layer.max_cache_size)
    for name in methods.POLICIES:
        cache = methods.make_cache(lm.config, name, max_cache_size=64)
        assert type(cache.layers[0].policy) is methods.POLICIES[name]
        assert cache.layers[0].num_sinks == (0 if name == "window" else 4)
    with pytest.raises(ValueError, match="unknown method 'best'"):
        methods.make_cache(lm.config, "best", max_cache_size=64)
    with pytest.raises(TypeError, match="widht"):
        methods.make_cache(lm.config, "sketch", max_cache_size=64, widht=3)


def test_scores_are_what_they_are_defined_as():
    lm, _ = evaluate._model(MODEL, "cpu")
    method = {"method": "decayed", "max_cache_size": 48, "bits": 16}
    rows = evaluate.evaluate(method, **SETTINGS)
    ids, names, _ = evaluate._reference(MODEL, "embedded", "cpu", *SETTINGS.values())
    assert [row["document"] for row in rows] == list(names)
    full, found = (
        score(lm, ids, cache, return_logits=True) for cache in (None, methods.make_cache(lm.config, **method))
    )
    p, q = full[1].double().softmax(-1), found[1].double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean(1)
    for i, row in enumerate(rows):
        assert set(row) == set(evaluate.COLUMNS)
        assert (
            row["nll"] == pytest.approx(found[0][i].mean().item(), abs=1e-4) and row["nll"] != row["nll_full"]
        )
        assert row["nll_late_full"] == pytest.approx(full[0][i, 64:].mean().item(), abs=1e-4)
        assert row["kl"] == pytest.approx(kl[i].item(), rel=1e-2) and row["kl"] > 0.01
        assert row["top1"] == pytest.approx(
            (p[i].argmax(-1) == q[i].argmax(-1)).double().mean().item(), abs=0.02
        )
        assert row["evicted"] == 80 and row["stored"] == 48


def test_a_full_cache_loses_nothing_and_bytes_are_those_of_the_real_cache():
    lm, _ = evaluate._model(MODEL, "cpu")
    rows = evaluate.evaluate({"method": "full", "bits": 16}, **SETTINGS)
    assert all(abs(row["kl"]) < 1e-4 and row["evicted"] == 0 for row in rows)
    ids, *_ = evaluate._reference(MODEL, "embedded", "cpu", *SETTINGS.values())
    for method in ({"method": "sketch", "max_cache_size": 64}, {"method": "compact", "max_cache_size": 64}):
        cache = methods.make_cache(lm.config, **method)
        score(lm, ids[:1], cache)
        assert cache.nbytes() == methods.nbytes(lm.config, **method)


@pytest.mark.parametrize(
    "method",
    [
        {"method": "decayed", "bits": 16},
        {"method": "compact"},
        {"method": "sketch", "width": 128, "depth": 2, "bits": 4},
    ],
)
def test_fit_is_the_largest_cap_within_the_budget(method):
    lm, _ = evaluate._model(MODEL, "cpu")
    budget = methods.full_nbytes(lm.config, 1024) // 8
    cap = methods.fit(lm.config, budget, **method)
    held = [methods.nbytes(lm.config, **method, max_cache_size=c)["total"] for c in (cap, cap + 1)]
    assert held[0] <= budget < held[1]
    with pytest.raises(ValueError, match="more than the budget"):
        methods.fit(lm.config, 1000, **method)


def test_compact_is_the_setting_it_says_and_single_parameters_can_be_changed():
    lm, _ = evaluate._model(MODEL, "cpu")
    cache = SketchCache.compact(lm.config, 128)
    layer = cache.layers[0]
    assert (layer.codec(torch.float32, "cpu").bits, layer.summary.count) == (dict(keys=5, values=4), 1)
    assert layer.policy.value_norm and layer.policy.decay == 0.99 and layer.policy.mean
    changed = SketchCache.compact(lm.config, 128, bits=8).layers[0]
    assert changed.codec(torch.float32, "cpu").bits == dict(keys=8, values=8) and changed.summary.count == 1


def test_value_norm_weighs_attention_by_what_would_be_lost():
    from sketchkv import AttentionMass
    from sketchkv.slots import Plain, Slots

    slots = Slots((1, 1), 4, (8, 8), Plain(torch.float32, "cpu"))
    values = torch.ones(1, 1, 4, 8) * torch.tensor([1.0, 5.0, 2.0, 0.5])[:, None]
    plain, weighted = AttentionMass(), AttentionMass(value_norm=True)
    for policy in (plain, weighted):
        policy.allocate(slots)
    slots.append(torch.zeros_like(values), values, torch.arange(4, dtype=torch.int32)[None])
    slots["mass"].copy_(torch.tensor([0.4, 0.1, 0.3, 0.2]))
    expected = plain.score(slots, 4) * values.norm(dim=-1)
    torch.testing.assert_close(weighted.score(slots, 4), expected)
    assert weighted.score(slots, 4).argmax() != plain.score(slots, 4).argmax()
