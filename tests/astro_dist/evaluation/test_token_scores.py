"""Scores of continuations, and greedy tokens, are the whole model's, however sequences are put together."""

import pytest
import torch
import transformers

from astro_dist.evaluation.greedy import greedy_sequences, greedy_tokens
from astro_dist.evaluation.judge_settings import JudgeSettings
from astro_dist.evaluation.streamed_model import StreamedModel
from astro_dist.evaluation.token_scores import Continuation, fill_batches, score_continuations
from astro_dist.export.named_model import find_model
from tests.support.architectures import DENSE, EXPERTS, STATEFUL
from tests.support.models import write_checkpoint

CPU = JudgeSettings(device="cpu", dtype="float32")
NAMES = {"llama": DENSE, "gemma3": DENSE, "bloom": DENSE, "qwen3-next": EXPERTS, "glm5": STATEFUL}


def sequence(length, seed):
    return tuple(torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def whole(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


@torch.no_grad()
def naive(model, continuation):
    """The score of one sequence alone, by the whole model."""
    tokens, count = torch.tensor(continuation.tokens), continuation.num_scored
    logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0, -count:].double()
    chosen = logits.log_softmax(-1).gather(-1, tokens[-count:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == tokens[-count:]).all())


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_whole_models(name, tmp_path):
    folder = write_checkpoint(tmp_path / name, NAMES[name][name])
    question = sequence(9, 1)
    asked = [
        *(Continuation((*question, answer), 1) for answer in (5, 6, 7)),
        Continuation(sequence(17, 2), 16),
        Continuation(sequence(4, 3), 2),
        Continuation((*question, 5, 8), 2),
        Continuation((*question, 5), 4),
        Continuation(sequence(2, 4), 1),
    ]
    model = whole(folder)
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([question]), use_cache=False).logits[0, -1].argmax())
    asked.append(Continuation((*question, best), 1))
    streamed = StreamedModel(find_model(str(folder)), CPU)
    scores = score_continuations(streamed, asked, batch_tokens=40)
    assert streamed.num_readings == 1
    for continuation, score in zip(asked, scores, strict=True):
        likelihood, is_greedy = naive(model, continuation)
        assert score.log_likelihood == pytest.approx(likelihood, rel=1e-5)
        assert score.is_greedy == is_greedy
    assert scores[-1].is_greedy


def test_scores_do_not_hang_on_waves(llama):
    asked = [Continuation(sequence(5 + number, number), 3) for number in range(6)]
    at_once = score_continuations(StreamedModel(find_model(str(llama)), CPU), asked, batch_tokens=16)
    little = StreamedModel(find_model(str(llama)), JudgeSettings(device="cpu", dtype="float32", hidden_gb=5e-6))
    assert score_continuations(little, asked, batch_tokens=16) == at_once
    assert little.num_readings > 2


def test_batches_hold_sequences_of_about_one_length():
    batches = fill_batches([(1,) * length for length in (3, 9, 2, 8, 20)], batch_tokens=18)
    assert [[len(tokens) for tokens in batch] for batch in batches] == [[20], [9, 8], [3, 2]]


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3-next"])
def test_greedy_tokens_are_those_of_generate(name, is_kept, tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / name, NAMES[name][name])
    prompts = [sequence(length, length) for length in (7, 3, 7, 5)]
    model = whole(folder)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [
        model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)[0].tolist()
        for prompt in prompts
    ]
    pairs = list(zip(prompts, expected, strict=True))
    if not is_kept:
        monkeypatch.setattr("astro_dist.evaluation.streamed_model._KEPT_SHARE", 0.0)
    streamed = StreamedModel(find_model(str(folder)), CPU)
    made = greedy_sequences(streamed, prompts, [6, 6, 4, 6], lambda n, tokens: len(tokens) == 6 - n, batch_tokens=20)
    assert made == [ids[len(prompt) :][: 6 - number] for number, (prompt, ids) in enumerate(pairs)]
    seen = []
    again = greedy_tokens(streamed, prompts[1], 4, lambda tokens: bool(seen.append(list(tokens))))
    assert again == expected[1][3:7]
    assert seen == [again[:count] for count in (1, 2, 3, 4)]
    assert streamed.num_readings == (1 if is_kept else 10)
