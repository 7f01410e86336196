"""The YAML front matter of README.md: parsed, checked as /api/validate-yaml does, and turned into tags."""

import re
from collections.abc import Callable
from typing import Any

import yaml  # not in the standard library, but huggingface_hub needs it too

# https://huggingface.co/docs/hub/repositories-licenses
_LICENSES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 "
    "bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc "
    "cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 "
    "cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
    "cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 "
    "eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c "
    "ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa "
    "unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 "
    "llama3.2 llama3.3 llama4 gemma grok2-community unknown other"
)
_REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_VALID: dict[str, Callable[[str], object]] = {
    "license": frozenset(_LICENSES.split()).__contains__,
    "base_model": _REPO_ID.fullmatch,  # so a local path is refused, as the Hub does (transformers issue 33922)
    "datasets": _REPO_ID.fullmatch,
    "language": re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual").fullmatch,
}


def front_matter(text: str) -> Any:
    """The card's metadata, None where it has none. Raises `yaml.YAMLError`."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", text, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def card_data(text: str) -> dict[str, Any]:
    """The metadata as far as it is usable."""
    try:
        data = front_matter(text)
    except yaml.YAMLError:
        data = None
    return data if isinstance(data, dict) else {}


def validate_card(text: str, repo_type: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) about a README.md; a card with errors cannot be committed."""
    try:
        data = front_matter(text)
    except yaml.YAMLError as error:
        return [f"Invalid YAML in the card's metadata: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return [f"The card's metadata must be a mapping, not {type(data).__name__}"], []
    errors = _model_index_errors(data.get("model-index")) if repo_type == "model" else []
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    for key in ("tags", "datasets", "metrics", "base_model", "language", "license"):
        for value in _listed(data, key):
            if not isinstance(value, str):
                errors.append(f'"{key}" must be a string or a list of strings')
            elif key in _VALID and not _VALID[key](value):
                errors.append(f'"{key}" with value "{value}" is not valid')
    return errors, []


def _model_index_errors(index: Any) -> list[str]:
    """`huggingface_hub.repocard_data.model_index_to_eval_results` cannot do without these keys."""
    try:
        for model in index or []:
            for result in (model["name"], model["results"])[1]:
                _ = result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]
                _ = [(metric["type"], metric["value"]) for metric in result["metrics"]]
    except KeyError as missing:
        return [f'"model-index" is not valid: {missing} is required']
    except TypeError:
        return ['"model-index" must be an array of models, each with a name and an array of results']
    return []


def _listed(data: dict[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    return [] if value is None else value if isinstance(value, list) else [value]


def card_tags(data: dict[str, Any]) -> list[str]:
    """The tags that `list_models(filter=...)` searches."""
    tags = _listed(data, "tags") + [data[key] for key in ("library_name", "pipeline_tag") if data.get(key)]
    tags += [f"dataset:{name}" for name in _listed(data, "datasets")]
    tags += [f"license:{name}" for name in _listed(data, "license")]
    relation = data.get("base_model_relation", "adapter" if data.get("library_name") == "peft" else "finetune")
    for base in _listed(data, "base_model"):
        tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
    return list(dict.fromkeys(map(str, tags + _listed(data, "language"))))
