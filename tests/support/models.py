"""Inputs and models for tests: correlated tokens, random weights, tiny checkpoints that transformers writes."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from astro.storage.atomic import sha256_of

__all__ = ["LLAMA", "byte_tokenizer", "correlated_inputs", "files_of", "random_weights", "shrunk", "write_checkpoint"]

LLAMA = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def correlated_inputs(num_tokens: int, num_columns: int, seed: int = 0) -> torch.Tensor:
    """Return tokens whose columns are correlated and of very different sizes, as activations are: float64 [T, C]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_columns, num_columns, generator=generator, dtype=torch.float64)
    size = torch.rand(num_columns, generator=generator, dtype=torch.float64) ** 4 + 0.02
    return torch.randn(num_tokens, num_columns, generator=generator, dtype=torch.float64) @ mix * size


def naive_hessian(X: torch.Tensor, weights: torch.Tensor | None = None, repeats: int = 1) -> torch.Tensor:
    """Return the weighted mean of xxᵀ, shrunk towards its diagonal, in float64.

    Args:
        X: Inputs of a layer [T, C].
        weights: Weight of each token [T]; 1 where not given.
        repeats: How often every token was seen.
    """
    X = X.double()
    w = torch.ones(len(X), dtype=torch.float64) if weights is None else weights.double()
    H = (X.T * w) @ X / w.sum()
    energies = w * X.square().sum(-1)
    tokens = repeats * energies.sum() ** 2 / energies.square().sum()
    return shrunk(H, H.diagonal(), float(tokens))


def shrunk(M: torch.Tensor, energies: torch.Tensor, tokens: float) -> torch.Tensor:
    """Return a matrix as a Hessian is shrunk: in a column above the mean energy as if it had that of the mean.

    Args:
        M: A mean over tokens [C, C] in float64.
        energies: Diagonal of the Hessian [C].
        tokens: Number of effective tokens.
    """
    added = len(M) / tokens * (energies.mean() / energies).clamp(max=1)
    result = M / ((1 + added[:, None]) * (1 + added)) ** 0.5
    return result + torch.diag(M.diagonal() - result.diagonal())


def random_weights(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    """Return heavy-tailed weights, float32 [R, C]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, columns, generator=generator)


def files_of(folder: Path, with_card: bool = False) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder by name.

    A model's card is left out unless it is asked for, because it tells hardware and seconds.
    """
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    hashes = {str(path.relative_to(folder)): sha256_of(path) for path in files}
    return {name: sha256 for name, sha256 in hashes.items() if with_card or name != "README.md"}


def byte_tokenizer() -> Any:
    """Return a tokenizer that makes one token of each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_checkpoint(folder: Path, config: Any, dtype: torch.dtype = torch.float32, shard: str = "60KB") -> Path:
    """Write a random model of a transformers config, in several shards and with a tokenizer, and return its folder."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype)  # which alters it
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return folder
