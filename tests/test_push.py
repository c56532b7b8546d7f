"""`bkd push` to a Hub on this machine, over HTTP: the way there and back, what changed, and what goes wrong."""

import json
import shutil

import pytest

from bkd.hub.trouble import explained, is_local
from tests.hub_server import Repo, hub  # noqa: F401 - a fixture

CARD = """---
license: apache-2.0
library_name: diffusers
model-index:
- name: small
  results:
  - task: {type: text-to-image}
    dataset: {type: shapes, name: Shapes}
    metrics: [{type: accuracy, value: 0.99}]
---
# Small

    StableDiffusionPipeline.from_pretrained("NAMESPACE/NAME")
"""


@pytest.fixture
def student(teacher_folder, tmp_path):
    """A student's folder with a card."""
    folder = tmp_path / "student"
    shutil.copytree(teacher_folder, folder, ignore=shutil.ignore_patterns("README.md"))
    (folder / "README.md").write_text(CARD)
    (folder / "bkd_plan.json").write_text(json.dumps({"teacher": "/home/ada/secret-project/sd15", "removed": []}))
    return folder


@pytest.fixture
def push(bkd, hub, student, monkeypatch):  # noqa: F811
    """`bkd push`, in this process; answers with its exit code and everything it said."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_write_SECRET")
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def run(*arguments, model=student, repo="ada/small"):
        code, said = bkd("push", model, "--repo", repo, *arguments)
        assert "SECRET" not in said
        return code, said

    return run


def test_one_commit_holds_all_of_it(push, hub, student):  # noqa: F811
    code, said = push()
    assert code == 0, said
    repo = hub.repos["model"]["ada/small"]
    assert len(repo.messages) == 1
    files = repo.files()
    assert {"model_index.json", "README.md", "unet/config.json"} < files.keys()
    assert files["unet/diffusion_pytorch_model.safetensors"] == next(student.glob("unet/*.safetensors")).read_bytes()
    assert b"ada/small" in files["README.md"] and b"NAMESPACE" not in files["README.md"]


def test_folders_of_this_machine_stay_unknown(push, hub):  # noqa: F811
    push()
    plan = hub.repos["model"]["ada/small"].files()["bkd_plan.json"]
    assert json.loads(plan)["teacher"] == "sd15" and b"secret-project" not in plan


def test_only_the_model_and_its_card_go_up(push, hub, student):  # noqa: F811
    (student / ".env").write_text("HF_TOKEN=hf_write_SECRET")
    (student / "optimizer.pt").write_bytes(b"pickle")
    (student / "unet" / "extra.bin").write_bytes(b"pickle")
    code, said = push()
    names = hub.repos["model"]["ada/small"].files().keys()
    assert code == 0 and not {".env", "optimizer.pt", "unet/extra.bin"} & names
    assert "stays here: .env, optimizer.pt, unet/extra.bin" in said


def test_a_second_push_sends_only_what_changed(push, hub, student):  # noqa: F811
    push()
    hub.requests.clear()
    code, said = push()
    assert code == 0 and "0 files sent" in said and not hub.uploads()
    (student / "README.md").write_text(CARD + "\nNew words.\n")
    code, said = push()
    assert "1 file sent" in said and not hub.uploads()
    assert len(hub.repos["model"]["ada/small"].messages) == 2


def test_weights_of_an_earlier_student_go_away(push, hub):  # noqa: F811
    push()
    repo = hub.repos["model"]["ada/small"]
    repo.files()["unet/diffusion_pytorch_model-00001-of-00002.safetensors"] = b"old"
    repo.files()["notes/mine.txt"] = b"the owner's"
    code, said = push()
    assert code == 0 and "1 removed" in said
    assert "unet/diffusion_pytorch_model-00001-of-00002.safetensors" not in repo.files()
    assert "notes/mine.txt" in repo.files()


def test_a_branch_a_private_repository_and_a_pull_request(push, hub):  # noqa: F811
    assert push("--private", "--revision", "v2")[0] == 0
    repo = hub.repos["model"]["ada/small"]
    assert repo.private and "README.md" in repo.files("v2") and "README.md" not in repo.files("main")
    hub.repos["model"]["bob/theirs"] = Repo()
    code, said = push("--pr", repo="bob/theirs")
    theirs = hub.repos["model"]["bob/theirs"]
    assert code == 0 and f"{hub.endpoint}/bob/theirs/discussions/1" in said
    assert len(theirs.proposals) == 1 and "README.md" not in theirs.files()


def test_a_dry_run_asks_nothing(push, hub, monkeypatch):  # noqa: F811
    monkeypatch.delenv("HF_TOKEN")
    code, said = push("--dry-run")
    assert code == 0 and not hub.requests
    assert "unet/diffusion_pytorch_model.safetensors" in said and "nothing was sent" in said


TRANSIENT = [
    ("GET", "whoami", 429),
    ("POST", "repos/create", 503),
    ("POST", "preupload", 502),
    ("PUT", "large", 500),
    ("PUT", "large", "cut"),
    ("POST", "commit", 429),
    ("POST", "commit", 503),
    ("POST", "commit", 409),
    ("POST", "commit", "cut"),
    ("POST", "commit", "cut after"),
    ("GET", "tree", "cut"),
]


@pytest.mark.parametrize(("method", "path", "fault"), TRANSIENT)
def test_what_passes_is_waited_for(push, hub, method, path, fault):  # noqa: F811
    hub.fail(method, path, fault, fault)
    code, said = push()
    assert code == 0, said
    repo = hub.repos["model"]["ada/small"]
    assert len(repo.messages) == 1 and "unet/diffusion_pytorch_model.safetensors" in repo.files()


LASTING = [
    ("GET", "whoami", 401, "the Hub does not know this token"),
    ("POST", "repos/create", 403, "may not write there"),
    ("POST", "commit", 403, "may not write there"),
    ("PUT", "large", 403, "may not write there"),
    ("POST", "commit", 409, "somebody else changed the repository"),
    ("POST", "commit", 412, "somebody else changed the repository"),
    ("POST", "commit", 429, "the Hub limits requests"),
    ("POST", "preupload", 503, "the Hub is in trouble"),
    ("PUT", "large", "cut", "the connection to the Hub broke"),
    ("POST", "commit", "cut", "the connection to the Hub broke"),
]


@pytest.mark.parametrize(("method", "path", "fault", "message"), LASTING)
def test_what_lasts_is_said_and_nothing_shows(push, hub, method, path, fault, message):  # noqa: F811
    hub.fail(method, path, *[fault] * 1000)
    code, said = push()
    assert code == 1 and message in said and hub.endpoint not in said, said
    repo = hub.repos["model"].get("ada/small")
    assert repo is None or not repo.messages
    hub.faults.clear()
    assert push()[0] == 0


def test_a_commit_whose_answer_got_lost_counts_as_sent(push, hub):  # noqa: F811
    hub.fail("POST", "commit", "cut after")
    code, said = push()
    assert code == 0 and "12 files sent, 0 unchanged" in said
    assert len(hub.repos["model"]["ada/small"].messages) == 1


def test_an_interrupted_upload_sends_the_rest(push, hub):  # noqa: F811
    hub.fail("POST", "commit", *["cut"] * 1000)
    assert push()[0] == 1
    sent = set(hub.uploads())
    hub.faults.clear()
    hub.requests.clear()
    assert push()[0] == 0
    assert sent and not sent & set(hub.uploads())


def test_a_pull_request_is_never_sent_twice(push, hub):  # noqa: F811
    hub.repos["model"]["bob/theirs"] = Repo()
    hub.fail("POST", "commit", "cut after")
    code, said = push("--pr", repo="bob/theirs")
    assert code == 1 and "may have arrived" in said
    assert len(hub.repos["model"]["bob/theirs"].proposals) == 1


def test_somebody_elses_commit_is_not_written_over(push, hub):  # noqa: F811
    push()
    repo = hub.repos["model"]["ada/small"]

    def theirs():
        head = repo.branches["main"]
        repo.commits["f" * 40] = {**repo.commits[head], "README.md": b"theirs"}
        repo.branches["main"] = "f" * 40

    hub.fail("POST", "commit", 503)
    hub.before_commit = theirs
    repo.files()["bkd_plan.json"] = b"{}"
    code, said = push()
    assert code == 1 and "somebody else changed the repository" in said and repo.files()["README.md"] == b"theirs"
    hub.before_commit, hub.faults = lambda: None, {}
    repo.commits["0" * 39 + "1"], repo.branches["main"] = {**repo.files(), "bkd_plan.json": b"{}"}, "0" * 39 + "1"
    hub.fail("POST", "commit", 503)
    waits = iter([theirs])
    hub.on_fault = lambda: next(waits, lambda: None)()
    code, said = push()
    assert code == 1 and "another commit since this push began" in said and repo.files()["README.md"] == b"theirs"


def test_a_pull_request_behind_an_error_may_have_arrived(push, hub):  # noqa: F811
    hub.repos["model"]["bob/theirs"] = Repo()
    hub.fail("POST", "commit", 504)
    code, said = push("--pr", repo="bob/theirs")
    assert code == 1 and "may have arrived" in said


def test_a_card_that_the_hub_refuses(push, hub, student):  # noqa: F811
    (student / "README.md").write_text(CARD.replace("apache-2.0", "unheard-of"))
    code, said = push()
    assert code == 1 and '"license" must be one of' in said and not hub.repos["model"]["ada/small"].messages


def test_a_hub_that_is_switched_off(push, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, said = push()
    assert code == 1 and "the Hub is switched off" in said


def test_errors_of_the_storage_and_of_this_disk():
    import hf_xet

    said = explained(hf_xet.XetAuthenticationError("no"), repo="a/b", doing="uploading", token="t")
    assert said.what == "this token may not write there (uploading)"
    assert is_local(PermissionError(13, "Permission denied", "unet/model.safetensors"))
    assert not is_local(hf_xet.XetAuthenticationError("no")) and not is_local(ConnectionResetError(104, "reset"))
    error = RuntimeError("PUT https://host/x?X-Amz-Signature=SECRET hf_token failed")
    said = explained(error, repo="a/b", doing="uploading", token="hf_token")
    assert "SECRET" not in str(said) and "hf_token" not in str(said)


def test_bad_names_and_tokens(push, hub, monkeypatch):  # noqa: F811
    for name in ("small", "datasets/ada/small", "ada/", "https://hub/ada/small", "ada/sm all", "ada/x--y", "ada/x.git"):
        code, said = push(repo=name)
        assert code == 1 and "not the name of a repository" in said and "NAMESPACE/NAME" in said
    assert "put your user name or organisation before the name" in push(repo="small")[1]
    hub.repos["dataset"]["ada/pictures"] = Repo()
    assert "that name is a dataset, not a model" in push(repo="ada/pictures")[1]
    hub.repos["model"]["ada/shown"] = Repo()
    assert "already, and public" in push("--private", repo="ada/shown")[1]
    assert "no such repository to propose" in push("--pr", repo="ada/none")[1]
    monkeypatch.setenv("HF_TOKEN", "hf_read_SECRET")
    assert "this token may only read" in push()[1]
    monkeypatch.setenv("HF_TOKEN", "hf_unknown_SECRET")
    assert "does not know this token" in push()[1]
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    hub.requests.clear()
    code, said = push()
    assert code == 1 and "no token to write to the Hub with" in said and "hf auth login" in said
    assert not hub.requests


def test_what_is_not_ready(push, hub, student, tmp_path):  # noqa: F811
    assert "not a diffusers pipeline folder" in push(model=student / "unet")[1]
    assert "no such folder" in push(model=tmp_path / "none")[1]
    (student / "README.md").write_text(CARD.replace("license: apache-2.0\n", ""))
    assert "the card names no licence" in push()[1]
    (student / "README.md").write_text("---\nlicense: mit\n---\nWords.\n")
    assert "the card holds no figures" in push()[1]
    (student / "README.md").write_text(CARD.replace("library_name: diffusers", "bkd_student_sha256: abc"))
    assert "the card was written for other weights" in push()[1]
    (student / "README.md").write_text("---\nlicense: [\n---\n")
    assert "head of this model card cannot be read" in push()[1]
    (student / "README.md").unlink()
    code, said = push()
    assert code == 1 and "there is no model card" in said
    assert not hub.repos["model"]
    code, said = push("--force")
    assert code == 0 and "note: " in said and "README.md" not in hub.repos["model"]["ada/small"].files()


def test_a_student_that_encodes_needs_no_figures(push, hub, student):  # noqa: F811
    plan = json.loads((student / "bkd_plan.json").read_text())
    steps = {"num_inference_steps": 4, "direction": "inversion"}
    (student / "bkd_plan.json").write_text(json.dumps({**plan, "few_steps": steps}))
    (student / "README.md").write_text("---\nlicense: mit\n---\nFinds noise.\n")
    code, said = push()
    assert code == 0 and "figures" not in said


@pytest.mark.parametrize("wish", ["--dry-run", "--force"])
def test_a_card_that_is_not_utf8_is_named(push, hub, student, wish):  # noqa: F811
    (student / "README.md").write_bytes("---\nlicense: mit\n---\nF\xfcr alle\n".encode("latin-1"))
    code, said = push(wish)
    assert code == 1 and "this model card is not UTF-8" in said and "README.md" in said
    assert not hub.repos["model"]


def test_line_ends_stay(push, hub, student):  # noqa: F811
    (student / "README.md").write_bytes(CARD.replace("\n", "\r\n").encode())
    assert push()[0] == 0
    found = hub.repos["model"]["ada/small"].files()["README.md"]
    assert found == CARD.replace("\n", "\r\n").replace("NAMESPACE/NAME", "ada/small").encode()
