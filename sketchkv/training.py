"""The recipe of the embedded model: `python -m sketchkv.training` (or `make model`).

A byte-level BPE tokenizer and a small decoder (`GPT2LMHeadModel`) trained on the Python source of the installed
packages: Muon for the matrices (Jordan et al. 2024), AdamW for the rest, a learning rate that falls linearly to zero over
the token budget. A checkpoint every few minutes lets an interrupted run go on where it stopped.
"""

import argparse
import csv
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sketchkv import corpus, loading

BOS = "<|endoftext|>"
HEAD_DIM = 64
# The embedded model was trained by the first; two cores get through the second in about two hours.
RECIPES = {
    "cuda": dict(layers=6, heads=6, batch=64, tokens=264_110_080),
    "cpu": dict(layers=4, heads=4, batch=4, tokens=20_000_000),
}
SHORT_WINDOW = 1024
SHORT_SHARE = 0.75  # share of the budget spent on windows of SHORT_WINDOW; the rest sees all positions


def train_tokenizer(texts, vocab_size=4096):
    """Byte-level BPE over `texts`; token 0 is `<|endoftext|>`, which opens every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS)


def build_model(layers, heads, positions, vocab_size):
    """An untrained decoder with `heads` heads of 64."""
    width = HEAD_DIM * heads
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=positions,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own in one operation instead of eight
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    # Sinusoids (Vaswani et al. 2017) to begin with: heads find the previous token, and from it induction, after far
    # fewer tokens than with random position embeddings.
    angles = torch.arange(positions)[:, None] * 10000 ** (-torch.arange(0, width, 2) / width)
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(0.05 * torch.stack([angles.sin(), angles.cos()], -1).flatten(1))
    return model


def windows(stream, length, rng):
    """Shuffled windows `[n, length]` of the token stream, each opened by token 0 (`<|endoftext|>`)."""
    count = len(stream) // (length - 1)
    body = stream[: count * (length - 1)].reshape(count, length - 1)
    body = body[rng.permutation(count)]
    return np.concatenate([np.zeros((count, 1), body.dtype), body], axis=1)


def train(args):
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out, work = Path(args.out), Path(args.work)
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)

    stream_file = work / "stream.npy"
    if not (stream_file.exists() and (out / "tokenizer.json").exists()):
        texts = corpus.training_texts()
        tokenizer = train_tokenizer(texts)
        tokenizer.save_pretrained(out)
        encoded = tokenizer.backend_tokenizer.encode_batch(texts)
        np.save(stream_file, np.concatenate([np.array(e.ids, np.uint16) for e in encoded]))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    stream = np.load(stream_file)
    budget = args.tokens or len(stream)

    model = build_model(args.layers, args.heads, args.positions, len(tokenizer)).to(device)
    # Muon is made for matrices inside the network; embeddings, norms and biases take AdamW.
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.ndim != 2 or id(p) in embeddings]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr / 2, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    short, long = windows(stream, SHORT_WINDOW, rng), windows(stream, args.positions, rng)
    batch_tokens = args.batch * SHORT_WINDOW
    steps = max(1, budget // batch_tokens)
    warmup = max(1, min(200, steps // 10))
    log, first_step, checkpoint = [], 0, work / "checkpoint.pt"
    recipe = {name: value for name, value in vars(args).items() if name not in ("out", "work", "minutes")}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        if state["recipe"] != recipe:
            raise SystemExit(
                f"{checkpoint} belongs to another recipe ({state['recipe']}): remove it or name another --work"
            )
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        log, first_step = state["log"], state["step"]

    def save_checkpoint(step):
        saved = [optimizer.state_dict() for optimizer in optimizers]
        state = {"model": model.state_dict(), "optimizers": saved, "log": log, "step": step, "recipe": recipe}
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    model.train()
    started = last_save = time.monotonic()
    running, step, spent, past = [], first_step, 0.0, first_step / steps
    progress = tqdm(initial=first_step, total=steps, mininterval=30)
    while spent < 1:
        # Whatever ends first, tokens or minutes: the schedule arrives at zero with it.
        spent = (step + 1) / steps
        if args.minutes:
            spent = max(spent, past + (time.monotonic() - started) / (60 * args.minutes))
        is_short = spent < SHORT_SHARE
        rows = args.batch if is_short else max(1, batch_tokens // args.positions)
        source = short if is_short else long
        index = (step * rows + np.arange(rows)) % len(source)
        ids = torch.from_numpy(source[index].astype(np.int64)).to(device)
        for group, peak in groups:
            group["lr"] = peak * min((step + 1) / warmup, max(0.0, 1 - spent))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running.append(loss.detach())
        step += 1
        progress.update()
        if len(running) == 20 or spent >= 1:
            log.append({"tokens": step * batch_tokens, "loss": torch.stack(running).mean().item()})
            progress.set_postfix(loss=f"{log[-1]['loss']:.3f}")
            running = []
        if time.monotonic() - last_save > 300:
            save_checkpoint(step)
            last_save = time.monotonic()
    progress.close()
    export(
        model,
        out,
        log,
        {
            "tokens": step * batch_tokens,
            "corpus_tokens": len(stream),
            "batch_tokens": batch_tokens,
            "lr": args.lr,
            "seed": args.seed,
            "minutes": round((time.monotonic() - started) / 60, 1),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        },
    )
    checkpoint.unlink(missing_ok=True)  # the next run trains again


def export(model, out, log, facts):
    """Writes weights in half precision, configuration, loss curve and training facts into `out`."""
    weights = {name: p.detach().to("cpu", torch.float16).contiguous() for name, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(out)
    with open(out / "loss.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["tokens", "loss"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    loading.write_sums(out)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    recipe = RECIPES["cuda" if torch.cuda.is_available() else "cpu"]
    parser.add_argument("--layers", type=int, default=recipe["layers"])
    parser.add_argument("--heads", type=int, default=recipe["heads"])
    parser.add_argument("--positions", type=int, default=2048, help="longest context")
    parser.add_argument(
        "--tokens", type=int, default=recipe["tokens"], help="token budget; 0: one pass over the corpus"
    )
    parser.add_argument(
        "--minutes", type=float, default=0, help="end after this time if the tokens take longer; 0: never"
    )
    parser.add_argument("--batch", type=int, default=recipe["batch"], help="windows of 1024 tokens per step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(corpus.DATA / "model"))
    parser.add_argument("--work", default="build/training", help="checkpoints and the token stream")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
