"""vLLM loads the adapter beside a model and answers by both; see test_vllm.py for how to run it and what is expected.

The reference is PEFT with the same adapter on our dequantized weights, in plain transformers and float32. Measured with
vLLM 0.32 on a CPU: all of 96 tokens are the reference's best, log-probabilities differ by at most 0.02; without the
adapter by 0.5.
"""

import peft
import pytest
import torch
import transformers

from tests.consumers.conftest import PROMPTS
from tests.consumers.greedy_answer import NEAR_TIE, NUM_TOKENS, require_greedy
from tests.consumers.test_vllm import DTYPE
from tests.consumers.vllm_server import ask, serve

pytestmark = [
    pytest.mark.consumers,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
RANK = 16


@pytest.fixture(scope="module")
def answers(vllm_python, quantized, tmp_path_factory):
    """What vLLM continues each prompt with, by the name of the model: with its adapter, and without."""
    folder, log = quantized("compressed-tensors", rank=RANK), tmp_path_factory.mktemp("vllm") / "log"
    adapter = ["--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"corrected={folder / 'adapter'}"]
    asked = {"max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": 1, "return_token_ids": True}
    with serve(vllm_python, folder, DTYPE, log, adapter) as address:
        print(f"vLLM {ask(address, '/version')['version']}")
        return {
            name: [
                ask(address, "/v1/completions", {**asked, "model": name, "prompt": prompt})["choices"][0]
                for prompt in PROMPTS
            ]
            for name in ("corrected", "model")
        }


@pytest.fixture(scope="module")
def reference(quantized, dequantized):
    folder = dequantized("compressed-tensors", rank=RANK)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = quantized("compressed-tensors", rank=RANK) / "adapter"
    return peft.PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_greedy_text_is_that_of_peft(number, answers, reference, tokenizer):
    prompt, answer = tokenizer(PROMPTS[number], return_tensors="pt").input_ids, answers["corrected"][number]
    require_greedy(answer, prompt, reference, PROMPTS[number] + answer["text"])


def test_the_adapter_changes_what_is_answered(answers):
    likelihoods = {
        name: [token for answer in of_name for token in answer["logprobs"]["token_logprobs"]]
        for name, of_name in answers.items()
    }
    assert likelihoods["corrected"] != pytest.approx(likelihoods["model"], abs=NEAR_TIE)
