"""A saved folder to the Hub, in one commit, and only if what is pushed gives the logits that were trained."""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelInfo, constants
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from onestep_peft.errors import PushError, without_secrets
from onestep_peft.hub.inspection import check_kind
from onestep_peft.hub.probe import check_in_fresh_process
from onestep_peft.hub.remote import Journal, StaleParentError, attempt, client, files_at, interruptible
from onestep_peft.hub.staging import is_repo_id, pinned_base, staged
from onestep_peft.report import FILE, StepReport
from onestep_peft.saving import read_whole, sha256

MAIN = "main"


@dataclass(frozen=True)
class PushResult:
    """Where a folder went.

    Args:
        repo_id: `user/name`.
        revision: The branch, or `refs/pr/N`.
        commit: The commit that holds the files; None after a dry run.
        url: Of the commit, or of the pull request; of the repository after a dry run.
        tag: The tag on the commit, if one was asked for.
        files: Size in bytes by name.
        difference: How far a fresh process' logits were from the recorded ones, by their scale.
        notes: What was met on the way, such as somebody else's commit.
        new: Whether there was anything to send: the branch may hold the same files already.
    """

    repo_id: str
    revision: str
    commit: str | None
    url: str
    tag: str | None
    files: dict[str, int]
    difference: float
    notes: tuple[str, ...] = ()
    new: bool = True


@dataclass(frozen=True)
class Target:
    """Where to push to, as `push` was asked."""

    repo_id: str
    revision: str
    private: bool | None
    create_pr: bool
    tag: str | None
    message: str


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    base_model: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    allow_pickle: bool = False,
    commit_message: str = "Add an adapter made in one step",
) -> PushResult:
    """Pushes a saved folder in one commit, with a model card, after loading it in a fresh process.

    The repository, and a branch that is not there, are created. Faults of the network are tried again a few times.
    At any moment the branch holds the old files or all of the new ones, and pushing again does no harm.

    Args:
        folder: A folder that `OneStepTrainer.save_model` wrote. It is not changed.
        repo_id: `user/name`, or a name under the token's user.
        private: Whether a new repository is private; None for the account's default. A public one is never used
            where True was asked for.
        revision: The branch; default "main".
        create_pr: Propose the commit as a pull request.
        tag: A tag for the commit.
        base_model: The base's Hub id where it was a folder here.
        dry_run: Check everything that can be checked without sending anything.
        token: None for the one of the environment or of `hf auth login`.
        allow_pickle: Whether the check may read the base from a pickle, as in `load`. Nothing that is sent is one.

    Raises:
        ValueError: The folder is not whole or gives other logits, the base is not on the Hub, or the Hub refuses.
        PushError: The network failed, or somebody else's commit clashes; the message says what was sent.
    """
    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it.")
    if not is_repo_id(repo_id):
        raise ValueError(f"`repo_id={repo_id!r}` is no name on the Hub. Give it as `user/name`.")
    if create_pr and (tag is not None or revision not in (None, MAIN)):
        raise ValueError(
            "A pull request (`create_pr`) goes to main and has no tag yet. Leave out `revision` and `tag`."
        )
    source, api, journal = Path(folder), client(token), Journal(repo_id)
    report = read_whole(source)
    check_kind(source, report)
    repo_id = journal.repo_id = full_name(api, repo_id, journal)
    base = pinned_base(api, source, report, base_model, journal)
    target = Target(repo_id, revision or MAIN, private, create_pr, tag, commit_message)
    with interruptible(journal), staged(source, report, repo_id, base) as copy:
        difference = check_in_fresh_process(copy, token, allow_pickle=allow_pickle)
        files = {path.relative_to(copy).as_posix(): path.stat().st_size for path in _files(copy)}
        if dry_run:
            url = without_secrets(f"{api.endpoint}/{repo_id}")
            return PushResult(repo_id, target.revision, None, url, tag, files, difference)
        commit, new = _send(api, copy, target, journal)
    revision = commit.pr_revision or target.revision
    url = without_secrets(commit.pr_url or commit.commit_url)
    return PushResult(repo_id, revision, commit.oid, url, tag, files, difference, tuple(journal.notes), new)


def full_name(api: HfApi, repo_id: str, journal: Journal) -> str:
    """`user/name`, the user being the token's where none is given."""
    if "/" in repo_id:
        return repo_id
    return f"{attempt('looking up whose token this is', api.whoami, journal)['name']}/{repo_id}"


def _send(api: HfApi, copy: Path, target: Target, journal: Journal) -> tuple[CommitInfo, bool]:
    """The commit that holds the files, and whether it was made now."""
    head = _prepare(api, target, journal)
    if target.tag is not None:
        _check_tag(api, copy, target, target.tag, journal)
    commit = _commit(api, copy, target, head, journal)
    journal.done.append(f"commit {commit.oid}, with all files")
    if target.tag is not None:
        tag = target.tag
        # It was free, or has these files, when we looked: "exists" now means that an answer was lost.
        attempt(
            f"the tag {tag!r}",
            lambda: api.create_tag(target.repo_id, tag=tag, revision=commit.oid, exist_ok=True),
            journal,
        )
    return commit, commit.oid != head


