"""The plan of the course as data: chapters, minutes, and which chapter shows which definition.

The README's table, the pages, the build and the tests all read it.
"""

from __future__ import annotations

from dataclasses import dataclass

NOTEBOOKS, EXERCISES, SOLUTIONS = "notebooks", "exercises", "solutions"


@dataclass(frozen=True)
class Headline:
    """A claim of the press about Mistral, in our words, with the year it was made."""

    number: int
    text: str
    year: int = 2024


@dataclass(frozen=True)
class Chapter:
    """One chapter. ``core_minutes`` is the part nobody should skip."""

    number: int
    slug: str
    title: str
    question: str
    modules: tuple[str, ...]
    core_minutes: int
    total_minutes: int
    needs: tuple[int, ...]
    headlines: tuple[Headline, ...] = ()

    @property
    def name(self) -> str:
        """The file name without ending, the same in all three folders."""
        return f"{self.number:02d}_{self.slug}"

    def path(self, folder: str = NOTEBOOKS) -> str:
        return f"{folder}/{self.name}.ipynb"


CHAPTERS: tuple[Chapter, ...] = (
    Chapter(
        0, "start_here", "Start here",
        "What will we have built at the end, and does it run on this machine?",
        (), 10, 15, (),
    ),
    Chapter(
        1, "tokens", "Tokens",
        "What does a language model see instead of letters?",
        ("tokenizer",), 50, 155, (0,),
        (Headline(20, "The model handles the main European languages."),),
    ),
    Chapter(
        2, "attention", "Attention",
        "How does a word find out which other words matter to it?",
        ("attention",), 45, 145, (0,),
        (
            Headline(
                21,
                "Big models are black boxes because they have so many parameters; "
                "Mistral's customers may look inside theirs.",
            ),
        ),
    ),
    Chapter(
        3, "positions", "Positions",
        "How does attention learn what came first?",
        ("rope",), 45, 135, (2,),
    ),
    Chapter(
        4, "transformer", "The transformer",
        "What else does attention need to become a language model?",
        ("config", "layers", "model"), 50, 145, (2, 3),
    ),
    Chapter(
        5, "training", "Training",
        "How does a heap of random numbers learn to write, and how well can it do at best?",
        ("corpora", "tales", "train"), 50, 155, (1, 4),
        (
            Headline(17, "Without repeated and meaningless text, a small model matches a bigger one."),
            Headline(18, "Training data of low quality makes a model write false things."),
            Headline(19, "It was trained for far less than the 100 million dollars of GPT-4."),
        ),
    ),
    Chapter(
        6, "generation", "Generation and cache",
        "How does a model write, and why need it not read everything again for each word?",
        ("sampling", "generate"), 45, 150, (4,),
        (
            Headline(
                11,
                "A bigger model costs more for each token, "
                "because the whole model runs for every token.",
            ),
        ),
    ),
    Chapter(
        7, "shared_heads", "Shared heads",
        "How much memory can we save when heads share keys and values?",
        ("attention",), 50, 140, (2, 6),
        (Headline(5, "Grouped-query attention saves memory by sharing keys and values."),),
    ),
    Chapter(
        8, "sliding_window", "The sliding window",
        "Can a model with a short memory read a long text?",
        ("attention", "cache"), 60, 135, (6, 7),
        (
            Headline(1, "The sliding window is Mistral's innovation."),
            Headline(2, "A published sample of Mistral's efficient attention lowers complexity."),
            Headline(3, "The window lowers complexity and keeps long-range dependency."),
            Headline(4, "The secret of Mistral 7B is first of all the sliding window."),
        ),
    ),
    Chapter(
        9, "mixture_of_experts", "Mixture of experts",
        "Can a model know more without computing more?",
        ("moe",), 50, 140, (4,),
        (
            Headline(6, "Mixtral has 8 experts, 2 active, and costs like a dense model of 12B."),
            Headline(7, "A mixture lowers the compute and energy of training and inference."),
            Headline(8, "It was the first open mixture-of-experts model of the GPT-4 era."),
        ),
    ),
    Chapter(
        10, "the_real_mistral", "The real Mistral",
        "Does our code give the numbers of the real checkpoints?",
        ("config", "checkpoint"), 45, 130, (7, 8, 9),
        (
            Headline(9, "8x7B means 56 billion parameters; 8x22B has 176 billion."),
            Headline(10, "7B beats LLaMA 13B, a model three times its size."),
            Headline(23, "GPT-4 has 1.8 trillion parameters, Mistral a few billion."),
            Headline(24, "Open source means that anyone may use and change it."),
        ),
    ),
    Chapter(
        11, "gpu_inference", "GPU inference",
        "What limits the speed of a model that writes one token at a time?",
        ("devices", "fast_model", "engine", "speculative"), 60, 150, (8, 10),
        (Headline(12, "Six times the inference speed of Llama 2 70B."),),
    ),
    Chapter(
        12, "quantization", "Quantization",
        "How few bits does a weight need?",
        ("quantize",), 50, 140, (10,),
        (
            Headline(13, "An assistant that runs on a laptop with 16 GB."),
            Headline(14, "Quantization puts the model on a phone."),
        ),
    ),
    Chapter(
        13, "fine_tuning", "Fine-tuning and evaluation",
        "How does a model that continues text become one that answers, and how would we know?",
        ("lora", "questions", "instruct", "preference"), 55, 155, (5, 10),
        (
            Headline(16, "Fine-tuning adapts it to a domain cheaply."),
            Headline(22, "Best open model up to 13B; near GPT-4 on the benchmarks."),
        ),
    ),
    Chapter(
        14, "le_chat", "Le Chat and La Plateforme",
        "What stands between a model and a product?",
        ("streaming", "chat", "api", "batching"), 60, 150, (6, 13),
        (
            Headline(15, "The cloud makes AI slow and unsafe for data; on the device it is fast."),
            Headline(
                25,
                "Le Chat is the newest language model; Small, Large and Embed are optimised "
                "versions of the open models.",
            ),
        ),
    ),
)


