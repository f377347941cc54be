"""Continue a prompt with a trained model of text, token by token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from regrow.errors import DataError, UserError
from regrow.feeding.vocabulary import Vocabulary, from_record
from regrow.numerics.calls import call
from regrow.numerics.precision import autocast, widest
from regrow.randomness import generator
from regrow.runs.loaded import LoadedRun
from regrow.runs.predictions import kind_of


def vocabulary_of(run: LoadedRun) -> Vocabulary:
    """Return the vocabulary of a run on text. Raises UserError for any other run."""
    record = None if run.recorded is None else run.recorded.vocabulary
    kind = kind_of(run.task)
    if kind != "language" or record is None:
        what = f"task={kind}" if kind != "language" else "data without a text"
        raise UserError(
            f"run={run.folder}: not a language model of a text, but {what}. Name a run of "
            "task=language data=text."
        )
    return from_record(record, f"run={run.folder}")


def generate(
    run: LoadedRun, prompt: str, *, tokens: int, temperature: float, top_k: int | None, seed: int
) -> Iterator[str]:
    """Yield the text that follows `prompt`, piece by piece, until `tokens` or an end token.

    Each token is drawn from the model's probabilities after the last tokens of its context, which
    `temperature` divides the logits of, and of which the `top_k` largest remain; temperature 0
    takes the largest. The seed alone decides the draws. Without a prompt, a document begins.
    """
    words = vocabulary_of(run)
    try:
        known = words.encode(prompt).tolist()
    except DataError as error:
        raise UserError(f"prompt={prompt[:40]}: {error}") from None
    random = generator(seed, "generate")
    shape = run.preprocessing.input_shape
    assert shape is not None  # a text's
    context = shape[0]
    # Every document follows an end token, but for the first of a split.
    row, shown = [words.end, *known], len(known)
    for _ in range(tokens):
        inputs = torch.tensor([row[-context:]], device=run.device)
        with torch.no_grad(), autocast(run.device, run.precision):
            outputs: Tensor = call(run.model, inputs)
        token = drawn(widest(outputs[0, -1, : words.size]).cpu(), temperature, top_k, random)
        if token == words.end:
            break
        row.append(token)
        text = words.decode(row[1:][-(len(row) - 1 - shown) :])
        if not text.endswith("\ufffd"):  # a character's bytes may be several tokens
            yield text
            shown = len(row) - 1
    if shown < len(row) - 1:
        yield words.decode(row[1 + shown :])


def drawn(logits: Tensor, temperature: float, top_k: int | None, random: torch.Generator) -> int:
    """Return a token drawn by its logits (C,) float64, as `generate` says."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        least = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = (logits / temperature).softmax(0)
    return int(torch.multinomial(probabilities, 1, generator=random))