def _prepare(api: HfApi, target: Target, journal: Journal) -> str:
    """Sees to it that repository and branch are there; returns the branch's head."""
    repo_id, what = target.repo_id, f"looking up {target.repo_id!r}"
    info = attempt(what, lambda: _info(api, repo_id), journal)
    if info is None:
        if target.create_pr:
            raise ValueError(
                f"There is no repository {repo_id!r} (or your token may not see it) to propose something to. Check "
                "the name, or leave out `create_pr` (`--create-pr`)."
            )
        attempt(
            "creating the repository",
            lambda: api.create_repo(repo_id, private=target.private, exist_ok=True),
            journal,
        )
        journal.done.append("the new, empty repository")
        info = attempt(what, lambda: api.model_info(repo_id), journal)
    elif target.private and not info.private:
        raise ValueError(
            f"`private=True`, but {repo_id!r} is there already and public. Make it private in its settings, or push "
            "to another name."
        )
    if target.revision != MAIN:
        info = attempt(f"looking up {target.revision!r}", lambda: _info(api, repo_id, target.revision), journal)
        if info is None:
            what = f"creating the branch {target.revision!r}"
            attempt(what, lambda: api.create_branch(repo_id, branch=target.revision, exist_ok=True), journal)
            journal.done.append(f"the new branch {target.revision!r}, equal to main")
            info = attempt(what, lambda: api.model_info(repo_id, revision=target.revision), journal)
    assert info.sha is not None
    return info.sha


def _info(api: HfApi, repo_id: str, revision: str | None = None) -> ModelInfo | None:
    try:
        return api.model_info(repo_id, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _check_tag(api: HfApi, copy: Path, target: Target, tag: str, journal: Journal) -> None:
    """Raises a ValueError where the tag is there with other files."""
    what = f"looking up the tag {tag!r}"
    refs = attempt(what, lambda: api.list_repo_refs(target.repo_id), journal)
    taken = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
    if taken is None:
        return
    theirs = attempt(what, lambda: files_at(api, target.repo_id, taken), journal)
    if any(theirs.get(name) not in ids for name, ids in _identities(copy).items()):
        raise ValueError(
            f"The tag {tag!r} of {target.repo_id!r} is there already, on commit {taken[:7]} with other files. Choose "
            "another `tag`, or delete that one."
        )


def _commit(api: HfApi, copy: Path, target: Target, head: str, journal: Journal) -> CommitInfo:
    """One commit on top of `head`; if the branch has moved on without touching our files, on top of that."""

    leftovers = attempt("looking up what is there", lambda: _leftovers(api, copy, target, head), journal)

    def upload(parent: str) -> CommitInfo:
        return attempt(
            "the commit",
            lambda: api.upload_folder(
                repo_id=target.repo_id,
                folder_path=copy,
                commit_message=target.message,
                revision=target.revision,
                create_pr=target.create_pr,
                parent_commit=parent,
                delete_patterns=leftovers or None,
            ),
            journal,
            # A repeated commit of the same files is none; a repeated pull request is a second one.
            twice_is_safe=not target.create_pr,
        )

    try:
        try:
            return upload(head)
        except StaleParentError:
            return upload(_moved_on(api, copy, target, head, journal))
    except PushError as error:
        raise PushError(f"{error} {_where_it_stands(api, target, head)}") from error


def _leftovers(api: HfApi, copy: Path, target: Target, head: str) -> list[str]:
    """What an earlier push brought and this one does not have: an old model's chat template would spoil the new one.

    Files that no push of ours brought stay.

    Returns:
        Patterns that match these names only.
    """
    ours = {path.relative_to(copy).as_posix() for path in _files(copy)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = api.hf_hub_download(target.repo_id, FILE, revision=head, local_dir=folder)
            names = StepReport.from_json(Path(file).read_text(encoding="utf-8")).files
        except (RemoteEntryNotFoundError, ValueError):  # none there, or none of ours
            return []
    return [glob.escape(name) for name in names if name not in ours]


def _moved_on(api: HfApi, copy: Path, target: Target, head: str, journal: Journal) -> str:
    """The branch's new head, if what it brings leaves our files alone.

    Raises:
        PushError: Somebody else has changed a file that we push.
    """
    what = f"looking up {target.revision!r} again"
    new = attempt(what, lambda: api.model_info(target.repo_id, revision=target.revision).sha, journal)
    assert new is not None
    before = attempt(what, lambda: files_at(api, target.repo_id, head), journal)
    after = attempt(what, lambda: files_at(api, target.repo_id, new), journal)
    ours = _identities(copy)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    clash = sorted(name for name in changed & ours.keys() if after.get(name) not in ours[name])
    if clash:
        raise PushError(
            f"Pushing to {target.repo_id!r}: somebody else has changed {', '.join(clash)} on {target.revision!r} in "
            f"commit {new[:7]}, while this push was under way. Look at that commit; then push again to replace its "
            "files, or push to a branch of your own with `revision=` (`--revision`)."
        )
    journal.note(
        f"Somebody else has pushed {', '.join(sorted(changed))} to {target.revision!r} meanwhile (commit {new[:7]}); "
        "that leaves the files of this push alone, so it goes on top."
    )
    return new


def _where_it_stands(api: HfApi, target: Target, head: str) -> str:
    """After a commit that failed: whether the repository has changed, as far as it can be told."""
    if target.create_pr:
        page = without_secrets(f"{api.endpoint}/{target.repo_id}/discussions")
        return f"Look at {page} first: where only the answer was lost, the pull request is there."
    try:
        now = api.model_info(target.repo_id, revision=target.revision).sha
    except Exception:  # whatever kept the push from coming through; the message about that is on its way
        return (
            f"Whether the commit arrived cannot be told now: {target.revision!r} holds the old files, or all new ones."
        )
    if now == head:
        return f"The files on {target.revision!r} are as they were (commit {head[:7]})."
    return f"{target.revision!r} is at commit {(now or '')[:7]} now."


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _identities(folder: Path) -> dict[str, set[str]]:
    """By file, what the Hub may call its content: its sha256, or git's id of it."""
    return {path.relative_to(folder).as_posix(): {sha256(path), _git_id(path)} for path in _files(folder)}


def _git_id(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
