"""Recall in natural language, for a pretrained model: sentences hidden in prose at a depth, and a question at its end.

`sketchkv.study.recall` asks a model that reads Python; the tasks here are its counterparts in English, after RULER (Hsieh et
al. 2024, arXiv 2404.06654): one number, one of four, one of eight pairs side by side, and a number told over two hops.
"""

import random

import torch

from sketchkv.study.recall import WORDS

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
DIGITS = 5
FORMS = ("plain", "chat")


def needle(draw, depth):
    """One number, stated once."""
    (name,), (number,) = _drawn(draw, 1)
    return [(depth, f"The secret number of the {name} is {number}.")], *_asked("secret number", name, number)


def four_keys(draw, depth):
    """Four numbers at four depths; the one at `depth` is asked for."""
    names, numbers = _drawn(draw, 4)
    depths = [depth, *[(depth + step) % 1 for step in (0.25, 0.5, 0.75)]]
    facts = [
        (at, f"The secret number of the {name} is {number}.")
        for at, name, number in zip(depths, names, numbers, strict=True)
    ]
    return facts, *_asked("secret number", names[0], numbers[0])


def key_value(draw, depth):
    """Eight pairs side by side; the value of one is asked for."""
    names, numbers = _drawn(draw, 8)
    pairs = "; ".join(f"{name}: {number}" for name, number in zip(names, numbers, strict=True))
    asked = draw.randrange(8)
    return [(depth, f"The numbers in the register are: {pairs}.")], *_asked(
        "number in the register", names[asked], numbers[asked]
    )


def two_hops(draw, depth):
    """Two numbers, each passed on twice; what the end of one chain has is asked for. Sentences lie side by side."""
    names, numbers = _drawn(draw, 6, 2)
    chains = list(zip([names[:3], names[3:]], numbers, strict=True))
    told = [f"The code of the {chain[0]} is {number}." for chain, number in chains]
    told += [
        f"The code of the {chain[i + 1]} is the same as the code of the {chain[i]}."
        for i in range(2)
        for chain, _ in chains
    ]
    chain, number = chains[draw.randrange(2)]
    return [(depth, " ".join(told))], *_asked("code", chain[-1], number)


TASKS = {"needle": needle, "four_keys": four_keys, "key_value": key_value, "two_hops": two_hops}


def _drawn(draw, names, numbers=None):
    numbers = draw.sample(range(10 ** (DIGITS - 1), 10**DIGITS), numbers or names)
    return draw.sample(WORDS, names), numbers


def _asked(what, name, number):
    return f"What is the {what} of the {name}?", f"The {what} of the {name} is", f" {number}"


def instances(task, tokenizer, fillers, depth, form="plain", seed=0):
    """(ids, answer, tail): token ids `[instances, length]`, whose last `answer` tokens are the answer in each row, and whose
    last `tail` tokens are question and answer in the row where they are longest.

    Sentences begin where a token of the filler begins with a line break or follows the end of a sentence. The facts of an
    instance are the same at every depth. A question stands after the text, its answer begun in words; in the form "chat" text
    and question are a user's message.

    fillers: `[instances, length]` token ids, cut to make room.
    Raises ValueError for an unknown task, a depth outside 0 to 1 or a short text.
    """
    if task not in TASKS or form not in FORMS or not 0 <= depth <= 1:
        raise ValueError(
            f"task={task!r}, form={form!r}, depth={depth}: choose a task of {', '.join(TASKS)}, a form of "
            f"{', '.join(FORMS)} and a depth from 0 to 1"
        )
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    ends = {i for i, token in enumerate(tokens) if token and token.endswith((".", ".Ċ", "Ċ"))}
    rows, lengths, tails = [], set(), []
    for index, filler in enumerate(fillers.tolist()):
        facts, question, begun, answer = TASKS[task](random.Random(f"{seed} {task} {index}"), depth)
        head, tail = frame(tokenizer, question, begun, form, filler[0])
        facts = [(at, encode(" " + sentence)) for at, sentence in facts]
        answer, tail = encode(answer), encode(tail)
        lengths.add(len(answer))
        head = head if isinstance(head, list) else encode(head)
        room = len(filler) - len(head) - len(tail) - len(answer) - sum(len(fact) for _, fact in facts)
        if room < 64:
            raise ValueError(
                f"a text of {len(filler)} tokens has no room for the task {task!r}: take a longer one"
            )
        body = filler[1 : room + 1]
        breaks = [i + 1 for i, token in enumerate(body) if token in ends and i + 1 < room] or [room // 2]
        places = [(min((abs(i - at * room), i) for i in breaks)[1], fact) for at, fact in facts]
        for place, fact in sorted(places, key=lambda pair: -pair[0]):
            body[place:place] = fact
        rows.append(head + body + tail + answer)
        tails.append(len(tail) + len(answer))
    if len(lengths) > 1:
        raise ValueError(
            f"answers of {sorted(lengths)} tokens: the tokenizer must cut numbers digit by digit"
        )
    return torch.tensor(rows), lengths.pop(), max(tails)


def frame(tokenizer, question, begun, form, first):
    """What stands before a text (token ids or str) and after it (str)."""
    if form == "plain":
        return [first], f"\n\nQuestion: {question}\nAnswer: {begun}"
    message = [{"role": "user", "content": "\0"}]
    chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, after = chat.split("\0")
    return before, f"\n\n{question}{after}{begun}"
