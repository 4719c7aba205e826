"""A streamed model as lm-evaluation-harness knows models: it tokenizes and scores as the harness's own `hf` does."""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from astro.errors import CheckpointError, ConfigError, UnsupportedError
from astro_dist.evaluation.greedy import greedy_sequences
from astro_dist.evaluation.streamed_model import StreamedModel
from astro_dist.evaluation.token_scores import Continuation, score_continuations

__all__ = ["HarnessModel"]

_Pair = tuple[tuple[str, str], list[int], list[int]]
"""Texts of a context and a continuation, and the tokens of both."""
_UNKNOWN_LENGTH = 2048
"""Longest sequence of a model that does not say how many positions it has, as in the harness."""
_NEW_TOKENS = 256
"""Tokens of an answer where the task does not say, as in the harness."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Answers all requests of a task at once, so that a block is read once for all of them."""

    def __init__(self, model: StreamedModel, batch_tokens: int) -> None:
        """Take a model.

        Args:
            model: The model.
            batch_tokens: Number of tokens that pass through a block together.
        """
        super().__init__()
        self._model, self._batch_tokens = model, batch_tokens
        self.tokenizer = model.tokenizer
        self._device = torch.device("cpu")  # of what the harness itself computes

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            CheckpointError: The tokenizer has none.
        """
        if self.tokenizer.eos_token_id is None:
            raise CheckpointError(
                f"{self._model.name}: its tokenizer names no token that ends a text, which tasks ask for; set "
                "eos_token in its tokenizer_config.json"
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        """Number of tokens of the longest sequence."""
        return self._model.longest or _UNKNOWN_LENGTH

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the tokenizer."""
        return self._model.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text.

        Args:
            string: The text.
            add_special_tokens: Whether the tokenizer adds its own tokens; None leaves it to the tokenizer, unless the
                text begins with them.
        """
        begins = string.startswith(self._decoded([self.prefix_token_id]))
        asked = False if add_special_tokens is None and begins else add_special_tokens
        return list(self.tokenizer.encode(string, **({} if asked is None else {"add_special_tokens": asked})))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text.

        Args:
            requests: Requests, each with a text.
            disable_tqdm: Not used.
        """
        pairs: list[_Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            for window in map(make_disjoint_window, windows):
                pairs.append((("", text), *window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[owner] += likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each text, until one of its stops or the largest number of tokens.

        Args:
            requests: Requests, each with a text and the task's settings.
            disable_tqdm: Not used.

        Raises:
            UnsupportedError: A task asks for sampled tokens.
        """
        settings = [normalize_gen_kwargs(request.args[1], _NEW_TOKENS) for request in requests]
        if any(each.get("do_sample") for each in settings):
            raise UnsupportedError(
                f"task {requests[0].task_name}: asks for sampled tokens (do_sample), which a streamed model does not "
                "give; choose a task with greedy answers"
            )
        end = self._decoded([self.eot_token_id])
        stops = [handle_stop_sequences(each.get("until"), end) for each in settings]
        limits = [int(each["max_gen_toks"]) for each in settings]
        room = self.max_length - max(limits)
        if room < 1:
            raise ConfigError(
                f"task {requests[0].task_name}: asks for {max(limits)} new tokens, the model has {self.max_length} "
                "positions in all"
            )
        prompts = [self.tok_encode(request.args[0])[-room:] for request in requests]

        def is_enough(number: int, tokens: Sequence[int]) -> bool:
            text = self._decoded(tokens)
            return any(stop in text for stop in stops[number] if stop)

        made = greedy_sequences(self._model, prompts, limits, is_enough, self._batch_tokens)
        return [
            str(postprocess_generated_text(self._decoded(tokens), stop, None))
            for tokens, stop in zip(made, stops, strict=True)
        ]

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens)))

    def _loglikelihood_tokens(self, requests: list[_Pair], **_: Any) -> list[tuple[float, bool]]:
        asked = []
        for _texts, context, continuation in requests:
            # A sequence that is too long loses its beginning; its last token is only predicted.
            tokens = (*context, *continuation)[-(self.max_length + 1) :]
            asked.append(Continuation(tokens, len(continuation)))
        scores = score_continuations(self._model, asked, self._batch_tokens)
        return [(score.log_likelihood, score.is_greedy) for score in scores]
