"""The README's examples run as printed."""

import re
from pathlib import Path

import pytest

from sketchkv import SketchCache
from sketchkv.loading import EMBEDDED

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(
    not (EMBEDDED / "model.safetensors").exists(), reason="the embedded model is being trained"
)
def test_examples_run_as_printed(capsys):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(examples) == 2
    assert len(examples[0].strip().splitlines()) <= 10
    names = {}
    for example in examples:
        exec(compile(example, str(README), "exec"), names)
    assert "tokens seen" in capsys.readouterr().out
    assert names["output"].shape[1] > 128 + 16  # past the cap
    assert isinstance(names["cache"], SketchCache)


def test_documented_defaults_are_the_defaults():
    import inspect

    from sketchkv import Sketch

    cache, sketch = (inspect.signature(thing.__init__).parameters for thing in (SketchCache, Sketch))
    assert (cache["num_sinks"].default, cache["recent_window"].default, cache["evict_every"].default) == (
        4,
        16,
        16,
    )
    assert [sketch[p].default for p in ("width", "depth", "key", "decay", "mean")] == [
        512,
        4,
        "lsh",
        0.99,
        True,
    ]
