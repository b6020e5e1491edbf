"""Encoders through the command line: warm, its prediction, and run --embed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from encoder_families import ENCODERS, PROMPTS, hidden_states, save_encoder
from transformers import AutoModel, PreTrainedModel

Run = Callable[..., Any]

CORE = {family.name: family for family in ENCODERS if family.core}
POOL: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda states: states[0],
    "mean": lambda states: states.mean(dim=0),
    "last": lambda states: states[-1],
}
WORDS = tuple(word for prompt in PROMPTS for word in ("--prompt-ids", ",".join(map(str, prompt))))
SIZES = ("--batch-size", "1", "--batch-size", "2", "--batch-size", "7")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """The directory of a tiny encoder, and the model itself as Transformers runs it eagerly."""
    root = tmp_path_factory.mktemp("encoders")
    models: dict[str, PreTrainedModel] = {}

    def save(name: str) -> tuple[Path, Any]:
        if name not in models:
            models[name] = save_encoder(CORE[name], root / name)
        return root / name, models[name]

    return save


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny BERT with a tokenizer, which puts [CLS] before and [SEP] after."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("encoders") / "texts"
    save_encoder(CORE["bert"], directory)
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{index}" for index in range(4, 100))]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    ).save_pretrained(directory)
    return directory


def embeddings(done: Any) -> torch.Tensor:
    assert done.code == 0, done.err
    return torch.tensor([row["embedding"] for row in done.json["embeddings"]])


def eagerly(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]] = PROMPTS, pooling: str = "mean"
) -> torch.Tensor:
    """What Transformers makes of each prompt alone."""
    return torch.stack([POOL[pooling](hidden_states(model, prompt)) for prompt in prompts])


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_embeddings_are_those_of_eager_transformers(
    name: str, batch: int, saved: Any, eager: Run
) -> None:
    directory, model = saved(name)
    done = eager("run", directory, "--embed", *WORDS, "--batch-size", str(batch), "--json")
    assert_same(embeddings(done), eagerly(model, PROMPTS[:batch]))


@pytest.mark.parametrize(
    "shaping",
    [
        ("--dynamic-shapes", "backed"),
        ("--dynamic-shapes", "backed-size-oblivious"),
        ("--layer-names", "baked"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", CORE)
def test_embeddings_are_the_same_however_the_model_is_captured(
    name: str, shaping: tuple[str, str], saved: Any, eager: Run
) -> None:
    directory, model = saved(name)
    words = (*WORDS, *shaping, "--compile-size", "19", "--json")
    done = eager("run", directory, "--embed", *words, *SIZES, "--fail-on-recompile")
    assert_same(embeddings(done), eagerly(model))
    assert done.json["recompiles"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", pytest.param("modernbert", marks=pytest.mark.thorough)])
def test_inductor_s_code_gives_the_embeddings_of_eager_transformers(
    name: str, saved: Any, vllmc: Run
) -> None:
    directory, model = saved(name)
    assert vllmc("warm", directory, "--json").json["outcome"] == "compiled"
    done = vllmc("run", directory, "--embed", *WORDS, *SIZES, "--fail-on-miss", "--json")
    assert_same(embeddings(done), eagerly(model))


def test_a_batch_longer_than_the_last_range_s_end_runs_whole(saved: Any, eager: Run) -> None:
    directory, model = saved("roberta")
    ranges = ("--compile-range", "1:4", "--compile-range", "5:8")
    done = eager("warm", directory, *ranges, "--json")
    assert {unit["range"] for unit in done.json["units"]} == {"1:4", "5:inf"}
    for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[2]):
        ids = ",".join(map(str, prompt))
        words = ("--embed", "--prompt-ids", ids, *ranges, "--fail-on-miss", "--json")
        assert_same(embeddings(eager("run", directory, *words)), eagerly(model, [prompt]))


def test_a_token_count_within_a_gap_between_ranges_is_refused(saved: Any, eager: Run) -> None:
    directory, _ = saved("bert")
    ranges = ("--compile-range", "1:4", "--compile-range", "9:16")
    done = eager("run", directory, "--embed", "--prompt-ids", "5,6,7,8,9", *ranges, "--json")
    assert (done.code, done.json["error"]["code"]) == (1, "size-out-of-range")


def test_warm_foretells_compiles_and_finds_an_encoder(saved: Any, eager: Run) -> None:
    directory, _ = saved("bert")
    assert eager("warm", directory, "--check").code == 3
    row = eager("warm", directory, "--json").json
    assert row["pieces"] == {"total": 7, "splitting": 3, "compilable": 4, "unique": 3}
    assert {unit["range"] for unit in row["units"]} == {"1:inf"}
    assert eager("warm", directory, "--check").code == 0
    said = eager("inspect-key", directory, "--json").json
    assert said["key"] == row["key"]
    assert said["prediction"]["outcome"] == "hit"
    done = eager("run", directory, "--embed", "--fail-on-miss", "--json")
    assert (done.json["key"], done.json["counts"]["hit"]) == (row["key"], 3)


def test_the_json_says_what_was_embedded_and_how(saved: Any, eager: Run) -> None:
    directory, _ = saved("bert")
    words = ("--prompt-ids", "5,6,7", "--prompt-ids", "8", "--batch-size", "3", "--json")
    row = eager("run", directory, "--embed", *words).json
    assert row["command"] == "run"
    assert row["pooling"] == "mean"
    assert [(e["prompt"], e["tokens"]) for e in row["embeddings"]] == [
        ("5,6,7", 3),
        ("8", 1),
        ("5,6,7", 3),
    ]
    assert {len(e["embedding"]) for e in row["embeddings"]} == {32}
    assert set(row["seconds"]) == {"load", "total"}
    assert row["tokens_per_second"] > 0
    assert row["counts"] == {"hit": 0, "dup": 0, "compiled": 3}
    assert "outputs" not in row


def with_pooling(directory: Path, **modes: bool) -> None:
    (directory / "1_Pooling").mkdir(exist_ok=True)
    fields = {f"pooling_mode_{name}": on for name, on in modes.items()}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(fields))


def test_pooling_is_the_model_s_own_unless_another_is_asked_for(
    workplace: Path, eager: Run
) -> None:
    model = save_encoder(CORE["bert"], workplace / "bert")
    with_pooling(workplace / "bert", cls_token=True, mean_tokens=False)
    words = ("run", "bert", "--embed", *WORDS, "--json")
    done = eager(*words)
    assert done.json["pooling"] == "cls"
    assert_same(embeddings(done), eagerly(model, pooling="cls"))
    for pooling in POOL:
        done = eager(*words, "--pooling", pooling)
        assert done.json["pooling"] == pooling
        assert_same(embeddings(done), eagerly(model, pooling=pooling))
    with_pooling(workplace / "bert", max_tokens=True)
    done = eager(*words)
    assert (done.code, done.json["error"]["code"]) == (1, "unsupported-pooling")


def test_what_a_model_does_after_pooling_is_told(workplace: Path, eager: Run) -> None:
    save_encoder(CORE["bert"], workplace / "bert")
    kinds = ("Transformer", "Pooling", "Normalize")
    rows = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (workplace / "bert" / "modules.json").write_text(json.dumps(rows))
    done = eager("run", "bert", "--embed")
    assert done.code == 0
    assert "warning[steps-left-out]: modules.json also names Normalize" in done.err


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_embeddings_are_written_to_a_file(
    suffix: str, saved: Any, workplace: Path, eager: Run
) -> None:
    directory, model = saved("distilbert")
    file = workplace / f"found.{suffix}"
    done = eager("run", directory, "--embed", *WORDS, "--embed-output", file, "--json")
    if suffix == "npy":
        written = torch.from_numpy(numpy.load(file))
    else:
        written = safetensors.torch.load_file(file)["embeddings"]
    assert written.dtype == torch.float32
    assert torch.equal(written, embeddings(done))
    assert_same(written, eagerly(model))


def test_a_file_that_cannot_be_written_is_named(saved: Any, workplace: Path, eager: Run) -> None:
    directory, _ = saved("bert")
    done = eager("run", directory, "--embed", "--embed-output", workplace / "no" / "where.npy")
    assert (done.code, done.error) == (1, "not-writable")
    assert "where.npy" in done.err


def test_texts_are_tokenized_as_the_model_s_tokenizer_does(texts: Path, spawn: Run) -> None:
    from transformers import AutoTokenizer

    prompts = ["w5 w6 w7", "w8"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    done = spawn("run", texts, "--embed", *words, "--backend", "eager", "--json")
    tokenizer = AutoTokenizer.from_pretrained(texts)
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    assert ids[1] == [1, 8, 2]
    assert_same(embeddings(done), eagerly(AutoModel.from_pretrained(texts).eval(), ids))
    assert [row["tokens"] for row in done.json["embeddings"]] == [5, 3]
    # Transformers would list the weights of the pooler, which is left out.
    assert [line for line in done.err.splitlines() if not line.startswith("[")] == [
        "capture",
        "load",
    ]


def test_a_person_sees_the_beginning_of_each_embedding(saved: Any, eager: Run) -> None:
    directory, model = saved("bert")
    done = eager("run", directory, "--embed", "--prompt-ids", "5,6,7", "--pooling", "last")
    lines = [line.rstrip() for line in done.out.splitlines()]
    assert lines[0] == "> 5,6,7"
    *numbers, rest = lines[1].split(", ")
    assert rest == "... (32 numbers)"
    shown = torch.tensor([float(number) for number in numbers])
    torch.testing.assert_close(shown, eagerly(model, [[5, 6, 7]], "last")[0][:6], rtol=0, atol=1e-4)
    names = [line.split("  ")[0] for line in lines[3:]]
    assert names == ["units", "pooling", "load", "speed", "recompiles"]


def test_an_encoder_without_embed_is_told_of_it(saved: Any, eager: Run) -> None:
    done = eager("run", saved("bert")[0])
    assert (done.code, done.error) == (2, "is-an-encoder")
    assert "--embed" in done.err


def test_a_decoder_is_not_embedded(eager: Run) -> None:
    done = eager("run", "tiny-llama", "--embed")
    assert (done.code, done.error) == (2, "not-an-encoder")


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        (("--embed", "--max-new-tokens", "16"), "--max-new-tokens"),
        (("--embed", "--seed", "0", "--ignore-eos"), "--seed and --ignore-eos"),
        (("--embed", "--logprobs", "0"), "--logprobs"),
        (("--embed", "--temperature", "0", "--top-p", "1"), "--temperature and --top-p"),
        (("--pooling", "cls"), "--embed"),
        (("--embed-output", "x.npy"), "--embed"),
        (("--embed", "--pooling", "max"), "cls, mean, last"),
        (("--embed", "--embed-output", "x.txt"), ".safetensors"),
        (("--embed", "--batch-size", "0"), "0 prompts"),
    ],
)
def test_flags_that_mean_nothing_together_are_refused(
    words: Sequence[str], mention: str, saved: Any, eager: Run
) -> None:
    done = eager("run", saved("bert")[0], *words)
    assert (done.code, done.error) == (2, "bad-value")
    assert mention in done.err


def test_a_prompt_that_the_encoder_has_no_positions_for_is_refused(saved: Any, eager: Run) -> None:
    directory, _ = saved("roberta")
    long = ",".join(["5"] * 63)
    done = eager("run", directory, "--embed", "--prompt-ids", long, "--json")
    assert (done.code, done.json["error"]["code"]) == (1, "prompt-too-long")
    assert "63 tokens; the model's maximum is 62" in done.json["error"]["message"]
    assert eager("run", directory, "--embed", "--prompt-ids", long[2:]).code == 0
