"""What is found at the Hub before anything is sent, each with its own message."""

import pytest

from astro.errors import ConfigError, RunError
from astro_dist import pipeline
from astro_dist.config.schema import ModelConfig, PublishConfig
from astro_dist.config.yaml_file import make_target
from astro_dist.publish.publication import publish_run
from astro_dist.source.model_info import BaseModel, read_base_model
from astro_dist.source.resolve import resolve_source

READ_ONLY = {"type": "access_token", "accessToken": {"displayName": "mine", "role": "read"}}


def fine_grained(entity, *permissions):
    scoped = [{"entity": {"type": "org", "name": entity}, "permissions": list(permissions)}]
    return {"accessToken": {"role": "fineGrained", "fineGrained": {"global": ["discussion.write"], "scoped": scoped}}}


def holds(hub, tmp_path, *names):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("x")
    hub.publish("org/model", folder)
    hub.private.add("org/model")


REFUSED = {
    "no token": (
        lambda hub, m, t: m.setattr("huggingface_hub.get_token", lambda: None), "there is no token; set HF_TOKEN"),
    "a token that is none": (lambda hub, m, t: m.setenv("HF_TOKEN", "hf_a\x01b"), "holds a space or a character"),
    "a token that may only read": (
        lambda hub, m, t: hub.account.update(auth=READ_ONLY), "the token 'mine' may only read"),
    "a fine-grained token for another": (
        lambda hub, m, t: hub.account.update(auth=fine_grained("other", "repo.write")), "no write access to .* of org"),
    "a fine-grained token that may only read": (
        lambda hub, m, t: hub.account.update(auth=fine_grained("org", "repo.content.read")),
        "no write access to .* of org"),
    "another's namespace": (
        lambda hub, m, t: hub.account.update(orgs=[{"name": "elsewhere"}]), "no member of org; it has me, elsewhere"),
    "an organization where one may only read": (
        lambda hub, m, t: hub.account.update(orgs=[{"name": "org", "roleInOrg": "read"}]), "me may only read in org"),
    "a repository that is not writeable": (lambda hub, m, t: hub.readonly.add("org/model"), "the Hub answers 403"),
    "a repository that everyone sees": (
        lambda hub, m, t: holds(hub, t) or hub.private.clear(), "everyone can see it, but publish.private is true"),
    "a repository with another model": (
        lambda hub, m, t: holds(hub, t, "model-00001-of-00009.safetensors"), "1 files of weights that are no part"),
    "a repository that ignores files": (lambda hub, m, t: holds(hub, t, ".gitignore"), "it holds a .gitignore"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_published_is_told_before_anything_is_sent(online_hub, finished, monkeypatch, tmp_path, case):
    spoil, message = REFUSED[case]
    spoil(online_hub, monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        publish_run(finished, PublishConfig(repo="org/model"))
    assert "hf_" not in str(caught.value)
    assert (online_hub.commits, online_hub.uploaded) == ([], 0)


def test_hub_that_cannot_be_reached_is_no_wrong_input(online_hub, finished):
    online_hub.close()
    with pytest.raises(RunError, match="the connection failed: ConnectError.* Nothing was sent; .* the same command"):
        publish_run(finished, PublishConfig(repo="org/model"))


def test_run_that_could_not_be_published_does_not_start(online_hub, run_config, tmp_path):
    online_hub.account["auth"] = READ_ONLY
    with pytest.raises(ConfigError, match="publish.repo org/model: the token 'mine' may only read"):
        pipeline.quantize(run_config(publish__repo="org/model"))
    assert not (tmp_path / "run").exists()


def test_fine_grained_token_for_the_very_repository(online_hub, finished):
    online_hub.account["auth"] = fine_grained("org/model", "repo.content.read", "repo.write")
    assert publish_run(finished, PublishConfig(repo="org/model")).num_files == 10


def test_license_that_the_hub_does_not_know_is_refused_before_the_run(online_hub, run_config, llama, tmp_path):
    (llama / "README.md").write_text("---\nlicense: My License!\n---\n")
    with pytest.raises(ConfigError, match="checking the card's metadata: .*license.* must be one of the known ones"):
        pipeline.quantize(run_config(publish__repo="org/model"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("repo", "revision", "pull_request", "message"),
    [
        ("model", None, False, "publish.repo: expected ORG/NAME"),
        ("a/b/c", None, False, "publish.repo: expected ORG/NAME"),
        ("org/model", "w4", True, "publish.revision: a pull request is made against main"),
    ],
)
def test_target_that_is_none(repo, revision, pull_request, message):
    with pytest.raises(ConfigError, match=message):
        make_target(repo, private=True, revision=revision, pull_request=pull_request)


def test_name_that_the_hub_does_not_allow(online_hub, finished):
    with pytest.raises(ConfigError, match="publish.repo org/a--b: Cannot have -- or .. in repo_id"):
        publish_run(finished, PublishConfig(repo="org/a--b"))


def told_by(llama, card, **model):
    (llama / "README.md").write_text(card)
    settings = ModelConfig(source=str(llama), **model)
    return read_base_model(resolve_source(settings), settings)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\nlanguage: de\n---\n", BaseModel(license="mit", language=("de",))),
        ("---\nlicense: [mit, apache-2.0]\n---\n", BaseModel(license="mit")),
        (
            "---\nlicense: other\nlicense_name: qwen\nlicense_link: https://x/LICENSE\n---\n",
            BaseModel(license="other", license_name="qwen", license_link="https://x/LICENSE"),
        ),
        ("# No metadata", BaseModel()),
        ("---\n- a list\n---\n", BaseModel()),
        ("---\n{: no yaml\n---\n", BaseModel()),
    ],
)
def test_card_of_a_source(llama, card, expected):
    assert told_by(llama, card) == expected


def test_license_file_of_a_source_without_a_card_is_linked(llama):
    (llama / "LICENSE.txt").write_text("All rights reserved")
    base = told_by(llama, "")
    assert (base.license, base.license_name, base.license_link) == ("other", "base-model-license", "LICENSE.txt")


def test_gated_source_is_told(online_hub, llama, tmp_path):
    online_hub.publish("org/llama", llama)
    online_hub.asks_for_access.add("org/llama")
    settings = ModelConfig(source="org/llama", cache_dir=tmp_path / "cache")
    base = read_base_model(resolve_source(settings), settings)
    assert (base.name, base.gated) == ("org/llama", True)
    assert "tells no license" in base.notes(private=False)[0]
    assert "access to org/llama has to be asked for" in base.notes(private=True)[1]
