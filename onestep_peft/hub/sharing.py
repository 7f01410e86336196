"""Trainer's way to the Hub, led through a finished folder: one commit, or an error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from onestep_peft.held_out import select
from onestep_peft.hub import probe
from onestep_peft.hub.push import PushResult, full_name, push
from onestep_peft.hub.remote import Journal, client
from onestep_peft.hub.staging import is_repo_id
from onestep_peft.scoring import ScoringTrainer
from onestep_peft.wrapping import config_of

PROBE_ROWS = 4


class SharingTrainer(ScoringTrainer):
    """Pushes what was saved, never what is being written."""

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Saves to `output_dir`, then pushes that folder in one commit; see `onestep_peft.hub.push.push`.

        Args:
            commit_message: The commit's title.
            blocking: Only True: the errors of a push in the background would reach nobody.
            token: Default `hub_token`.
            revision: The branch; default `hub_revision`, or main.
            private: Whether a new repository is private; default `hub_private_repo`.
            **kwargs: `repo_id` (default `hub_model_id`, or the folder's name), and `create_pr`, `tag`, `base_model`
                and `dry_run` as in `push`.

        Returns:
            A `PushResult`.

        Raises:
            ValueError: The folder, the base, the name or the token will not do.
            PushError: The network failed; the message says what was sent.
        """
        if not blocking:
            raise ValueError("`blocking=False`: the errors of a push in the background would be lost. Leave it out.")
        folder = Path(self.args.output_dir or ".")
        self.save_folder(folder)
        if commit_message is not None:
            kwargs["commit_message"] = commit_message
        return self.push_folder(folder, token=token, revision=revision, private=private, **kwargs)

    def push_folder(
        self, folder: Path, *, token: str | None = None, revision: str | None = None, private: bool | None = None,
        repo_id: str | None = None, **kwargs: Any,
    ) -> PushResult:  # fmt: skip
        """Pushes a saved folder to where the config says."""
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        return push(
            folder,
            repo_id or self.hub_model_id or args.hub_model_id or folder.resolve().name,
            token=token or args.hub_token,
            revision=revision or args.hub_revision,
            private=args.hub_private_repo if private is None else private,
            allow_pickle=True,  # this very run has read the base, whatever it is
            **kwargs,
        )

    def save_folder(self, folder: Path) -> None:
        """Writes a whole folder."""
        raise NotImplementedError

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Finds out, before any work, whether a push can succeed. The repository is created when one is made.

        Raises:
            ValueError: The base is a folder here, or there is no token.
        """
        base = config_of(cast(Any, self.model)).name_or_path
        if os.path.isdir(base) or not is_repo_id(base):
            raise ValueError(
                f"`push_to_hub=True`, but the base {base!r} is no model on the Hub, so nobody else could load the "
                "adapter. Name the model by its id there; or leave `push_to_hub` out, and name it later: "
                "`trainer.push_to_hub(base_model=...)`."
            )
        api = client(token or self.args.hub_token)
        name = self.args.hub_model_id or Path(self.args.output_dir or ".").resolve().name
        self.hub_model_id = cast(Any, full_name(api, name, Journal(name)))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Checkpoints are not pushed: they hold pickles, and no branch should hold half of a run."""

    def write_probe(self, model: nn.Module, folder: Path) -> None:
        """Records what the model answers, for whoever loads the folder; see `probe.record`."""
        rows: Any = self.train_dataset
        batch: Mapping[str, Any] = next(iter(self.get_test_dataloader(select(rows, range(min(PROBE_ROWS, len(rows)))))))
        if "input_ids" in batch:
            special = probe.special_ids(config_of(model), self.processing_class)
            probe.record(model, batch, special, folder / probe.FILE)