def chapter(number: int) -> Chapter:
    """The chapter with this number; ValueError if there is none."""
    if number not in range(len(CHAPTERS)):
        raise ValueError(f"there is no chapter {number}; chapters are 0 to {len(CHAPTERS) - 1}")
    return CHAPTERS[number]


def headline(number: int) -> Headline:
    """The headline with this number; ValueError if no chapter takes it up."""
    headlines = {h.number: h for c in CHAPTERS for h in c.headlines}
    if number not in headlines:
        raise ValueError(f"there is no headline {number}; there are {sorted(headlines)}")
    return headlines[number]


def readme_table() -> str:
    """The course at a glance, as a Markdown table."""
    rows = ["| | Chapter | Its question | Core | With everything |", "|---|---|---|---|---|"]
    for c in CHAPTERS:
        rows.append(f"| {c.number} | [{c.title}]({c.path()}) | {c.question} | {c.core_minutes} min | {c.total_minutes} min |")
    core, total = (sum(minutes) / 60 for minutes in zip(*((c.core_minutes, c.total_minutes) for c in CHAPTERS)))
    rows.append(f"| | **All chapters** | | **{core:.0f} hours** | **{total:.0f} hours** |")
    return "\n".join(rows)


# ---------------------------------------------------------------- definitions

TEACHING_MODULES = (
    "config", "tokenizer", "attention", "rope", "layers", "model", "corpora", "tales", "cleaning",
    "train", "sampling", "generate", "cache", "moe", "checkpoint", "parity", "devices",
    "fast_model", "engine", "speculative", "quantize", "lora", "questions", "instruct",
    "preference", "streaming", "chat", "api", "batching",
)

