"""What a stage says of every dev row at every exit, kept beside its weights: its quality needs no further pass."""

import numpy as np
from accelerate import Accelerator

from elastic_model.folders import new_file
from elastic_model.session import ElasticSession, exit_values
from finetune.data import Encoded, sorted_batches
from finetune.evaluate import exit_logits, quality
from finetune.explore import encodings_of
from finetune.kinds import answers_of
from finetune.pipelines.work import Work
from finetune.prepare import load_classifier, load_tokenizer

ANSWERS = "dev.npz"
ExitMetrics = dict[int, dict[str, float]]  # exit layer -> metric -> value


def _of_export(session: ElasticSession, encoded: Encoded, batch_size: int) -> np.ndarray:
    """As `exit_logits`, of an exported file."""
    rows, logits = encodings_of(encoded), None
    for batch in sorted_batches(encoded.lengths, batch_size):
        part = exit_values(session.run([rows[row] for row in batch], session.never, session.exit_layers[-1]))
        *tokens, labels = part.shape[2:]
        if logits is None:
            tokens_of_longest = [max(encoded.lengths)] if tokens else []
            logits = np.zeros((len(session.exit_layers), len(rows), *tokens_of_longest, labels), np.float32)
        place: tuple = (slice(None), batch, *map(slice, part.shape[2:-1]))
        logits[place] = np.nan_to_num(part)
    assert logits is not None  # a split has rows
    return logits


def answer(work: Work, stage: str) -> ExitMetrics:
    """Ask a stage about dev, keep the logits of every exit beside its weights; quality by exit."""
    folder, size = work.folder(stage), work.options.eval_batch_size
    if "Q" in stage:
        session = ElasticSession.from_pretrained(folder)
        exits, logits = session.exit_layers, _of_export(session, work.dev, size)
        labels = work.labels_of(session.no_answer_threshold)
    else:
        accelerator = Accelerator()
        model = load_classifier(folder, work.options.max_length).to(accelerator.device)
        exits, logits = model.exit_layers, exit_logits(model, work.dev, load_tokenizer(folder), size, accelerator)
        labels = work.labels_of(model.config.no_answer_threshold)
    with new_file(folder / ANSWERS) as file, file.open("wb") as kept:
        np.savez_compressed(kept, logits=logits)
    return {
        layer: quality(answers_of(one, work.dev, labels), work.dev, labels)
        for layer, one in zip(exits, logits, strict=True)
    }


def read_answers(work: Work, stage: str) -> np.ndarray:
    """The logits of every exit on dev, (exits, rows, ..., labels)."""
    with np.load(work.folder(stage) / ANSWERS, allow_pickle=False) as kept:
        logits: np.ndarray = kept["logits"]
    return logits
