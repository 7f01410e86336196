"""The real clients against the test Hub. Each runs in a subprocess, because HF_ENDPOINT is read on import."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.hub_server import Fault, HubServer

PROFILES: tuple[Literal["lfs", "xet"], ...] = ("lfs", "xet")
ROOT = Path(__file__).parents[1]

# `attempt` names the exception of a call that must fail; `report` hands the test its values.
PRELUDE = """
import json
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download

api = HfApi()

def attempt(call, *args, **kwargs):
    try:
        return "no error: " + str(call(*args, **kwargs))
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", "")
        return f"{type(error).__name__} {status}".strip()

def report(**values):
    print("\\n" + json.dumps(values))
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def run_client(hub: HubServer, folder: Path, script: str, token: str = "hf_write") -> dict[str, Any]:
    """What the script reports. No client may want anything from elsewhere, or something that this Hub lacks."""
    run = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        env=hub.environment(token) | {"OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert not [r for r in hub.requests if r.step in ("outside", "unknown")]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("profile", PROFILES)
def test_a_folder_goes_up_and_comes_back(profile: Literal["lfs", "xet"], tmp_path: Path) -> None:
    content = {
        "README.md": b"---\nlicense: mit\nlibrary_name: peft\nbase_model: user/base\n---\n# A model\n",
        ".gitignore": b"checkpoint-*/\n",
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": bytes(range(256)) * 1000,
        "nested/folder/small.bin": b"\0\1\2",
        "empty.txt": b"",
    }
    for path, data in {**content, "checkpoint-1/state.pt": b"\0"}.items():
        (tmp_path / "model" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / path).write_bytes(data)
    with HubServer(profile=profile, part_size=100_000, page_size=2) as hub:
        seen = run_client(
            hub,
            tmp_path,
            """
            from pathlib import Path
            url = api.create_repo("user/model")
            first = api.upload_folder(repo_id="user/model", folder_path="model")
            # Without the patterns, files that .gitignore leaves out would count as changed: an empty commit.
            again = api.upload_folder(repo_id="user/model", folder_path="model", ignore_patterns="checkpoint-*")
            copy = Path(snapshot_download("user/model"))
            same = all(p.read_bytes() == Path("model", p.relative_to(copy)).read_bytes()
                       for p in copy.rglob("*") if p.is_file() and p.name != ".gitattributes")
            proposed = api.upload_folder(repo_id="user/model", folder_path="model", path_in_repo="v2", create_pr=True)
            before = api.list_repo_files("user/model")
            pull = api.get_discussion_details("user/model", proposed.pr_num)
            api.merge_pull_request("user/model", proposed.pr_num)
            refs = api.list_repo_refs("user/model", include_pull_requests=True)
            info = api.model_info("user/model", files_metadata=True)
            report(
                url=url, repo_id=url.repo_id, exists=attempt(api.create_repo, "user/model"), first=first.oid,
                again=again.oid, same=same, revision=proposed.pr_revision, before=before, pull=pull.title,
                pulls=[p.ref for p in refs.pull_requests],
                titles=[c.title for c in api.list_repo_commits("user/model")],
                sizes={s.rfilename: [s.size, bool(s.lfs)] for s in info.siblings}, tags=info.tags,
                adapters=[m.id for m in api.list_models(filter="base_model:adapter:user/base")],
                folders=[e.path for e in api.list_repo_tree("user/model") if not hasattr(e, "size")],
                paths=[e.path for e in api.get_paths_info("user/model", ["nested", "empty.txt", "missing"])],
                exists_file=[api.file_exists("user/model", name) for name in ("README.md", "missing")],
            )
            """,
        )
        assert seen["url"] == f"{hub.endpoint}/user/model" and seen["repo_id"] == "user/model"
        assert seen["exists"] == "HfHubHTTPError 409"
        assert seen["first"] == seen["again"], "an unchanged folder makes no commit"
        assert seen["same"]
        assert seen["before"] == [".gitattributes", *sorted(content)], "as .gitignore says, and before the merge"
        assert seen["revision"] == "refs/pr/1" and seen["pulls"] == ["refs/pr/1"]
        title = "Upload folder using huggingface_hub"
        assert seen["pull"] == title and seen["titles"] == [f"{title} (#1)", title, "initial commit"]
        large = {"adapter_model.safetensors", "nested/folder/small.bin"}
        expected = {path: [len(data), path in large] for path, data in content.items()}
        assert {p: s for p, s in seen["sizes"].items() if p in content} == expected
        assert "license:mit" in seen["tags"] and seen["adapters"] == ["user/model"]
        assert seen["folders"] == ["nested", "v2"]
        assert seen["paths"] == ["nested", "empty.txt"] and seen["exists_file"] == [True, False]
        stored = hub.files("user/model")
        assert {path: stored[path] for path in content} == content
        assert {path: stored[f"v2/{path}"] for path in content} == content
        upload = {"lfs": {"lfs_batch", "lfs_put", "lfs_put_part", "lfs_complete", "lfs_verify", "storage"}}
        upload["xet"] = {"xet_write_token", "xet_xorb", "xet_shard", "xet_read_token", "xet_reconstruction", "xet_data"}
        other = "xet" if profile == "lfs" else "lfs"
        assert upload[profile] < set(hub.steps()) and not upload[other] & set(hub.steps())


@pytest.mark.parametrize("profile", PROFILES)
def test_a_push_that_cannot_be_is_refused(hub: HubServer, profile: Literal["lfs", "xet"], tmp_path: Path) -> None:
    hub.profile = profile
    old = hub.add_repo("user/model", {"config.json": "{}", "folder/a": "a"})
    hub.commit("user/model", {"config.json": "[]"})
    seen = run_client(
        hub,
        tmp_path,
        f"""
        import os
        os.mkdir("new")
        open("new/weights.bin", "w").close()
        open("new/large.bin", "w").write("large")
        stranger = HfApi(token="hf_other")
        add = lambda path, text: [CommitOperationAdd(path, text.encode())]
        push = lambda **kwargs: attempt(api.create_commit, "user/model", commit_message="m", **kwargs)
        report(
            branch=push(operations=add("x", "x"), revision="missing"),
            stale=push(operations=add("x", "x"), parent_commit="{old.oid}"),
            deletion=push(operations=[CommitOperationDelete("missing")]),
            repo=attempt(api.upload_file, repo_id="user/missing", path_in_repo="x", path_or_fileobj=b"x"),
            yaml=push(operations=add("README.md", "---\\nlicense: [\\n---")),
            base=push(operations=add("README.md", "---\\nbase_model: ../base\\n---")),
            license=push(operations=add("README.md", "---\\nlicense: mine\\n---")),
            index=push(operations=add("README.md", "---\\nmodel-index: [{{name: m, results: [{{}}]}}]\\n---")),
            foreign=attempt(api.create_repo, "stranger/model"),
            stranger=attempt(stranger.create_commit, "user/model", add("x", "x"), commit_message="m"),
            proposal=stranger.upload_folder(repo_id="user/model", folder_path="new", create_pr=True).pr_revision,
            reader=attempt(HfApi(token="hf_read").create_commit, "user/model", add("x", "x"), commit_message="m"),
        )
        """,
    )
    assert seen == {
        "branch": "RevisionNotFoundError 404",
        "stale": "HfHubHTTPError 412",
        "deletion": "RemoteEntryNotFoundError 404",
        "repo": "RepositoryNotFoundError 404",
        "yaml": "ValueError",
        "base": "ValueError",
        "license": "ValueError",
        "index": "ValueError",
        "foreign": "HfHubHTTPError 403",
        "stranger": "HfHubHTTPError 403",
        "proposal": "refs/pr/1",
        "reader": "HfHubHTTPError 403",
    }
    assert hub.files("user/model") == {"config.json": b"[]", "folder/a": b"a"}
    assert hub.files("user/model", "refs/pr/1") == hub.files("user/model") | {"weights.bin": b"", "large.bin": b"large"}


def test_references_history_and_repositories(hub: HubServer, tmp_path: Path) -> None:
    first = hub.add_repo("user/model", {"a": "1", "folder/b": "2"})
    hub.add_repo("user/doomed", {}, type="dataset")
    seen = run_client(
        hub,
        tmp_path,
        """
        api.create_tag("user/model", tag="v1")
        api.create_branch("user/model", branch="dev/one")
        add = [CommitOperationAdd("a", b"3"), CommitOperationDelete("folder/")]
        made = api.create_commit("user/model", add, commit_message="more", revision="dev/one")
        refs = api.list_repo_refs("user/model")
        read = lambda revision: open(hf_hub_download("user/model", "a", revision=revision)).read()
        api.delete_repo("user/doomed", repo_type="dataset")
        api.create_repo("org/app", repo_type="space", space_sdk="static", private=True)
        api.update_repo_settings("user/model", gated="auto")
        report(
            texts=[read(r) for r in ("v1", "dev/one", "main", made.oid[:7])], url=made.commit_url, made=made.oid,
            refs=[r.name for r in refs.branches + refs.tags], tagged=refs.tags[0].target_commit,
            twice=[attempt(api.create_tag, "user/model", tag="v1"),
                   attempt(api.create_branch, "user/model", branch="dev/one")],
            gone=attempt(api.dataset_info, "user/doomed"), space=api.space_info("org/app").private,
            gated=api.model_info("user/model").gated,
        )
        """,
    )
    assert seen["texts"] == ["1", "3", "1", "3"]
    assert seen["url"] == f"{hub.endpoint}/user/model/commit/{seen['made']}"
    assert seen["refs"] == ["main", "dev/one", "v1"] and seen["tagged"] == first.oid
    assert seen["twice"] == ["HfHubHTTPError 409"] * 2
    assert seen["gone"] == "RepositoryNotFoundError 404" and seen["space"] is True and seen["gated"] == "auto"
    assert hub.head("user/model", "dev/one").parent == first.oid
    assert hub.files("user/model", "dev/one") == {"a": b"3"}


def test_private_and_gated_repositories(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("user/private", {"a": "1"}, private=True)
    hub.add_repo("user/gated", {"a": "1"}, gated="manual")
    seen = run_client(
        hub,
        tmp_path,
        """
        def visit(token):
            get = lambda repo: attempt(hf_hub_download, repo, "a", token=token, local_dir=f"of-{token}").split(":")[0]
            return [get("user/private"), get("user/gated"), attempt(api.model_info, "user/private", token=token),
                    [m.id for m in api.list_models(token=token)], api.model_info("user/gated", token=token).gated]
        visits = {str(token): visit(token) for token in ("hf_read", "hf_other", False)}
        report(bad=attempt(api.model_info, "user/gated", token="hf_unknown"), **visits)
        """,
    )
    assert seen["hf_read"][:2] == ["no error"] * 2 and seen["hf_read"][3] == ["user/gated", "user/private"]
    assert seen["hf_other"][:4] == [
        "RepositoryNotFoundError 404",
        "GatedRepoError 403",
        "RepositoryNotFoundError 404",
        ["user/gated"],
    ]
    assert seen["False"][:4] == [
        "RepositoryNotFoundError 401",
        "GatedRepoError 401",
        "RepositoryNotFoundError 401",
        ["user/gated"],
    ]
    assert [visit[4] for visit in seen.values() if isinstance(visit, list)] == ["manual"] * 3
    assert seen["bad"] == "HfHubHTTPError 401"


@pytest.mark.parametrize("profile", PROFILES)
def test_content_other_than_announced_is_refused(profile: Literal["lfs", "xet"], tmp_path: Path) -> None:
    with HubServer(profile=profile) as hub:
        hub.add_repo("user/model")
        seen = run_client(
            hub,
            tmp_path,
            """
            from pathlib import Path
            weights = Path("weights.bin")
            weights.write_bytes(bytes(1000))
            change = CommitOperationAdd("weights.bin", weights)
            change.upload_info.sha256  # computed now, as a push does before it uploads
            weights.write_bytes(b"1" * 1000)
            report(error=attempt(api.create_commit, "user/model", [change], commit_message="m"))
            """,
        )
        assert "no error" not in seen["error"]
        statuses = [r.status for r in hub.requests if r.step in ("lfs_put", "xet_shard")]
        assert statuses == [400] and "commit" not in hub.steps()
        assert hub.files("user/model") == {}


def test_every_kind_of_fault(hub: HubServer, tmp_path: Path) -> None:
    kinds = ("status:503", "cut", "cut-body", "cut-after", "slow:0.01")
    for kind in kinds:
        hub.add_repo(f"user/{kind.replace(':', '-')}")
        hub.faults.add(Fault("commit", kind, path=f"*/{kind.replace(':', '-')}/*"))
    hub.add_repo("user/part")
    hub.add_repo("user/crash", {"old": "old"})
    hub.faults.add(Fault("lfs_put", "status:500"))
    hub.faults.add(Fault("lfs_verify", "crash-after", skip=1))
    seen = run_client(
        hub,
        tmp_path,
        f"""
        push = lambda repo, path, data: attempt(
            api.upload_file, repo_id="user/" + repo, path_in_repo=path, path_or_fileobj=data)
        kinds = [kind.replace(":", "-") for kind in {kinds}]
        report(
            commits=[push(kind, "a.txt", b"a").split(":")[0] for kind in kinds],
            part=push("part", "part.bin", b"part").split(":")[0], crash=push("crash", "b.bin", b"b"),
        )
        """,
    )
    broken = "RemoteProtocolError"
    assert seen["commits"] == ["HfHubHTTPError 503", broken, broken, broken, "no error"]
    # An answer that was lost does not undo the work.
    assert [len(hub.files(f"user/{kind.replace(':', '-')}")) for kind in kinds] == [0, 0, 1, 1, 1]
    assert [r.status for r in hub.requests if r.step == "commit"][:5] == [503, 0, 0, 0, 200]
    assert seen["crash"] == "ConnectError"
    assert seen["part"] == "no error", "http_backoff tries again"
    assert [r.status for r in hub.requests if r.step == "lfs_put"] == [500, 200, 200]
    assert hub.requests[-1].step == "lfs_verify", "no commit came through"

    hub.revive()
    hub.requests.clear()
    assert hub.files("user/crash") == {"old": b"old"}
    run_client(
        hub, tmp_path, 'api.upload_file(repo_id="user/crash", path_in_repo="b.bin", path_or_fileobj=b"b")\nreport()'
    )
    assert hub.files("user/crash") == {"old": b"old", "b.bin": b"b"}
    assert "lfs_put" not in hub.steps(), "what was uploaded before the crash is still there"


def test_unknown_kinds_of_faults() -> None:
    for kind in ("explode", "slow", "cut:3", "status:x"):
        with pytest.raises(ValueError):
            Fault("commit", kind)


def test_datasets_load_and_push(hub: HubServer, tmp_path: Path) -> None:
    rows = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    hub.add_repo("user/lines", {"train.jsonl": lines, "test.jsonl": lines}, type="dataset")
    hub.add_repo("user/table", {"data.csv": "text,label\ngood,1\nbad,0\n"}, type="dataset", private=True)
    seen = run_client(
        hub,
        tmp_path,
        """
        from datasets import Dataset, load_dataset
        lines, table = load_dataset("user/lines"), load_dataset("user/table", split="train")
        table.push_to_hub("user/columns")
        columns = load_dataset("user/columns", split="train")
        streamed = load_dataset("user/lines", split="test", streaming=True)
        report(splits=sorted(lines), rows=[list(d) for d in (lines["train"], table, columns, streamed)])
        """,
    )
    assert seen == {"splits": ["test", "train"], "rows": [rows] * 4}
    assert [p for p in hub.files("user/columns", type="dataset") if p.endswith(".parquet")]


METRIC = """
import datasets
import evaluate


class Accuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


def test_evaluate_loads_a_metric(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("evaluate-metric/accuracy", {"accuracy.py": METRIC}, type="space")
    seen = run_client(
        hub,
        tmp_path,
        """
        import evaluate
        metric = evaluate.load("accuracy")
        report(**metric.compute(predictions=[1, 0, 1, 1], references=[1, 0, 0, 1]))
        """,
    )
    assert seen == {"accuracy": 0.75}
    tried = [re.search("resolve/([^/]+)", r.path) for r in hub.requests if r.step == "resolve_head"]
    assert [match[1] for match in tried if match] == ["v0.4.6", "main"]


def test_peft_pushes_an_adapter_and_loads_it(hub: HubServer, tmp_path: Path) -> None:
    seen = run_client(
        hub,
        tmp_path,
        """
        import torch
        from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
        from transformers import BertConfig, BertForSequenceClassification
        sizes = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        config = BertConfig(**sizes)
        BertForSequenceClassification(config).eval().push_to_hub("user/base")
        base = BertForSequenceClassification.from_pretrained("user/base")
        model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
        api.create_repo("user/adapter", private=True)
        model.push_to_hub("user/adapter")
        loaded = AutoPeftModelForSequenceClassification.from_pretrained("user/adapter").eval()
        tokens = torch.arange(10)[None]
        report(same=torch.equal(model(tokens).logits, loaded(tokens).logits))
        """,
    )
    assert seen["same"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} < set(hub.files("user/adapter"))


def test_the_server_runs_by_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.hub_server", "--root", str(tmp_path / "hub"), "--profile", "xet"]
    (tmp_path / "weights.bin").write_bytes(b"\0" * 10)
    hf = str(Path(sys.executable).with_name("hf"))
    for action in (["upload", "user/new", "weights.bin"], ["download", "user/new", "--local-dir", "copy"]):
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert server.stdout
        shown = "".join(iter(server.stdout.readline, "# Ctrl-C stops it.\n"))
        exports = dict(re.findall(r"^export (\w+)=(\S+)", shown, re.MULTILINE))
        assert re.findall(r"HF_TOKEN=(\w+)", shown) == ["hf_write", "hf_read", "hf_other"]
        run = subprocess.run(
            [hf, *action],
            env={"PATH": "", **exports, "HF_TOKEN": "hf_write"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        server.send_signal(signal.SIGINT)
        assert server.wait() == 0 and run.returncode == 0, run.stderr
        server.stdout.close()
    assert (tmp_path / "copy/weights.bin").read_bytes() == b"\0" * 10
