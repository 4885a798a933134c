"""What Triton's interpreter takes, its compiler may refuse: every kernel of a text goes through its front end for a GPU that is
not there."""

import os

import pytest
import torch
from conftest import build

from sketchkv import SketchCache, devices, enable, generate
from sketchkv.fast import attention, launch

compiler = pytest.importorskip("triton.compiler.compiler")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="kernels run here"
)
NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
NAMES |= {torch.bool: "*i1", torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64"}


def kind(x):
    if isinstance(x, tuple):
        return tuple(map(kind, x))
    return NAMES[x.dtype] if isinstance(x, torch.Tensor) else "i32" if isinstance(x, int) else "fp32"


def front_end(kernel, arguments, constants):
    """Compiles a launch as far as Triton's own language goes."""
    kinds = [kind(x) for x in arguments]
    signature = dict(zip(kernel.names, kinds + ["constexpr"] * len(kernel.names), strict=False))
    target = compiler.GPUTarget("cuda", 90, 32)
    backend = compiler.make_backend(target)
    options = backend.parse_options({})
    context = compiler.ir.context()
    compiler.ir.load_dialects(context)
    backend.load_dialects(context)
    source = compiler.ASTSource(
        kernel.slow, signature, {(kernel.names.index(n),): v for n, v in constants.items()}
    )
    codegen = backend.get_codegen_implementation(options)
    return source.make_ir(target, options, codegen, backend.get_module_map(), context)


@pytest.fixture
def launched(monkeypatch):
    """Names of kernels that are launched: looked at, not run, so that what they would write is anything."""
    names = {}

    def look(self, grid, *arguments, num_warps=4, num_stages=1, **constants):
        key = self.slow, tuple(constants.items()), tuple(map(kind, arguments))
        if key not in names:
            names[key] = self.slow.__name__
            front_end(self, arguments, constants)

    monkeypatch.setattr(launch.Kernel, "launch", look)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(attention, "INTERPRETED", True)
    monkeypatch.setattr(devices, "_fuses", lambda device: True)
    return names


@pytest.mark.parametrize(
    "kind,expected",
    [
        ("sketch", {"_append", "_attend", "_combine", "_receive", "_remember", "_lowest", "_compact"}),
        ("compact", {"_append", "_attend", "_combine", "_settle", "_importance", "_fold", "_compact"}),
        ("recall", {"_enter", "_scan", "_choose", "_fetch", "_attend", "_combine"}),
    ],
)
def test_every_kernel_of_a_text_is_one_for_the_compiler(kind, expected, launched):
    model = enable(build("llama", positions=2048)).to(torch.bfloat16)
    ids = torch.randint(1, 90, (1, 300))
    settings = dict(max_cache_size=540, evict_every=4, prefill_chunk=512)
    cache = {
        "sketch": lambda: SketchCache(model.config, **settings),
        "compact": lambda: SketchCache.compact(model.config, fine_window=16, **settings),
        "recall": lambda: SketchCache.recall(model.config, 200, top=12),
    }[kind]()
    with torch.no_grad():
        for part in (ids, ids):
            model(part, past_key_values=cache)
        for token in ids[:, :6].split(1, 1):
            model(token, past_key_values=cache)
    cache.reset()
    generate(model, ids.repeat(1, 2), cache, 6, graph=True)
    assert expected <= set(launched.values())
