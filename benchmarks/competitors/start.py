"""What the competitors share: a fine-tuned model with its splits, a training loop, written points."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from elastic_model.modeling_elasticbert import ElasticBertExitModel
from finetune.data import Encoded, collate, shuffled_batches
from finetune.elue.config import SizeOptions
from finetune.elue.costs import ModuleCost, table_of
from finetune.elue.jobs import Job
from finetune.elue.methods import Setting
from finetune.elue.points import Subject, outputs_of, write_point
from finetune.train import learning_rate

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Start:
    """Where a competitor starts: a single-exit model fine-tuned on the task, and the tokenised splits."""

    options: SizeOptions
    job: Job
    seed: int
    subject: Subject
    splits: dict[str, Encoded]

    @property
    def model(self) -> ElasticBertExitModel:
        """The fine-tuned model."""
        return self.subject.model

    @property
    def problem_type(self) -> str:
        """Of the task."""
        return self.job.kind.problem_type

    @property
    def updates(self) -> int:
        """Of a `fit`."""
        return self.job.epochs * math.ceil(len(self.splits["train"]) / self.options.batch_size)

    def train_batches(self, epoch: int) -> Iterable[Batch]:
        """The batches of an epoch, with labels."""
        train = self.splits["train"]
        for rows in shuffled_batches(train.lengths, self.options.batch_size, self.seed, epoch):
            yield collate(train, rows, self.subject.tokenizer, self.model.device)

    def fit(
        self,
        model: torch.nn.Module,
        losses: Callable[[Batch], Iterable[torch.Tensor]],
        others: Iterable[torch.nn.Parameter] = (),
        others_rate: float = 0.0,
    ) -> None:
        """Train for the epochs of the job with AdamW and BERT's schedule; each of the losses goes backward by itself.

        others: parameters beside the model's, with a rate of their own, kept within 0 and 1.
        """
        torch.manual_seed(self.seed)
        others = list(others)
        groups = [{"params": list(model.parameters()), "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups if others else groups[:1], lr=self.job.learning_rate, fused=True)
        batches = [batch for epoch in range(self.job.epochs) for batch in self.train_batches(epoch)]
        model.train()
        for update, batch in enumerate(batches):
            rates = (self.job.learning_rate, others_rate)
            for group, rate in zip(optimizer.param_groups, rates, strict=False):
                group["lr"] = learning_rate(update, len(batches), rate, warmup=0.1)
            for loss in losses(batch):
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for parameter in others:
                    parameter.clamp_(0.0, 1.0)
        model.eval()

    def write(
        self, folder: Path, name: str, model: ElasticBertExitModel, length_config: list[int] | None = None
    ) -> dict[str, ModuleCost]:
        """The test file of one operating point, and what its modules cost: they carry the name of the point, since
        another point's are of other widths."""
        subject = Subject(model.eval(), self.subject.tokenizer, self.subject.labels, self.subject.batch_size)
        setting = Setting(name, subject.exit_layers[-1], length_config=length_config)
        test = self.splits["test"]
        outputs = outputs_of(subject, test, setting)
        write_point(subject, setting, outputs, test, folder, self.job.kind.classes, suffix=f"@{name}")
        table = table_of(model.config, self.job.kind.outputs).modules
        return {f"{module}@{name}": cost for module, cost in table.items()}
