"""Pull requests: `upload_folder(create_pr=True)`, `create_pull_request`, `merge_pull_request`."""

from ..auth import Account, readable_repo, require_account, writable_repo
from ..messages import HubError, Request, Response, json_response, route
from ..store import Commit, Discussion, Repo, now


def open_pull_request(
    request: Request, repo: Repo, base: Commit, author: Account, title: str, description: str = ""
) -> str:
    """Opens a pull request at `base` and returns its reference."""
    number = len(repo.discussions) + 1
    about = {"num": number, "title": title, "description": description, "status": "open", "createdAt": now()}
    about |= {"author": {"name": author.name}, "repo": {"name": repo.id, "type": repo.type}, "isPullRequest": True}
    about |= {"changes": {"base": "refs/heads/main"}, "events": [], "diff": "", "filesWithConflicts": []}
    repo.discussions.append(about)
    repo.refs[f"refs/pr/{number}"] = base.oid
    request.hub.store.save(repo)
    return f"refs/pr/{number}"


@route("POST", "/api/{type}/{repo}/discussions", "create_discussion")
def create(request: Request) -> Response:
    repo, body = readable_repo(request), request.json()
    author = require_account(request, "write")
    if not body.get("pullRequest"):
        raise HubError(400, "This Hub has pull requests, but no other discussions")
    open_pull_request(request, repo, repo.commit("main"), author, body["title"], body.get("description", ""))
    return json_response({"num": len(repo.discussions)})


@route("GET", "/api/{type}/{repo}/discussions/{num}", "discussion")
def details(request: Request) -> Response:
    return json_response(_find(request, readable_repo(request)))


@route("POST", "/api/{type}/{repo}/discussions/{num}/merge", "merge")
def merge(request: Request) -> Response:
    """One commit on main with what the pull request changed; conflicts are not looked for."""
    repo, sender = writable_repo(request)
    found = _find(request, repo)
    if found["status"] != "open":
        raise HubError(409, f"The pull request is {found['status']}")
    theirs = list(repo.history(f"refs/pr/{found['num']}"))
    base = next(commit for commit in theirs if commit in list(repo.history("main")))
    after = theirs[0].files
    changes = {p: after.get(p) for p in {**base.files, **after} if base.files.get(p) != after.get(p)}
    title = f"{found['title']} (#{found['num']})"
    merged = request.hub.store.commit(repo, "refs/heads/main", repo.commit("main"), changes, title, sender.name)
    found["status"], found["changes"]["mergeCommitId"] = "merged", merged.oid
    request.hub.store.save(repo)
    return json_response({})


def _find(request: Request, repo: Repo) -> Discussion:
    number = int(request.args["num"])
    if not 0 < number <= len(repo.discussions):
        raise HubError(404, f"No discussion {number}")
    return repo.discussions[number - 1]
