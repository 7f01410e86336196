"""Who asks, and what they may do."""

from dataclasses import dataclass

from .messages import HubError, Request
from .store import Repo


@dataclass(frozen=True)
class Account:
    name: str
    role: str  # of the token: "read" or "write"
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


DEMO_TOKENS = {
    "hf_write": Account("user", "write", ("org",)),
    "hf_read": Account("user", "read", ("org",)),
    "hf_other": Account("other", "write"),
}


def account(request: Request) -> Account | None:
    """The token's account, None for a request without a token."""
    if not request.bearer:
        return None
    if request.bearer not in request.hub.tokens:
        raise HubError(401, "Invalid credentials in Authorization header")
    return request.hub.tokens[request.bearer]


def require_account(request: Request, role: str = "read") -> Account:
    known = account(request)
    if known is None:
        raise HubError(401, "Invalid username or password.")
    if role == "write" and known.role != "write":
        raise HubError(403, f"Your token has the role {known.role!r}; this needs a token with the role 'write'")
    return known


def require_owner(request: Request, namespace: str) -> Account:
    known = require_account(request, "write")
    if not known.owns(namespace):
        raise HubError(403, f'You don\'t have the rights to write under the namespace "{namespace}"')
    return known


def readable_repo(request: Request, content: bool = False) -> Repo:
    """The request's repository, as far as its sender may see it; `content`: and download its files."""
    known = account(request)
    repo = request.hub.store.find(request.repo_type, request.args["repo"])
    owner = repo is not None and known is not None and known.owns(repo.namespace)
    if repo is None or (repo.private and not owner):
        # The Hub does not tell strangers what exists. Its 401 carries no X-Error-Code, but the client recognises
        # that 401 by an https:// address only (`_http.REPO_API_REGEX`), so over plain http the code must say it.
        if known is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")
    if content and repo.gated and not owner:
        message = f"Access to {repo.type} {repo.id} is restricted and you are not in the authorized list."
        raise HubError(401 if known is None else 403, message, "GatedRepo")
    return repo


def writable_repo(request: Request, revision: str = "") -> tuple[Repo, Account]:
    """The repository and who writes to it: its owner, or to a (new) pull request anybody who can read it."""
    repo, revision = readable_repo(request), revision or request.args.get("rev", "")
    if request.flag("create_pr") or revision.startswith("refs/pr/"):
        return repo, require_account(request, "write")
    return repo, require_owner(request, repo.namespace)
