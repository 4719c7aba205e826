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
from tests.consumers.test_vllm import DTYPE, MIN_EQUAL, NEAR_TIE, NUM_TOKENS
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
@torch.no_grad()
def test_greedy_text_is_that_of_peft(number, answers, reference, tokenizer):
    prompt, answer = tokenizer(PROMPTS[number], return_tensors="pt").input_ids, answers["corrected"][number]
    length, chosen = prompt.shape[1], torch.tensor(answer["token_ids"])
    greedy = reference.generate(input_ids=prompt, max_new_tokens=NUM_TOKENS, do_sample=False)[0, length:]
    likelihoods = reference(torch.cat([prompt[0], chosen])[None]).logits[0, length - 1 : -1].float().log_softmax(-1)
    own = likelihoods[torch.arange(len(chosen)), chosen]
    short = float((likelihoods.amax(-1) - own).max())
    difference = float((torch.tensor(answer["logprobs"]["token_logprobs"]) - own).abs().max())
    size = min(len(chosen), len(greedy))
    equal = int((chosen[:size] == greedy[:size]).long().cumprod(0).sum())
    print(
        f"{PROMPTS[number] + answer['text']!r}\n{equal} of {len(chosen)} tokens equal, short of the best by at most "
        f"{short:.3f}, log-probabilities differ by at most {difference:.3f}"
    )
    assert short < NEAR_TIE
    assert difference < NEAR_TIE
    assert equal >= min(MIN_EQUAL, len(greedy))


def test_the_adapter_changes_what_is_answered(answers):
    likelihoods = {
        name: [token for answer in of_name for token in answer["logprobs"]["token_logprobs"]]
        for name, of_name in answers.items()
    }
    assert likelihoods["corrected"] != pytest.approx(likelihoods["model"], abs=NEAR_TIE)
