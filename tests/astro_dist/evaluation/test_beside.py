"""A prompt is continued by the original and by the result, as transformers continues it."""

import dataclasses

import pytest
import torch
import transformers

from astro.errors import ConfigError
from astro_dist.evaluation.beside import TryRequest, continue_beside
from astro_dist.evaluation.judge_settings import JudgeSettings
from astro_dist.evaluation.visible_text import note_on_blanks, visible
from astro_dist.evaluation.words import beside_line
from tests.support.models import LLAMA, byte_tokenizer, write_checkpoint

CPU = JudgeSettings(device="cpu", dtype="float32")
REQUEST = TryRequest(prompt="Once upon", num_tokens=6)


def generated(folder):
    tokenizer = byte_tokenizer()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer(REQUEST.prompt, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return output[0, prompt["input_ids"].shape[1] :].tolist()


def run_it(name, request):
    shown, titles = [], []
    return continue_beside(str(name), request, CPU, shown.append, titles.append), "".join(shown), titles


def test_both_continue_as_transformers_does(finished, llama):
    beside, shown, titles = run_it(finished, dataclasses.replace(REQUEST, against=str(llama)))
    assert beside.original.tokens == generated(llama)
    assert beside.quantized.model == str(finished / "model")
    assert [title.split(":")[0] for title in titles] == ["original", "quantized"]
    texts = [each.text for each in (beside.original, beside.quantized)]
    assert shown == "".join(f"{visible(text)}{note_on_blanks(text, 6)}\n" for text in texts)
    assert beside_line(beside)


def test_original_of_a_run_is_its_source(finished, first_run):
    beside, _, _ = run_it(finished, REQUEST)
    assert beside.original.model == str(first_run.parent / "llama")
    same, _, _ = run_it(first_run.parent / "llama", dataclasses.replace(REQUEST, against=beside.original.model))
    assert same.num_equal == len(same.original.tokens) == 6
    assert beside_line(same) == "Both continue with the same 6 tokens"


def test_original_must_be_what_the_run_was_made_of(finished, first_run, tmp_path):
    assert run_it(finished / "model", REQUEST)[0].original.model == str(first_run.parent / "llama")
    other = write_checkpoint(tmp_path / "other", transformers.LlamaConfig(**LLAMA | {"rms_norm_eps": 0.1}))
    config = finished / "config.yaml"
    config.write_text(config.read_text().replace(str(first_run.parent / "llama"), str(other)))
    with pytest.raises(ConfigError, match="is not what .* was made of any more .*--against"):
        run_it(finished, REQUEST)


def test_token_that_ends_a_text_ends_it(first_run, tmp_path):
    source = first_run.parent / "llama"
    (first, *_), folder = generated(source), tmp_path / "ended"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{first}]}}')
    beside, shown, _ = run_it(source, dataclasses.replace(REQUEST, against=str(folder)))
    assert shown.startswith("(nothing: the text ends here)\n")
    assert beside.original.tokens == [first]
    assert beside.original.text == ""


@pytest.mark.parametrize("tokens", [[0, 10, 27], list("\u202e".encode()), [0xE8, 0xAA], [259, 97], [10, 10]])
def test_nothing_that_was_written_is_lost(llama, monkeypatch, tokens):
    def write(model, prompt, num_tokens, is_enough):
        return [token for number, token in enumerate(tokens) if not is_enough(tokens[: number + 1]) or True]

    monkeypatch.setattr("astro_dist.evaluation.beside.greedy_tokens", write)
    beside, shown, _ = run_it(llama, dataclasses.replace(REQUEST, against=str(llama)))
    text = byte_tokenizer().decode(tokens) if 259 not in tokens else f"<token 259>{byte_tokenizer().decode(tokens[1:])}"
    assert beside.original.text == text
    assert shown == 2 * f"{visible(text)}{note_on_blanks(text, len(tokens))}\n"
    assert shown.replace("\n", "").strip()
    assert all(character.isprintable() for character in shown.replace("\n", ""))


def test_what_cannot_be_tried_is_refused(llama, finished):
    with pytest.raises(ConfigError, match="is no run directory, so that its original is not known"):
        run_it(llama, REQUEST)
    with pytest.raises(ConfigError, match="more than the 128 positions"):
        run_it(finished, dataclasses.replace(REQUEST, num_tokens=200))
    with pytest.raises(ConfigError, match="has no tokens"):
        run_it(finished, dataclasses.replace(REQUEST, prompt=""))
    with pytest.raises(ConfigError, match="has no chat template"):
        run_it(finished, dataclasses.replace(REQUEST, chat=True))
    (finished / "model.json").unlink()
    with pytest.raises(ConfigError, match="its run is not finished"):
        run_it(finished, REQUEST)
