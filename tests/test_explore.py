"""What the explorer shows, and the site: from plain data, without a browser but in the last test."""

import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager, suppress

import matplotlib.pyplot as plt
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from sketchkv import Sketch, SketchCache, Window, enable
from sketchkv.index import KeyIndex
from sketchkv.oracle import decode_and_watch, full_cache_logits
from sketchkv.study import explore, notebooks, record, site, sources


def tiny(sliding_window=None):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=sliding_window,
        max_position_embeddings=512,
    )
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(3)  # attention that is not uniform: a wrong mask shows
    return enable(model)


@pytest.mark.parametrize("window, cap", [(12, 40), (40, 24)])
@pytest.mark.parametrize("chunk", [1, 4])
def test_a_query_of_a_window_layer_sees_no_token_too_many(window, cap, chunk):
    model = tiny(window)
    ids = torch.randint(97, (2, 70), generator=torch.Generator().manual_seed(1))
    cache = SketchCache(model.config, cap, policy=Window())
    logits, visible = decode_and_watch(model, ids, cache, chunk_size=chunk)
    assert all(int(layer.sum(-1).max()) == min(window, cap) for layer in visible)
    torch.testing.assert_close(logits, full_cache_logits(model, ids, visible), atol=1e-3, rtol=1e-3)


def test_a_query_of_a_layer_with_an_index_sees_what_it_asked_for():
    model = tiny()
    ids = torch.randint(97, (1, 100), generator=torch.Generator().manual_seed(1))
    cache = SketchCache(
        model.config, 48, recent_window=32, num_sinks=2, index=KeyIndex(top=8, block=32, num_sinks=2)
    )
    logits, visible = decode_and_watch(model, ids, cache)
    assert all((layer[:, :, -1].sum(-1) == 2 + 32 + 8).all() for layer in visible)
    torch.testing.assert_close(logits, full_cache_logits(model, ids, visible), atol=1e-3, rtol=1e-3)


# -- views ------------------------------------------------------------------------------------------------------------

RECORD = {  # four tokens, one layer, two heads: token 1 goes at step 2 in head 0, and comes back at step 3 in head 1
    "tokens": ["<a>", "b\n", "c", "d"],
    "flips": [[[[0], [1, 2], [2], [3]], [[0], [1, 2, 3], [2], [3]]]],
    "scores": [[[None, 0.25, 1.5, None], [None, 0.5, 1.0, None]]],
    "sinks": 1,
    "recent": 1,
    "recalls": False,
}


class Words:
    """A tokenizer, as far as the explorer needs one."""

    def decode(self, ids):
        return f"<{ids[0]}>"


def test_states_follow_the_step():
    assert explore.states(RECORD, 1, 0, 0) == ["protected", "protected", "coming", "coming"]
    assert explore.states(RECORD, 3, 0, 0) == ["protected", "evicted", "kept", "protected"]
    recalled = explore.states(RECORD | {"recalls": True}, 3, 0, 1)
    assert recalled == ["protected", "recalled", "recalled", "protected"]
    shown = explore.forgets(RECORD, 3, 0, 0)
    assert (
        "1 of 4 tokens are forgotten" in shown
        and "score 0.25 at its last eviction; out of sight from step 2" in shown
    )
    assert "&lt;a&gt;" in shown and "0 of 2 tokens are forgotten" in explore.forgets(RECORD, 1, 0, 0)
    assert "of 2 tokens far back, this query asked for 2" in explore.forgotten({"recalls": True}, recalled)


@pytest.mark.parametrize("name", explore.CACHES)
def test_a_watched_text_shows_what_the_cache_held(name):
    model, ids = tiny(), torch.randint(97, (1, 90), generator=torch.Generator().manual_seed(1))
    cache = explore.cache_named(name, model.config, 32)
    record = json.loads(sources.to_json(explore.watch(model, Words(), ids, cache)))
    for layer, head in ((0, 0), (1, 1)):
        found = explore.states(record, 89, layer, head)
        seen = {token for token, kind in enumerate(found) if kind in ("protected", "kept", "recalled")}
        kept = set(cache.kept_positions(layer)[0, head].tolist()) - {-1}
        assert kept <= seen if name != "recall" else seen <= kept | {89}
        assert len(seen) < 90 and {0, 1, 2, 3, 89} <= seen
        known = [x for x in record["scores"][layer][head] if x is not None]
        assert bool(known) == (name != "recall")
        assert record["scores"][layer][head][0] is None or name == "recall"


def test_the_first_difference_is_marked():
    made = {
        "full": {"tokens": ["a", "b", "c"], "bytes": 200},
        "small": {"tokens": ["a", "x", "c"], "bytes": 50},
    }
    shown = explore.compared(made)
    assert "small holds 25 % of the bytes of full and parts from it after 1 tokens" in shown
    assert shown.count('class="differs"') == 2 and shown.count('class="after"') == 2
    made["small"]["tokens"] = ["a", "b", "c"]
    assert "writes the same 3 tokens" in explore.compared(made)


def test_hero_names_the_best_and_takes_a_point_of_ones_own():
    rows = explore.points(record.load_table("baseline_front"))
    best = explore.best_at(rows, 1 / 8)
    assert best["share"] <= 1 / 8 and all(best["growth"] <= r["growth"] for r in rows if r["share"] <= 1 / 8)
    assert explore.best_at(rows, 0.001) is None
    own = explore.point("compact", "yours: (n = 2)", 0.2, math.log(1.5))
    assert own["growth"] == pytest.approx(50)
    axis = explore.hero(rows, own).axes[0]
    assert best["label"] in axis.get_title(loc="left")
    assert own["label"] in [text.get_text() for text in axis.texts]
    plt.close("all")


