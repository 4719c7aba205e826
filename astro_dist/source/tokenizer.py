"""Load the tokenizer of a model."""

from pathlib import Path

import transformers

from astro.errors import CheckpointError

__all__ = ["load_tokenizer"]


def load_tokenizer(
    place: Path | str, name: str, trust_remote_code: bool, revision: str = "main"
) -> transformers.PreTrainedTokenizerBase:
    """Return the tokenizer of a model.

    Args:
        place: Folder of the model, or ORG/NAME on the Hub.
        name: Name of the model in messages.
        trust_remote_code: Whether code that the model ships may run.
        revision: Branch, tag or commit of a repository on the Hub.

    Raises:
        CheckpointError: The tokenizer cannot be loaded.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exceptions for files it cannot parse
        raise CheckpointError(f"{name}: its tokenizer cannot be loaded: {error}") from error