# module -> {definition: chapter that shows it}
DEFINITIONS: dict[str, dict[str, int]] = {
    "config": {
        "MoEConfig": 9, "ModelConfig": 4, "config_from_params": 10, "ParameterCount": 10,
        "count_parameters": 10, "weight_bytes": 10,
        "cache_bytes_per_token": 10, "published": 10, "MODELS": 10,
    },
    "tokenizer": {
        "count_words": 1, "merge_pair": 1, "train_bpe_plain": 1, "train_bpe": 1,
        "ranks_from_merges": 1, "learn_ranks": 1, "encode_plain": 1, "fast_encode": 1,
        "Vocabulary": 1, "Tokenizer": 1, "load_tokenizer": 1, "PATTERN": 1,
        "CONTROL_TOKENS": 1,
    },
    "attention": {
        "causal": 2, "within_window": 8, "not_padding": 6, "may_attend": 8, "attend": 2,
        "repeat_heads": 7, "plain_attend": 7, "fast_attend": 7, "Attention": 7,
    },
    "rope": {
        "rotary_angles": 3, "rotate": 3,
    },
    "layers": {
        "RMSNorm": 4, "SwiGLU": 4,
    },
    "model": {
        "Block": 4, "Transformer": 4, "initialise": 4, "check_ids": 4, "find_positions": 6,
    },
    "corpora": {
        "Corpus": 5, "load_corpus": 5, "tales": 5, "tales_floor": 5, "python": 5,
        "shakespeare": 5, "split": 5,
    },
    "tales": {
        "tell": 5, "Writer": 5, "Surveyor": 5, "Contradiction": 5, "Reader": 5, "Parse": 5,
        "parse_tale": 5, "log_probability": 5, "Tale": 5, "sample_tale": 5, "source_entropy": 5,
        "score_tales": 5,
    },
    "cleaning": {
        "normalised": 5, "drop_repeats": 5, "common_pairs": 5, "drop_meaningless": 5,
        "shingles": 5, "similarity": 5, "signature": 5, "drop_near_repeats": 5,
    },
    "train": {
        "TrainConfig": 5, "check_train_config": 5, "Tokens": 5, "Rows": 5,
        "encode_documents": 5, "join_documents": 5, "row_starts": 5, "training_batch": 5,
        "validation_rows": 5, "next_token_nats": 5, "Evaluation": 5, "evaluate": 5,
        "parameter_groups": 5, "make_optimizers": 5, "learning_rate": 5,
        "accumulate_gradients": 5, "forward_loss": 5, "update": 5, "train": 5,
        "check_tokens": 5,
    },
    "sampling": {
        "keep_top_k": 6, "keep_top_p": 6, "next_distribution": 6, "draw": 6,
        "check_sampling": 6,
    },
    "generate": {
        "generate": 6, "stream": 6, "decode": 6, "read_prompts": 6, "choose": 6,
        "row_generator": 6, "as_prompts": 6,
    },
    "cache": {
        "LayerCache": 8, "KVCache": 8,
    },
    "moe": {
        "route": 9, "MoE": 9, "chosen_experts": 9, "all_experts": 9, "record_routing": 9,
        "balance_loss": 9,
    },
    "checkpoint": {
        "HF_NAMES": 10, "hf_name": 10, "permute_rotary": 10, "unpermute_rotary": 10,
        "rotary_heads": 10, "load_model": 10, "open_model": 10, "Place": 10, "locate": 10,
        "as_it_is": 10, "unstack": 10, "save_model": 10, "as_hf": 10,
    },
    "parity": {
        "Difference": 10, "first_difference": 10, "record": 10, "compare": 10,
        "differing": 10,
    },
    "devices": {
        "pick_device": 11, "pick_dtype": 11, "gives_the_same_as_the_cpu": 11,
        "describe_device": 11, "processor_name": 11, "memory_explained": 11,
    },
    "fast_model": {
        "product": 11, "AllCores": 11, "shared_forward": 11, "join_weights": 11, "Joint": 11,
        "is_plain": 11, "Visit": 11, "Ring": 11,
        "attend_to_slots": 11, "attend_to_many": 11, "FastBlock": 11, "FastSwiGLU": 11, "FastExperts": 11,
        "gathered_experts": 11, "one_expert": 11, "stacked_experts": 11, "FastModel": 11,
        "as_it_stands": 11, "by_rows": 11, "product_in_8_bits": 11, "OpaqueLayer": 11,
    },
    "engine": {
        "Stepper": 11, "fastest_step": 11, "say": 11, "compiled_step": 11, "Recording": 11,
        "check_engine": 11, "Seat": 11, "Places": 11, "run_seats": 11, "room_for": 11,
        "Engine": 11, "write_all": 11,
    },
    "speculative": {
        "Speculation": 11, "speculate": 11, "extend": 11, "check_drafts": 11, "accept": 11,
        "draw_one": 11, "check_speculation": 11, "PromptLookup": 11, "DraftModel": 11,
    },
    "quantize": {
        "quantize": 12, "dequantize": 12, "pack": 12, "unpack": 12, "QuantizedLinear": 12,
        "fast_int8": 12, "fast_int8_fits": 12, "agrees": 12, "fast_int4": 12, "Int4Linear": 12,
        "use_kernels": 12, "layers_to_quantize": 12, "quantize_model": 12,
    },
    "lora": {
        "LoRALinear": 13, "adapted": 13, "matrices": 13, "add_lora": 13, "replace_module": 13,
        "remove_lora": 13, "merge_lora": 13, "save_adapter": 13, "read_about": 13, "base_of": 13,
        "load_adapter": 13,
    },
    "questions": {
        "Question": 13, "ask": 13, "ask_about": 13, "interview": 13, "as_conversation": 13,
        "ask_who": 13, "ask_where": 13, "ask_person": 13,
        "lying": 13, "say": 13, "ask_untold": 13,
        "ask_end": 13, "ask_retell": 13, "retold": 13, "facts": 13,
        "ask_many": 13, "shared": 13, "is_right": 13,
    },
    "instruct": {
        "check_conversation": 13, "place_system": 13, "encode_chat": 13, "between": 13,
        "answer_rows": 13, "tuning_batch": 13, "fine_tune": 13, "answers": 13, "option_nats": 13,
        "last_answer": 13, "score_interval": 13,
    },
    "preference": {
        "Preference": 13, "answer_log_probs": 13, "dpo_loss": 13, "learn_preferences": 13,
    },
    "streaming": {
        "whole_characters": 14, "cut_at_stop": 14, "TextStream": 14,
    },
    "chat": {
        "fit_conversation": 14, "Talk": 14,
    },
    "api": {
        "Refused": 14, "as_refusal": 14, "as_event": 14, "Told": 14, "count_usage": 14, "Shape": 14,
    },
    "batching": {
        "Busy": 14, "Job": 14, "Seating": 14, "Desk": 14, "work_until_closed": 14, "end_all": 14,
    },
}
