"""What was found out about models, in words and tables for a terminal."""

from typing import TYPE_CHECKING

from rich.filesize import decimal
from rich.table import Table

from astro_dist.console import compact_table, in_words

if TYPE_CHECKING:  # some of them import torch, which the command at hand may not need
    from astro_dist.evaluation.beside import Beside
    from astro_dist.evaluation.judge import Judgement
    from astro_dist.evaluation.text_loss import TextLoss

__all__ = ["beside_line", "judgement_lines", "task_table"]


def judgement_lines(judgement: "Judgement") -> list[str]:
    """Describe how a model was judged, its perplexity, and what that is worth.

    Args:
        judgement: What was found out.
    """
    dtype = judgement.dtype.removeprefix("torch.")
    whose = " of a worker" if judgement.text and judgement.text.peak_rss_bytes else ""
    head = (
        f"{judgement.model}, in {dtype} on {judgement.device}, block by block; most memory "
        f"{decimal(judgement.peak_rss_bytes)}{whose}"
    )
    notes = (f"note: {note}" for note in judgement.notes)
    return [head, *(_text_lines(judgement.text) if judgement.text else []), *notes]


def _text_lines(text: "TextLoss") -> list[str]:
    error = "" if text.error is None else f" ± {text.error:.3f}"
    unused = f", {text.unused_tokens:,} tokens are left over" if text.unused_tokens else ""
    leading = f", the first {text.leading_tokens} of each no text" if text.leading_tokens else ""
    lines = [
        f"Perplexity {text.perplexity:.4f}{error} ({text.text}, {text.windows} windows of {text.window} tokens"
        f"{leading}{unused}; {in_words(text.wall_s)})"
    ]
    compared = text.compared
    if compared is not None and compared.original is not None:
        lines.append(f"{compared.original:.4f} in {text.against}, so that it changes by {compared.change_in_words}")
        lines.append(f"{compared.divergence_in_words}, of {compared.sample_in_words}")
    return lines


def task_table(judgement: "Judgement") -> Table:
    """Make the table of a model's scores in tasks.

    Args:
        judgement: What was found out.
    """
    table = compact_table()
    table.add_column("task", overflow="fold")
    for title in ("examples", "figure", "score", "±", "questions", "in %"):
        table.add_column(title, justify="left" if title == "figure" else "right", no_wrap=True)
    for score in judgement.tasks:
        is_share = 0 <= score.value <= 1
        table.add_row(
            score.task,
            "-" if score.shots is None else str(score.shots),
            score.metric,
            f"{score.value:.4f}",
            "-" if score.error is None else f"{score.error:.4f}",
            "-" if score.samples is None else f"{score.samples:,}",
            f"{100 * score.value:.1f}" if is_share else "-",
        )
    return table


def beside_line(beside: "Beside") -> str:
    """Say how far two continuations are the same.

    Args:
        beside: The continuations.
    """
    count = max(len(beside.original.tokens), len(beside.quantized.tokens))
    if beside.original.tokens == beside.quantized.tokens:
        return f"Both continue with the same {count} tokens"
    return f"The first {beside.num_equal} of {count} tokens are the same"
