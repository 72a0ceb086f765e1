"""What chapter 13 measures and a notebook has no time for.

    python benchmarks/fine_tuning.py [scores | contaminated | preferences] [--threads 1]

scores: two shipped models are asked the same 60 English questions, in three wordings, with 0, 1 and
3 solved questions before, by what they write and by which answer is likeliest.
contaminated: tales-dense learns an examination by heart and is examined with it, and with a new one; four
times, with other questions.
preferences: tales-chat draws three answers to a question; of a right one and a wrong one, DPO prefers the
right one.
Each part writes its results into benchmarks/results/fine_tuning.json and keeps the others.
"""

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from random import Random

import torch

import minimistral as mm
from minimistral.chat_recipe import RECIPE, examination
from minimistral.generate import generate
from minimistral.instruct import answer_rows, answers, encode_chat, fine_tune
from minimistral.lora import add_lora, merge_lora
from minimistral.preference import Preference, learn_preferences
from minimistral.questions import ask_many, is_right, shared
from minimistral.provenance import provenance
from minimistral.recipes import say
from minimistral.tales import parse_tale
from minimistral.train import IGNORE, TrainConfig, next_token_nats

OUT = Path(__file__).parent / "results" / "fine_tuning.json"
MODELS = ("tales-chat", "tales-moe")
WORDINGS = ("chat format", "plain question", "end of the tale")
SHOTS = (0, 1, 3)
RULES = ("likelihood", "generated")
N = 60


# ---------------------------------------------------------------- the same questions, asked otherwise


def held(n: int, seed: int) -> list:
    """Questions whose answer is a person: who has a thing?"""
    found = ask_many(4 * n, seed, kind="who", language="en")
    return [q for q in found if " has " in q.answer][:n]


def holder(question) -> str:
    return question.answer.split(" ")[0]


def thing(question) -> str:
    return question.asked.removeprefix("Who has ").rstrip("?")


def people(question) -> list[str]:
    """The possible answers: everybody in the tale, in the order of their names."""
    return sorted(parse_tale(f"{question.told} Now {question.answer}").places)


def written(tokenizer, question, solved, wording: str) -> list[int]:
    """The prompt's ids."""
    if wording == "chat format":
        messages = [m for q in solved for m in q.conversation] + question.messages
        return encode_chat(tokenizer, messages)[0]
    if wording == "plain question":
        parts = [f"{q.told}\nQuestion: {q.asked}\nAnswer:" for q in [*solved, question]]
        told = [f"{part} {holder(q)}." for part, q in zip(parts, solved)]
        return tokenizer.encode("\n\n".join([*told, parts[-1]]), bos=True)
    ids = []
    for q in solved:
        ids += tokenizer.encode(f"{q.told} Now {q.answer}", bos=True, eos=True)
    return ids + tokenizer.encode(f"{question.told} Now", bos=True)


def option(question, person: str, wording: str) -> str:
    return {"chat format": f"{person} has {thing(question)}.", "plain question": f" {person}.",
            "end of the tale": f" {person} has {thing(question)}."}[wording]


@torch.no_grad()
def likeliest(model, tokenizer, question, prompt: list[int], wording: str) -> str:
    """The person whose answer has the fewest nats."""
    persons = people(question)
    rows = [prompt + tokenizer.encode(option(question, p, wording)) for p in persons]
    inputs = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.long)
    targets = torch.full_like(inputs, IGNORE)
    for r, row in enumerate(rows):
        inputs[r, :len(row) - 1] = torch.tensor(row[:-1])
        targets[r, len(prompt) - 1:len(row) - 1] = torch.tensor(row[len(prompt):])
    nats = [float(next_token_nats(logits[None], aim[None])) for logits, aim in zip(model(inputs), targets)]
    return persons[nats.index(min(nats))]


def first_person(text: str, persons: list[str]) -> str:
    """What an answer is taken for: the first of the tale's people that it names."""
    words = text.replace(".", " ").replace(",", " ").split()
    return next((word for word in words if word in persons), "")


