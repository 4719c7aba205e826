"""A prompt continued by the original and by the result that was made of it, so that a person sees the difference."""

import dataclasses
import itertools
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from astro.errors import ConfigError
from astro.process import configure_process
from astro.storage.atomic import read_json
from astro.storage.checkpoint import Checkpoint
from astro_dist.config.yaml_file import load_recorded_config
from astro_dist.evaluation.greedy import greedy_tokens
from astro_dist.evaluation.judge_settings import JudgeSettings
from astro_dist.evaluation.streamed_model import StreamedModel
from astro_dist.evaluation.visible_text import note_on_blanks, visible
from astro_dist.export.named_model import find_model
from astro_dist.run_directory.identity import read_identity
from astro_dist.run_directory.layout import RunLayout
from astro_dist.source.resolve import Source, resolve_source
from astro_dist.source.text_tokens import require_known

__all__ = ["Beside", "Continued", "TryRequest", "continue_beside"]

_log = logging.getLogger("astro_dist")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TryRequest:
    """What shall be continued.

    Attributes:
        prompt: Text to continue.
        num_tokens: Largest number of new tokens.
        against: Model whose continuation stands beside; None for the source of the run.
        chat: Whether the prompt is a user's message in the model's own chat template.
    """

    prompt: str
    num_tokens: int = 60
    against: str | None = None
    chat: bool = False


@dataclasses.dataclass(frozen=True)
class Continued:
    """What a model made of a prompt.

    Attributes:
        model: Folder or repository of the model.
        text: Text behind the prompt.
        tokens: Tokens of that text, with the one that ended it, if any.
    """

    model: str
    text: str
    tokens: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Beside:
    """The continuations of both models.

    Attributes:
        original: What the original makes of the prompt.
        quantized: What the result makes of it.
        num_equal: Number of tokens at the beginning that both have.
    """

    original: Continued
    quantized: Continued
    num_equal: int

    def to_json(self) -> dict[str, Any]:
        """Return both as a JSON object."""
        return dataclasses.asdict(self)


def continue_beside(
    name: str, request: TryRequest, settings: JudgeSettings, show: Callable[[str], None], title: Callable[[str], None]
) -> Beside:
    """Let the original and then the result continue a prompt, each token the most likely one.

    Args:
        name: Run directory, or a model with `against`.
        request: What shall be continued.
        settings: Device, dtype and memory.
        show: Function that gets each piece of text as soon as it is known.
        title: Function that gets a line before the first piece of a model.

    Raises:
        InputError: There is no such model, or it is not known what it was made of.
    """
    settings.require_device()
    quantized, original = find_model(name), _original(name, request.against)
    configure_process(torch.get_num_threads())
    before = _continue(original, "original", request, settings, (show, title))
    after = _continue(quantized, "quantized", request, settings, (show, title))
    pairs = zip(before.tokens, after.tokens, strict=False)
    num_equal = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
    shorter = min(len(before.tokens), len(after.tokens))
    return Beside(before, after, shorter if num_equal is None else num_equal)


def _original(name: str, against: str | None) -> Source:
    """Find the model to stand beside: the one that is named, or the source of the run."""
    if against is not None:
        return find_model(against)
    layout = RunLayout.around(Path(name).expanduser().absolute())
    if not layout.identity.is_file():
        raise ConfigError(f"{name}: is no run directory, so that its original is not known; name it with --against")
    identity = read_identity(layout.root)
    source = resolve_source(load_recorded_config(layout.config).model, identity.commit)
    if Checkpoint.open(source.store).fingerprint() != identity.source_sha256:
        raise ConfigError(
            f"{source.store}: is not what {name} was made of any more (another fingerprint); name the original with "
            "--against"
        )
    return source


def _continue(
    source: Source,
    what: str,
    request: TryRequest,
    settings: JudgeSettings,
    output: tuple[Callable[[str], None], Callable[[str], None]],
) -> Continued:
    _log.info("%s: reading %s", what, source.store)
    model = StreamedModel(source, settings)
    prompt, ends = _prompt_tokens(model, request), _end_tokens(model, source.folder)
    longest = model.longest
    if longest is not None and len(prompt) + request.num_tokens > longest:
        raise ConfigError(
            f"--tokens {request.num_tokens}: with the {len(prompt)} tokens of the prompt more than the {longest} "
            f"positions of {model.name}; ask for fewer"
        )
    show, title = output
    is_whole = model.keep_if_it_fits()
    title(f"{what}: {model.name}" + ("" if is_whole else " (larger than the free memory: each token reads all blocks)"))
    shown = ""

    def written(tokens: Sequence[int]) -> str:
        return _written(model.tokenizer, [token for token in tokens if token not in ends])

    def is_enough(tokens: Sequence[int]) -> bool:
        nonlocal shown
        if tokens[-1] in ends:
            return True
        text = written(tokens)
        # The first bytes of a character wait for the others, which are in the next token.
        if len(text) > len(shown) and not text.endswith("�"):
            show(visible(text[len(shown) :]))
            shown = text
        return False

    tokens = greedy_tokens(model, prompt, request.num_tokens, is_enough)
    model.release()
    text, is_ended = written(tokens), bool(tokens) and tokens[-1] in ends
    show(f"{visible(text[len(shown) :])}{note_on_blanks(text, len(tokens) - is_ended)}\n")
    return Continued(model.name, text, tokens)


def _written(tokenizer: transformers.PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of tokens, special ones too. A model may have more tokens than its tokenizer has names for."""
    parts = []
    for is_known, run in itertools.groupby(tokens, lambda token: tokenizer.convert_ids_to_tokens(token) is not None):
        numbers = list(run)
        if is_known:
            parts.append(str(tokenizer.decode(numbers, skip_special_tokens=False)))
        else:
            parts += [f"<token {number}>" for number in numbers]
    return "".join(parts)


def _prompt_tokens(model: StreamedModel, request: TryRequest) -> list[int]:
    if not request.chat:
        tokens = list(model.tokenizer(request.prompt)["input_ids"])
    elif model.tokenizer.chat_template is None:
        raise ConfigError(f"--chat: the tokenizer of {model.name} has no chat template; try without --chat")
    else:
        message = [{"role": "user", "content": request.prompt}]
        text = model.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        tokens = list(model.tokenizer(str(text), add_special_tokens=False)["input_ids"])
    if not tokens:
        raise ConfigError(f"the prompt {shlex.quote(request.prompt)} has no tokens; write something to continue")
    require_known(max(tokens), model.skeleton.limits()[0], model.name)
    return tokens


def _end_tokens(model: StreamedModel, folder: Path) -> set[int]:
    """Return the tokens that end a text: the tokenizer's, and those of generation_config.json."""
    path = folder / "generation_config.json"
    told = read_json(path).get("eos_token_id") if path.is_file() else None
    ends = told if isinstance(told, list) else [told]
    return {int(end) for end in (*ends, model.tokenizer.eos_token_id) if end is not None}
