"""A peer in its own code: llama.cpp on a CPU, the same weights in 16 bits, in a process that takes turns with ours.

`make bench-llama` installs node-llama-cpp, in which it comes built, and runs the group `cpu_llama` of the benchmark.
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sketchkv.study import sources
from sketchkv.study.steps import CYCLE

MODULES = sources.ROOT / "build" / "llama"  # where node-llama-cpp is installed
SCRIPT = Path(__file__).with_suffix(".mjs")


def version():
    """Of node-llama-cpp; None where it is not installed."""
    package = MODULES / "node_modules" / "node-llama-cpp" / "package.json"
    return sources.read_json(package)["version"] if package.is_file() else None


def write_gguf(model, path):
    """Writes the weights of a `LlamaForCausalLM` in float16, and for a tokenizer words that stand for their ids."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([str(i) for i in range(config.vocab_size)])
    writer.add_token_merges(["0 1"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # the two of a rotated pair lie side by side
            weight = weight.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        weight = weight.to(torch.float16 if weight.ndim > 1 else torch.float32)
        writer.add_tensor(str(names.get_name(name, (".weight",))), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A model in GGUF in a process of its own, until the block ends. Raises RuntimeError where it does not run."""

    def __init__(self, path, threads, context, modules=MODULES):
        command = "node", str(SCRIPT), str(path), str(threads), str(context)
        self.process: Any = subprocess.Popen(
            command, cwd=modules, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.cpu = 0.0  # seconds that its threads took for what was asked so far

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def ask(self, **request):
        """The answer to a request that the script knows."""
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            raise RuntimeError("llama.cpp does not run here: what it printed says why") from error
        self.cpu += answer["cpu"] / 1e3
        return answer.get("found")


def beside(bench, seen, cap=512):
    """Cycles of compiled steps of compact, with float32 weights and with 16 bits, and of llama.cpp's full cache.

    By the clock and in CPU time of all threads: what else runs on the machine stretches the first more than the second.
    """
    if version() is None:
        raise RuntimeError("llama.cpp is not there: `make bench-llama` installs it")
    threads, ids = torch.get_num_threads(), bench.ids(seen)[0].tolist()
    bench.begin(llama=version(), threads=threads, seen=seen, methods=[bench.method("compact", cap)])
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(bench.plain, path := Path(folder, "model.gguf"))
        with LlamaCpp(path, threads, seen + CYCLE) as peer:
            _agree(bench, peer)
            peer.ask(read=ids)
            ours, steps = bench.cycle("compact", seen, cap, fast="compiled"), bench.ids(CYCLE)[0].tolist()

            def halved():
                with torch.autocast("cpu", torch.float16):
                    ours()

            theirs = f"llama.cpp, 16-bit weights, {seen} seen"
            rows: dict[str, tuple] = {
                f"compact, cap {cap}, compiled, {seen} seen": (ours, time.process_time),
                f"compact, cap {cap}, compiled, 16-bit weights, {seen} seen": (halved, time.process_time),
                theirs: (lambda: peer.ask(steps=steps), lambda: peer.cpu),
            }
            took: dict[str, list] = {row: [] for row in rows}
            bench.time({row: _counted(run, clock, took[row]) for row, (run, clock) in rows.items()})
    for row, seconds in took.items():
        kept = len(bench.table.samples[row])
        bench.table.add(f"{row}, CPU time", "ms", [1e3 * each / CYCLE for each in seconds[-kept:]])
    for row in rows:
        if row != theirs:
            bench.table.ratio(row, theirs)
            bench.table.ratio(f"{row}, CPU time", f"{theirs}, CPU time")


def _counted(run, clock, took):
    """`run`, which notes what it took by `clock`."""

    def counted():
        begin = clock()
        run()
        took.append(clock() - begin)

    return counted


@torch.no_grad()
def _agree(bench, peer, count=64):
    """Raises RuntimeError unless both give a text the same continuation, as exactly as 16 bits do."""
    ids = bench.ids(count)
    peer.ask(read=ids[0, :-1].tolist())
    found = dict(peer.ask(probabilities=ids[0, -1].item()))
    expected = bench.plain(ids).logits[0, -1].softmax(-1)
    apart = (torch.tensor([found[i] for i in range(len(expected))]) / expected - 1).abs().max().item()
    if apart > 0.02:
        raise RuntimeError(
            f"llama.cpp and transformers give probabilities that are {100 * apart:.1f} % apart"
        )