def scores() -> dict:
    questions, pool = held(N, 130), held(60, 131)
    assert not shared(questions, pool)
    rng, marks = Random(13), {}
    solved = {shots: [rng.sample(pool, shots) for _ in questions] for shots in SHOTS}
    truth = [holder(q) for q in questions]
    for name in MODELS:
        model, tokenizer = mm.load_model(name), mm.load_tokenizer(name)
        for wording in WORDINGS:
            for shots in SHOTS:
                prompts = [written(tokenizer, q, s, wording) for q, s in zip(questions, solved[shots])]
                said = {"likelihood": [likeliest(model, tokenizer, q, p, wording)
                                       for q, p in zip(questions, prompts)]}
                news = []
                for start in range(0, N, 25):
                    news += generate(model, prompts[start:start + 25], 8, stop_ids=(tokenizer.eos_id,))
                said["generated"] = [first_person(tokenizer.decode(new), people(q))
                                     for q, new in zip(questions, news)]
                for rule in RULES:
                    key = " | ".join((name, wording, str(shots), rule))
                    marks[key] = "".join("1" if a == b else "0" for a, b in zip(said[rule], truth))
                    say(f"{key}: {marks[key].count('1')}")
    chance = sum(1 / len(people(q)) for q in questions) / N
    return {"seed": 130, "asked": N, "chance": chance, "marks": marks}


# ---------------------------------------------------------------- an examination learned by heart


def contaminated() -> dict:
    tokenizer, honest = mm.load_tokenizer("tales-dense"), mm.load_model("tales-chat")
    config = TrainConfig(steps=110, batch_size=10, lr=2e-3, warmup_steps=5, weight_decay=0.0, min_lr=0.1)
    rounds = []
    for seed in (140, 150, 160, 170):
        test, fresh = (ask_many(n, s, language="en") for n, s in ((30, seed + 1), (60, seed)))
        fresh = [q for q in fresh if not shared([q], test)][:30]
        model = mm.load_model("tales-dense").requires_grad_(True)
        fine_tune(model, answer_rows(tokenizer, [q.conversation for q in test]), config)
        right = {name: {which: sum(is_right(q, text) for q, text in zip(
                            asked, answers(m, tokenizer, [q.messages for q in asked], 60)))
                        for which, asked in (("this examination", test), ("a new one", fresh))}
                 for name, m in (("tales-chat", honest), ("contaminated", model))}
        say(f"seed {seed}: {right}")
        rounds.append({"seeds": [seed + 1, seed], "right": right})
    return {"asked": 30, "training": asdict(config), "rounds": rounds}


# ---------------------------------------------------------------- preferences


def drawn(model, tokenizer, questions, seed: int) -> list[str]:
    return answers(model, tokenizer, [q.messages for q in questions], 30, temperature=1.0, seed=seed)


def preferences() -> dict:
    tokenizer, model = mm.load_tokenizer("tales-chat"), mm.load_model("tales-chat")
    held_out = examination(RECIPE)[::3]
    questions = [q for q in ask_many(120, 150, language="en") if not shared([q], examination(RECIPE))]
    said = [drawn(model, tokenizer, questions, seed) for seed in range(3)]
    pairs = []
    for question, texts in zip(questions, zip(*said)):
        right = [t for t in texts if is_right(question, t)]
        wrong = [t for t in texts if not is_right(question, t)]
        if right and wrong:
            pairs.append(Preference(question.messages, right[0], wrong[0]))

    def measured(m) -> dict:
        by_chance = drawn(m, tokenizer, held_out, 99)
        greedy = answers(m, tokenizer, [q.messages for q in held_out], 30)
        return {"right_drawn": sum(map(is_right, held_out, by_chance)),
                "right_greedy": sum(map(is_right, held_out, greedy)), "asked": len(held_out)}

    before = measured(model)
    say(f"{len(pairs)} pairs of {len(questions)} questions; {before}")
    torch.manual_seed(0)
    add_lora(model, RECIPE.rank, RECIPE.alpha, RECIPE.names)
    config = TrainConfig(steps=30, batch_size=4, lr=1e-3, warmup_steps=3, weight_decay=0.0, min_lr=0.1)
    begun = time.time()
    losses = learn_preferences(model, tokenizer, pairs, config, beta=0.1)
    minutes = (time.time() - begun) / 60
    after = measured(merge_lora(model))
    say(str(after))
    assert math.isclose(losses[0], math.log(2), rel_tol=1e-3)
    return {"seeds": [150, 99], "questions": len(questions), "pairs": len(pairs), "beta": 0.1,
            "training": asdict(config), "before": before, "after": after, "minutes": round(minutes, 2),
            "losses": [round(x, 4) for x in losses]}


def main() -> None:
    parts = {"scores": scores, "contaminated": contaminated, "preferences": preferences}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=list(parts))
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for part in chosen.parts or parts:
        say(part)
        result = {"provenance": provenance(f"python benchmarks/fine_tuning.py {part}"), **parts[part]()}
        kept = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
        text = json.dumps({**kept, part: result}, indent=1, ensure_ascii=False) + "\n"
        OUT.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
