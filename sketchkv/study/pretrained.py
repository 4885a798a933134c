"""The study's second leg: a pretrained model, measured once with frozen settings, into tables that are committed.

    python -m sketchkv.study.pretrained --prepare build/pretrained.npz
    python -m sketchkv.study.pretrained --convert PART PART --weights build/smollm2
    python -m sketchkv.study.pretrained --piece quality --ids build/pretrained.npz --weights build/smollm2 --out OUT

The first command needs texts and tokenizer, and writes token ids alone. The others need neither: they run where there is no
package index. `--model gemma3` measures Gemma 3 270M instead of SmolLM2-135M-Instruct. A piece is a list of groups, the most
important first; a group is one method at one size on all its texts. What the table holds already with the same settings is not
measured again, and no group begins that would not end in time.
"""

import argparse
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pandas as pd
import torch

from sketchkv import load
from sketchkv.pretrained import MODELS, convert, model_folder
from sketchkv.study import measured, measuring
from sketchkv.study.methods import DoesNotFit, full_nbytes, make_cache, nbytes
from sketchkv.study.questions import DEPTHS
from sketchkv.study.sources import atomic_write, commit

# Running


class Run:
    """One call of the runner: what is there, what is due, and the tables that are written after every group."""

    def __init__(
        self,
        ids_path,
        weights,
        out,
        device="auto",
        commit="unknown",
        have=measured.BENCHMARKS,
        title=MODELS["smollm2"].title,
    ):
        self.title = title
        self.ids_path, self.weights, self.out = str(ids_path), str(weights), Path(out)
        self.device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.lm = measuring.model_of(self.weights, self.device)
        self.ids, self.names = measured.prepared(self.ids_path)
        self.out.mkdir(parents=True, exist_ok=True)
        self.tables, self.notes, self.solved = {}, {}, {}
        for name in measured.TABLES:
            for folder in (Path(have), self.out):
                if (folder / f"{name}.csv").exists():
                    self.tables[name] = pd.read_csv(folder / f"{name}.csv").to_dict("records")
                if (folder / f"{name}.json").exists():
                    self.notes[name] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        card = torch.cuda.get_device_name() if self.device.startswith("cuda") else "CPU"
        self.origin = {"card": card, "commit": commit}
        self.origin |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        weights_hash = hashlib.sha256()
        for file in sorted(Path(self.weights).glob("*.safetensors")):
            weights_hash.update(file.read_bytes())
        self.model = weights_hash.hexdigest()[:12]

    def settle(self, group):
        """The group with method, common columns and hash; None if it can't be or is there already."""
        config, tokens, share = self.lm.config, group["tokens"], group["share"]
        try:
            key = group["name"], share, tokens
            if "method" not in group and key not in self.solved:
                self.solved[key] = measured.settled(config, *key)
            method = group.get("method") or self.solved[key]
            if method and method["method"] == "recall" and group["table"] == "pretrained_quality":
                method = method | {"exact_prompts": False}  # what is scored is decoded
            group = group | {"method": method}
            columns, made = {"tokens": tokens, "bytes_full": full_nbytes(config, tokens)}, None
            if method:
                if method.get("max_cache_size", 0) >= tokens:
                    raise DoesNotFit("holds all tokens")
                columns["bytes_total"] = nbytes(config, tokens, torch.float32, **method)["total"]
                columns["max_cache_size"] = method.get("max_cache_size", tokens)
                made = _made(config, tokens, method)
        except ValueError as error:  # too large, or not for a model of this kind
            size = f"{tokens} tokens" if share is None else f"{share:g} of {tokens} tokens"
            self.note(group["table"], "left_out", f"{group['name']} at {size}: {error}")
            return None
        if group["table"] == "pretrained_recall":
            group = self.ask(group)
            if group is None:
                return None
            names = [f"test_{tokens}_{group['task']}_{group['form']}"]
        elif "ids" in group:
            names = [group["ids"]]
        else:
            names = [f"{text}_{tokens}" for text in group["texts"]]
        seen = [hashlib.sha256(self.ids[name].numpy().tobytes()).hexdigest() for name in names]
        asked = {k: v for k, v in group.items() if k != "texts"}
        group["hashes"] = {
            name: measured.digest(
                measured.FORMAT, asked | {"text": name}, made, self.model, measured.NEAR, measured.STRIDE, ids
            )
            for name, ids in zip(names, seen, strict=True)
        }
        done = {row["settings"] for row in self.tables.get(group["table"], ())}
        if set(group["hashes"].values()) <= done:
            return None
        if group["table"] == "pretrained_quality":  # what one text alone lacks
            group["texts"] = [t for t in group["texts"] if group["hashes"][f"{t}_{tokens}"] not in done]
        group["columns"] = columns
        return group

    def ask(self, group):
        """A group of recall with its form and the depths that count; None if none does, or the full cache's is due."""
        notes, task, tokens = self.notes.setdefault("pretrained_recall", {}), group["task"], group["tokens"]
        length = (
            measured.LENGTH if tokens == measured.LONG else tokens
        )  # longer texts are asked as shorter ones
        key = f"{task} {length} {measured.digest(self.model, [self.names.get(f'development_{length}')])}"
        chosen = notes.setdefault("forms", {})
        if key not in chosen:
            form, right, n = measuring.choose_form(self.lm, self.ids, self.names, length, task)
            chosen[key] = {"form": form, "right": right, "n": n}
        group = group | {"form": chosen[key]["form"], "depths": list(DEPTHS)}
        if group["name"] == "full":
            return group
        rows = [
            row
            for row in self.tables.get("pretrained_recall", ())
            if (row["name"], row["task"], row["tokens"], row["form"]) == ("full", task, tokens, group["form"])
        ]
        counts = {depth: [row["exact"] for row in rows if row["depth"] == depth] for depth in DEPTHS}
        group["depths"] = [
            d for d, right in counts.items() if right and sum(right) * 30 >= measured.COUNTS * len(right)
        ]
        return group if group["depths"] else None

    def note(self, table, kind, text):
        notes = self.notes.setdefault(table, {}).setdefault(kind, [])
        if text not in notes:
            notes.append(text)

    def keep(self, group, rows):
        """Adds a group's rows to its table and writes it: earlier rows of the same method, size and text are replaced."""
        table, tokens = group["table"], group["tokens"]
        share = {"name": group["name"], "share": group["share"]}
        for row in rows:
            part = f"{row['text']}_{tokens}" if "text" in row else next(iter(group["hashes"]))
            own = {"task": group.get("task"), "form": group.get("form")} if "text" not in row else {}
            row |= share | group["columns"] | own | self.origin | {"settings": group["hashes"][part]}
        columns = list(measured.TABLES[table])
        rows = [{name: row.get(name) for name in columns} for row in rows]
        which = lambda row: tuple(  # noqa: E731
            str(row.get(k)) if row.get(k) == row.get(k) else "None"
            for k in ("name", "share", "text", "task", "tokens")
        )
        new = {which(row) for row in rows}
        self.tables[table] = [row for row in self.tables.get(table, ()) if which(row) not in new] + rows
        self.write(table)

    def write(self, table):
        frame = pd.DataFrame(self.tables.get(table, []), columns=list(measured.TABLES[table]))
        frame["max_cache_size"] = frame["max_cache_size"].astype("Int64")
        own = {
            name: self.names[name]
            for name in self.names
            if name.rsplit("_", 1)[0] in (*measured.TEXTS, "development", "test")
        }
        notes = {
            "model": self.title,
            "weights": self.model,
            "dtype": "float32",
            "columns": measured.TABLES[table],
            "documents": own,
            "ids": {
                name: hashlib.sha256(x.numpy().tobytes()).hexdigest()[:12] for name, x in self.ids.items()
            },
        }
        for name, content in (
            (f"{table}.csv", frame.to_csv(index=False, lineterminator="\n")),
            (
                f"{table}.json",
                json.dumps(self.notes.get(table, {}) | notes, indent=1, ensure_ascii=False) + "\n",
            ),
        ):
            atomic_write(self.out / name, content)

    def run(self, piece, seconds, workers=1):
        """Measures what is due until `seconds` have passed since the call; returns (groups done, groups failed, left).

        No group begins that, by those before it, would not end in time. One worker is a thread of this process.
        """
        end, due = time.monotonic() + seconds, measured.groups(piece)
        left: list = []
        flying: list = []
        took: dict[tuple, float] = {}  # by table and name
        counts = [0, 0]  # failed, done
        make = multiprocessing.get_context("spawn").Pool if workers > 1 else ThreadPool
        with make(workers, _quiet if workers > 1 else None) as pool:
            while (due or flying) and time.monotonic() < end:
                for item in [item for item in flying if item[1].ready()]:
                    flying.remove(item)
                    group, result, began = item
                    took[group["table"], group["name"]] = time.monotonic() - began
                    counts[finish(self, group, result.get)] += 1
                waits = due and due[0]["table"] == "pretrained_recall" and due[0]["name"] != "full"
                waits = waits and any(
                    group["name"] == "full" for group, *_ in flying
                )  # it tells which cells count
                if waits or not due or len(flying) == workers:
                    time.sleep(0.01)
                    continue
                kind, name = due[0]["table"], due[0]["name"]
                alike = [seconds for (table, _), seconds in took.items() if table == kind] or [
                    *took.values(),
                    0,
                ]
                expected = took.get((kind, name), max(alike))
                if time.monotonic() + expected > end:
                    left.append(due.pop(0))
                elif group := self.settle(due.pop(0)):
                    asked = group, self.ids_path, self.weights, self.device
                    flying.append((group, pool.apply_async(measuring.measure, asked), time.monotonic()))
            pool.terminate()
        return counts[1], counts[0], len(due) + len(left) + len(flying)