def test_the_lamp_tells_collisions_and_errors():
    items = torch.tensor([3, 3, 3, 8, 9, 9])
    one, wide = explore.counted(items, 1, 2), explore.counted(items, 4096, 4)
    assert one["estimate"] == [6, 6, 6] and one["collided"] == 1 and one["bound"] == pytest.approx(6 * math.e)
    assert wide["estimate"] == wide["truth"] == [3, 1, 2] and wide["collided"] == 0
    model, ids = tiny(), torch.randint(97, (1, 150), generator=torch.Generator().manual_seed(1))
    few, many = (explore.signs(model, ids, 1, 1, bits) for bits in (1, 4))
    assert len(few["truth"]) == 128 and few["truth"] == many["truth"]
    error = [sum((a - b) ** 2 for a, b in zip(x["truth"], x["estimate"])) for x in (few, many)]
    assert error[1] < error[0] / 4
    assert len(explore.lamp(one, few).axes) == 3
    plt.close("all")


def test_bytes_are_those_of_a_real_cache():
    model, ids = tiny(), torch.randint(97, (1, 320), generator=torch.Generator().manual_seed(1))
    model.half()
    sizes = explore.held(layers=2, kv_heads=2, head_dim=16, length=320, cap=96)
    assert sizes["full"] == 2 * 2 * 2 * 16 * 320 * 2
    caches = {
        "compact": SketchCache.compact(model.config, 96),
        "sketch": SketchCache(model.config, 96, policy=Sketch(), bits=16),
        "recall": SketchCache.recall(model.config),
    }
    for name, cache in caches.items():
        model(ids, past_key_values=cache)
        assert sizes[name] == cache.nbytes()["total"], name
    twice = explore.held(layers=2, kv_heads=2, head_dim=16, length=320, cap=96, batch=2)
    assert all(twice[name] == pytest.approx(2 * sizes[name], abs=2) for name in sizes)
    assert len(explore.bars(sizes).axes[0].patches) == 5
    plt.close("all")


# -- site -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("pdoc")
    folder = tmp_path_factory.mktemp("site")
    records = [{"cache": "compact", "cap": cap} | RECORD for cap in (64, 96)]
    assert site.build(folder, records) < site.LARGEST  # raises for links that lead nowhere
    return folder


def test_the_site_holds_everything_and_links_to_it(built, tmp_path):
    for page in site.BAR:
        assert (built / page).exists()
    stems = {path.stem for path in notebooks.find(sources.ROOT)}
    assert stems <= {path.stem for path in (built / "notebooks").glob("*.html")}
    assert 'href="notebooks/11_pretrained.html"' in (built / "index.html").read_text()
    assert "<details" in (built / "notebooks" / "05_baselines.html").read_text()
    for page in (built / "notebooks").glob("*.html"):  # formulas are MathML, which needs no script
        shown = re.sub(r"<(pre|code|annotation).*?</\1>", "", page.read_text(), flags=re.S)
        assert "$$" not in shown and "\\frac" not in shown, page.name
    (tmp_path / "a.html").write_text('<a href="b.html"></a><a href="#c"></a><a href="https://d.org">')
    assert site.broken(tmp_path) == ["a.html: #c", "a.html: b.html"]


@pytest.mark.skipif(
    not (shutil.which("chromedriver") and shutil.which("chromium")), reason="no Chromium here"
)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_moved_slider_changes_the_picture(built, width, tmp_path):
    with browser(width, tmp_path) as (call, run):
        call("url", url=(built / "explorer.html").as_uri())
        look = "return [...document.querySelectorAll('#text, #hero, h3')].map(each => each.innerHTML)"
        seen = [run(look)]
        for slider, value in (("step", 1), ("head", 1), ("share", 30)):
            run(
                f"const s = document.getElementById('{slider}'); s.value = {value}; s.dispatchEvent(new Event('input'))"
            )
            seen.append(run(look))
        assert "1 of 4 tokens" in str(seen[0]) and "0 of 2 tokens" in str(seen[1])
        assert seen[3][3] != seen[2][3]  # the picture of view 3
        for page in (
            "explorer.html",
            "models.html",
            "notebooks/05_baselines.html",
            "api/sketchkv/cache.html",
        ):
            call("url", url=(built / page).as_uri())
            assert run("return document.documentElement.scrollWidth") <= width, page


@contextmanager
def browser(width, folder):
    """(call, run) of a headless Chromium: a WebDriver command, and JavaScript in the page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
    session = ""

    def call(command, **body):
        path = f"http://127.0.0.1:{port}/session{session}{command and '/'}{command}"
        asked = urllib.request.Request(path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(asked, timeout=60))["value"]

    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags = [f"--{flag}" for flag in f"{flags} disable-component-update disable-sync".split()]
    options = {"args": [*flags, f"--user-data-dir={folder}"], "binary": shutil.which("chromium")}
    try:
        for _ in range(100):
            with suppress(OSError):
                wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
                session = f"/{call('', capabilities=wanted)['sessionId']}"
                break
            time.sleep(0.2)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        call("goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)
        yield call, lambda script: call("execute/sync", script=script, args=[])
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/session{session}", method="DELETE")
        urllib.request.urlopen(asked, timeout=60)
    finally:
        driver.terminate()
        driver.wait(20)
