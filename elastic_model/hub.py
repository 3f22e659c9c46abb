"""To the hub: a model in memory with its code files, its tokenizer, its record of provenance and its card."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastic_model.card import TASKS, is_ours, write_card
from elastic_model.operating_points import FILE as POINTS_FILE
from elastic_model.operating_points import OperatingPoints
from elastic_model.provenance import (
    CARD,
    Parent,
    Stage,
    append_stage,
    hub_file,
    parent_provenance,
    weights_hash,
    write_provenance,
)

UNSTATED = "changes that are not stated"


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """As transformers' `push_to_hub`, in one commit with the tokenizer, if it is given, and a card.

    A card on the hub that somebody else wrote stays. What the card states comes from the record of the checkpoint
    that the model was loaded from, as long as the weights are still its weights. An adapter, or a class of the user's
    own, is uploaded without a card: what it does is not ours to say.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        ours = (folder / "config.json").is_file() and type(model).__name__ in TASKS
        if ours:
            carry_records(folder, model.config._name_or_path, getattr(model.config, "_commit_hash", None))
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if ours and not _has_card_of_somebody(api, repo_id, revision):
            write_card(folder, repo_id, tags=[*(tags or []), *(model.model_tags or [])])
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
        )


def carry_records(folder: Path, source: str, commit: str | None) -> None:
    """Beside the weights in `folder`, the record and the operating points of the checkpoint they were loaded from.

    `source`: that checkpoint's folder or, with a commit, its hub id. Where the weights have changed since, the record
    ends with a stage that says so, and the operating points, which no longer hold, stay behind.
    """
    if not source:
        return
    weights = weights_hash(folder)
    if commit is None and not Path(source).is_dir():  # a folder that is gone: its name might be anything on the hub
        write_provenance(folder, [Stage(stage=UNSTATED, checkpoint=weights, parent=Parent(name=Path(source).name))])
        return
    stages = parent_provenance(source, commit)
    if stages and stages[-1].checkpoint == weights:
        write_provenance(folder, stages)
    else:
        append_stage(folder, UNSTATED, parent=source, revision=commit)
    points = Path(source) / POINTS_FILE if Path(source).is_dir() else hub_file(source, POINTS_FILE, commit)
    if points and points.is_file() and OperatingPoints.read(points.parent).checkpoint == weights:
        shutil.copyfile(points, folder / POINTS_FILE)


def _has_card_of_somebody(api: HfApi, repo_id: str, revision: str | None) -> bool:
    try:
        card = api.hf_hub_download(repo_id, CARD, revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return False
    return not is_ours(Path(card))
