"""Losses, divergences and their errors against naive float64 forms."""

import pytest
import torch

from astro.model import perplexity


def test_losses_equal_a_naive_log_softmax(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(11, (3, 7), generator=generator)
    logits = 3 * torch.randn(3, 7, 11, generator=generator)
    monkeypatch.setattr(perplexity, "run_head", lambda skeleton, ids, hidden, num_outputs: hidden)
    losses = [figures.loss for figures in perplexity.measure_sequences(None, ids, logits, num_outputs=0)]
    log_p = logits.double() - logits.double().exp().sum(-1, keepdim=True).log()
    expected = [-sum(float(log_p[i, t, ids[i, t + 1]]) for t in range(6)) for i in range(3)]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))


def test_divergence_from_the_source_equals_a_naive_sum(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(11, (2, 600), generator=generator)
    source = 3 * torch.randn(2, 600, 11, generator=generator)
    logits = source + torch.randn(2, 600, 11, generator=generator)
    monkeypatch.setattr(perplexity, "run_head", lambda skeleton, ids, hidden, num_outputs: hidden)
    figures = perplexity.measure_sequences(None, ids, logits, False, source)
    P, Q = source.double().softmax(-1), logits.double().softmax(-1)
    expected = (P * (P / Q).log()).sum(-1)[:, :-1].sum(-1)
    torch.testing.assert_close(
        torch.tensor([f.divergence for f in figures], dtype=torch.float64), expected, rtol=1e-5, atol=0
    )
    agree = (P.argmax(-1) == Q.argmax(-1))[:, :-1].sum(-1)
    assert [f.agreements for f in figures] == agree.tolist()
    (same, _) = perplexity.measure_sequences(None, ids, source, False, source)
    assert (same.divergence, same.agreements, same.tokens) == (0.0, 599, 599)


@pytest.mark.parametrize(("num_leading", "skipped"), [(0, 1), (1, 1), (2, 2), (4, 4)])
def test_only_tokens_of_the_text_are_predicted(monkeypatch, num_leading, skipped):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(11, (2, 7), generator=generator)
    source = 3 * torch.randn(2, 7, 11, generator=generator)
    logits = source + torch.randn(2, 7, 11, generator=generator)
    monkeypatch.setattr(perplexity, "run_head", lambda skeleton, ids, hidden, num_outputs: hidden)
    figures = perplexity.measure_sequences(None, ids, logits, 0, source, num_leading)
    log_p, log_q = source.double().log_softmax(-1), logits.double().log_softmax(-1)
    for i, of_sequence in enumerate(figures):
        positions = range(skipped, 7)
        loss = -sum(float(log_q[i, t - 1, ids[i, t]]) for t in positions)
        divergence = sum(float((log_p[i, t - 1].exp() * (log_p[i, t - 1] - log_q[i, t - 1])).sum()) for t in positions)
        assert of_sequence.tokens == 7 - skipped
        assert of_sequence.loss == pytest.approx(loss, rel=1e-5)
        assert of_sequence.divergence == pytest.approx(divergence, rel=1e-5)
    gradient = perplexity.loss_gradient(None, ids, logits, 0, num_leading)
    assert (gradient.abs().sum(-1) > 0).tolist() == [[skipped - 1 <= t < 6 for t in range(7)]] * 2
