"""The loss of a sequence equals a naive sum of log-probabilities."""

import torch

from astro.model import perplexity


def test_losses_equal_a_naive_log_softmax(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(11, (3, 7), generator=generator)
    logits = 3 * torch.randn(3, 7, 11, generator=generator)
    monkeypatch.setattr(perplexity, "run_head", lambda skeleton, ids, hidden, as_tuple: hidden)
    losses = perplexity.sequence_losses(None, ids, logits, as_tuple=False)
    log_p = logits.double() - logits.double().exp().sum(-1, keepdim=True).log()
    expected = [-sum(float(log_p[i, t, ids[i, t + 1]]) for t in range(6)) for i in range(3)]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))
