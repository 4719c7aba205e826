"""The real readers of what we write: vLLM's server here, plain transformers in test_transformers.py.

    python -m pytest -n 0 tests/consumers -m consumers -rP --model SMOLLM2 \
        --vllm-python VLLM_ENVIRONMENT/bin/python --gptqmodel-python GPTQMODEL_ENVIRONMENT/bin/python

SMOLLM2 is a folder with SmolLM2-135M-Instruct; the quickstart leaves one in `~/.cache/astro-dist`. The readers are in
environments of their own, and what is not given is skipped. Our pipeline quantizes the model four times, each in a
minute or two. `-rP` prints the figures.

What is expected of vLLM, the reference being plain transformers in the same dtype on our dequantized weights:

- given the tokens before it, every token that vLLM chooses is the reference's best, or within NEAR_TIE of it;
- the log-probability that it reports for it differs from the reference's by less than NEAR_TIE;
- so both greedy texts may part only where the reference's two best logits are a near tie, and never before MIN_EQUAL
  tokens.

vLLM has no kernel for 8-bit weights on a CPU, so only 4 bits are asked of it. It ignores the zero points of symmetric
GPTQ checkpoints; GPTQModel does not.
"""

import pytest
import torch
import transformers

from tests.consumers.conftest import PROMPTS
from tests.consumers.greedy_answer import NUM_TOKENS, require_greedy
from tests.consumers.vllm_server import ask, serve

pytestmark = [pytest.mark.consumers, pytest.mark.timeout(1800)]
DTYPE = "float16"


@pytest.fixture(scope="module", params=["compressed-tensors", "gptq"])
def completions(request, vllm_python, quantized, tmp_path_factory):
    """The format, and what vLLM continues each prompt with."""
    log = tmp_path_factory.mktemp("vllm") / "log"
    asked = {"model": "model", "max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": 1, "return_token_ids": True}
    with serve(vllm_python, quantized(request.param), DTYPE, log) as address:
        print(f"vLLM {ask(address, '/version')['version']}")
        answers = [ask(address, "/v1/completions", {**asked, "prompt": prompt})["choices"][0] for prompt in PROMPTS]
    return request.param, answers


@pytest.fixture(scope="module")
def reference(completions, dequantized):
    """Plain transformers on our dequantized weights."""
    folder = dequantized(completions[0])
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPE))


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_greedy_text_is_that_of_our_dequantized_weights(number, completions, reference, tokenizer):
    layout, answers = completions
    prompt, answer = tokenizer(PROMPTS[number], return_tensors="pt").input_ids, answers[number]
    assert answer["prompt_token_ids"] == prompt[0].tolist()
    require_greedy(answer, prompt, reference, f"{layout}: {PROMPTS[number] + answer['text']}")
