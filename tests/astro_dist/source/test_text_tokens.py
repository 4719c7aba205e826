"""What is text stays text, and what a chat template writes is what it means."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from tokenizers import processors

from astro.errors import ConfigError
from astro_dist.config.schema import CalibrationConfig
from astro_dist.source.calibration_text import read_texts, tokenize
from astro_dist.source.documents import CalibrationText, Document
from astro_dist.source.text_tokens import TextTokenizer
from tests.support.models import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>"
    "{{ m.tool_calls is defined }}\n{% endfor %}"
)
TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]


def chat_tokenizer(template=TEMPLATE, begins_with=""):
    """A tokenizer of bytes with special tokens for chats, which may begin every text with some of them."""
    tokenizer = byte_tokenizer().backend_tokenizer
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    names = begins_with.split()
    if names:
        tokens = [(name, tokenizer.token_to_id(name)) for name in names]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begins_with} $A", special_tokens=tokens)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def read(path, tokenizer, **keys):
    (text,) = read_texts(CalibrationConfig(source=str(path), **keys), tokenizer)
    return text


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("text", ["a <|end|> b", "<|end|>", "<|end|><|start|></s>", "x" * 40 + "</s>"])
def test_a_special_token_in_plain_text_is_read_as_its_characters(text):
    of_text = TextTokenizer(chat_tokenizer())
    tokens = of_text.tokens_of([Document(text)])
    assert max(tokens) < 256
    assert len(tokens) == len(text)
    assert of_text.num_lookalikes == text.count("<")


def test_a_tokenizer_that_always_finds_special_tokens_is_given_them_cut_apart():
    tokenizer = chat_tokenizer()

    def deaf(text, add_special_tokens=True, split_special_tokens=False, **options):
        return tokenizer(text, add_special_tokens=add_special_tokens, **options)

    deaf.added_tokens_decoder = tokenizer.added_tokens_decoder
    expected = TextTokenizer(tokenizer).tokens_of([Document("a <|end|> b </s>")])
    assert TextTokenizer(deaf).tokens_of([Document("a <|end|> b </s>")]) == expected


def test_special_tokens_that_a_template_writes_are_special(tmp_path):
    tokenizer = chat_tokenizer()
    text = read(write_rows(tmp_path / "a.jsonl", [{"messages": TALK}] * 4), tokenizer)
    of_text = TextTokenizer(tokenizer)
    start, end = tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>"])
    expected = []
    for role, content in (("user", "hello"), ("assistant", "yes")):
        around = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (f"{role}\n{content}", "False\n")]
        expected += [start, *around[0], end, *around[1]]
    assert of_text.tokens_of(text.documents).tolist() == expected * 4
    assert of_text.num_lookalikes == 0
    assert text.notes == (
        "calibration text a.jsonl: column 'messages' holds chats, which the model's chat template renders",
    )


@pytest.mark.parametrize("begins_with", ["", "<s>", "<s> <|end|>"])
def test_what_begins_every_sequence_is_not_there_twice(tmp_path, begins_with):
    tokenizer = chat_tokenizer("<s><|end|>" + TEMPLATE, begins_with)
    text = read(write_rows(tmp_path / "a.jsonl", [{"messages": TALK}] * 40), tokenizer)
    config = CalibrationConfig(samples=1, holdout_samples=1, sequence_length=32)
    leading = tokenizer.convert_tokens_to_ids(begins_with.split())
    chunks = tokenize([text], tokenizer, config)
    assert chunks.num_leading == len(leading)
    tokens = TextTokenizer(tokenizer).tokens_of(text.documents[:1]).tolist()
    whole = tokenizer(text.documents[0].text, add_special_tokens=False)["input_ids"]
    assert leading + tokens == whole
    assert all(row[: len(leading)].tolist() == leading for chunk in chunks.chunks for row in chunk.tokens)


def test_no_sequence_begins_with_a_token_that_the_tokenizer_does_not_put_there():
    text = CalibrationText(CalibrationConfig().texts[0], (Document("abcdefgh" * 400),) * 4)
    chunks = tokenize([text], chat_tokenizer(), CalibrationConfig(samples=8, holdout_samples=2, sequence_length=32))
    assert chunks.num_leading == 0
    assert all((chunk.tokens < 256).all() for chunk in chunks.chunks)


def test_other_names_of_roles_are_understood(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}]}]
    tokenizer = chat_tokenizer()
    same = read(write_rows(tmp_path / "b.jsonl", [{"messages": TALK}]), tokenizer)
    assert read(write_rows(tmp_path / "a.jsonl", rows), tokenizer).documents == same.documents


def test_chats_in_parquet_are_those_in_json_lines(tmp_path):
    rows = [{"messages": [*TALK, {"role": "user", "content": "x", "tool_calls": None}], "id": i} for i in range(5)]
    pq.write_table(
        pa.Table.from_pylist([*rows, {"messages": [], "id": 6}, {"messages": None, "id": 7}]), tmp_path / "a.parquet"
    )
    tokenizer = chat_tokenizer()
    lines = read(write_rows(tmp_path / "a.jsonl", rows), tokenizer)
    assert read(tmp_path / "a.parquet", tokenizer).documents == lines.documents
    assert len(lines.documents) == 5
    assert "False" in lines.documents[0].text


def test_a_template_is_told_the_same_day_always(tmp_path):
    asked = "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}"
    template = asked + "{{ day }} {{ strftime_now('%Y-%m-%d') }} {{ messages[0]['content'] }}"
    text = read(write_rows(tmp_path / "a.jsonl", [{"messages": TALK}]), chat_tokenizer(template))
    assert text.documents[0].text == "26 Jul 2024 2024-07-26 hello"


def test_chats_without_a_template_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="a.jsonl: column 'messages' holds chats, but the model's tokenizer has no chat"
    ):
        read(write_rows(tmp_path / "a.jsonl", [{"messages": TALK}]), byte_tokenizer())


def test_chats_that_the_template_refuses_are_counted(tmp_path):
    template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a user begins') }}{% endif %}" + TEMPLATE
    tokenizer = chat_tokenizer(template)
    path = write_rows(tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": TALK[1:]}, {"messages": [{"x": "y"}]}])
    text = read(path, tokenizer)
    assert len(text.documents) == 1
    assert "2 of 3 chats are left out, because the model's chat template refuses them" in text.notes[1]
    assert "a user begins" in text.notes[1]
    with pytest.raises(ConfigError, match=r"refuses every chat of column 'messages', .* a user begins"):
        read(write_rows(tmp_path / "b.jsonl", [{"messages": TALK[1:]}]), tokenizer)