def _made(config, tokens, method):
    """What a cache is made of, for its hash: of a layer that attends to the whole text."""
    layers = make_cache(config, length=tokens, **method).layers
    layer = next(layer for layer in layers if not layer.is_sliding)
    return measured.described({k: v for k, v in vars(layer).items() if k not in ("slots", "home", "nan")})


def finish(run, group, get):
    where = group.get("task") or group.get("ids") or "+".join(group["texts"])
    try:
        rows = get()
    except Exception:
        print(f"FAILED {group['name']} {group['share']} {where}\n{traceback.format_exc()}", flush=True)
        return False
    run.keep(group, rows)
    frame = pd.DataFrame(rows)
    by = next(each for each in ("text", "depth", "chosen", "document") if each in frame)
    value = {"depth": "exact", "chosen": "mass"}.get(by, "nll")
    means = ", ".join(f"{k} {v:.4f}" for k, v in frame.groupby(by)[value].mean().items())
    print(f"{group['name']} {group['share']} {where}: {means}; {rows[0]['seconds']} s", flush=True)
    return True


def _quiet():
    torch.set_num_threads(1)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepare", metavar="FILE", help="write token ids of all texts, then stop")
    parser.add_argument(
        "--convert", nargs="+", metavar="PART", help="join the GGUF file's parts, convert, then stop"
    )
    parser.add_argument("--piece", choices=measured.PIECES)
    parser.add_argument("--ids", help="what --prepare wrote")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument(
        "--weights", help="a folder in hub layout; --convert writes it (default: the model's)"
    )
    parser.add_argument("--out", help="folder of the tables")
    parser.add_argument("--have", default=measured.BENCHMARKS, help="folder of tables to go on from")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--commit", default=os.environ.get("SKETCHKV_COMMIT"), help="of the sources, without git"
    )
    given = parser.parse_args(arguments)
    given.weights = given.weights or given.model
    if given.prepare:
        measured.prepare(given.prepare, load(given.weights, "cpu")[1])
        return 0
    if given.convert:
        convert(MODELS[given.model], given.convert, Path(given.weights))
        return 0
    if not (given.piece and given.ids and given.out):
        parser.error("give --piece, --ids and --out")
    if given.commit is None:
        given.commit = commit()[0]
    title = MODELS[given.model].title
    run = Run(given.ids, _folder(given.weights), given.out, given.device, given.commit, given.have, title)
    done, failed, left = run.run(given.piece, given.seconds, given.workers)
    for table in run.tables:
        run.write(table)
    print(f"{given.piece}: {done} groups measured, {failed} failed, {left} left")
    return 1 if failed else 0


def _folder(weights):
    if Path(weights).is_dir():
        return weights
    return model_folder(weights)


if __name__ == "__main__":
    sys.exit(main())
