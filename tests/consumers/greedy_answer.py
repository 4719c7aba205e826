"""What is expected of the text by which a server continues a prompt; see test_vllm.py."""

import torch

__all__ = ["MIN_EQUAL", "NEAR_TIE", "NUM_TOKENS", "require_greedy"]

NUM_TOKENS = 24
NEAR_TIE = 0.05
"""Twice the largest difference of a log-probability that was measured: float16 with other kernels, nothing else."""
MIN_EQUAL = 16


@torch.no_grad()
def require_greedy(answer: dict, prompt: torch.Tensor, reference: torch.nn.Module, text: str) -> None:
    """Assert that every token is the reference's best or near it, as likely as there, and the first ones equal.

    Args:
        answer: A choice of the server's completion, with its tokens and their log-probabilities.
        prompt: Tokens of the prompt, int64 [1, T].
        reference: The model as the reference computes it.
        text: What is printed in front of the figures.
    """
    length, chosen = prompt.shape[1], torch.tensor(answer["token_ids"])
    greedy = reference.generate(input_ids=prompt, max_new_tokens=NUM_TOKENS, do_sample=False)[0, length:]
    likelihoods = reference(torch.cat([prompt[0], chosen])[None]).logits[0, length - 1 : -1].float().log_softmax(-1)
    own = likelihoods[torch.arange(len(chosen)), chosen]
    short = float((likelihoods.amax(-1) - own).max())
    difference = float((torch.tensor(answer["logprobs"]["token_logprobs"]) - own).abs().max())
    size = min(len(chosen), len(greedy))
    equal = int((chosen[:size] == greedy[:size]).long().cumprod(0).sum())
    print(
        f"{text!r}\n{equal} of {len(chosen)} tokens equal, short of the best by at most {short:.3f}, "
        f"log-probabilities differ by at most {difference:.3f}"
    )
    assert short < NEAR_TIE
    assert difference < NEAR_TIE
    assert equal >= min(MIN_EQUAL, len(greedy))
