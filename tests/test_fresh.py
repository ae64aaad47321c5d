"""Pages are executed again when something that their numbers depend on changes, and only then."""

import subprocess
from pathlib import Path

import card
import fresh
import pytest

ROOT = Path(__file__).parent.parent
FACTS = {"settings": {"data": "mnist", "scale": "quick", "device": "CPU"}, "versions": {"torch": "2.14.1"}}


@pytest.fixture
def project(tmp_path) -> Path:
    for name in ("ewc/fisher.py", "ewc/deep/part.py", "benchmarks/speed.py", "requirements.txt", "README.md", "book/one.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one\n")
    return tmp_path


def test_the_key_is_the_same_for_the_same_files(project):
    assert fresh.key(project, **FACTS) == fresh.key(project, **FACTS)


@pytest.mark.parametrize("name", ["ewc/fisher.py", "ewc/deep/part.py", "benchmarks/speed.py", "requirements.txt"])
def test_the_key_changes_with_what_pages_depend_on(project, name):
    before = fresh.key(project, **FACTS)
    (project / name).write_text("two\n")
    assert fresh.key(project, **FACTS) != before


def test_the_key_changes_when_a_module_appears_or_moves(project):
    before = fresh.key(project, **FACTS)
    (project / "ewc/fisher.py").rename(project / "ewc/fishers.py")
    moved = fresh.key(project, **FACTS)
    (project / "ewc/new.py").write_text("")
    assert len({before, moved, fresh.key(project, **FACTS)}) == 3


@pytest.mark.parametrize("name", ["README.md", "book/one.md"])
def test_the_key_ignores_prose(project, name):
    before = fresh.key(project, **FACTS)
    (project / name).write_text("two\n")
    assert fresh.key(project, **FACTS) == before


@pytest.mark.parametrize("kind", ["data", "scale", "device"])
def test_the_key_changes_with_the_settings(project, kind):
    other = FACTS | {"settings": FACTS["settings"] | {kind: "other"}}
    assert fresh.key(project, **FACTS) != fresh.key(project, **other)


def test_the_key_changes_with_an_installed_version(project):
    assert fresh.key(project, **FACTS) != fresh.key(project, **FACTS | {"versions": {"torch": "2.15.0"}})


def test_versions_are_those_that_are_installed():
    found = fresh.versions(ROOT)
    assert {"python", "torch", "myst-nb"} <= set(found)


def test_settings_say_what_the_environment_chose(monkeypatch):
    monkeypatch.setenv("EWC_DATASET", "embedded")
    monkeypatch.setenv("EWC_SCALE", "quick")
    found = fresh.settings()
    assert (found["data"], found["scale"]) == ("embedded", "quick")


@pytest.mark.parametrize(
    ("code", "seeds"),
    [
        ("torch.manual_seed(3)", ["3"]),
        ("model = models.mlp(4, [8], 2, seed=1)", ["1"]),
        ("training.sweep(tasks, seeds=range(5))", ["range(5)"]),
        ("rng = np.random.default_rng(7)", ["7"]),
        ("f(seeds=[12, 3]); g(seeds=[3]); h(seed=range(5 if full else 1))", ["3", "12"]),
        ("x = reseeded", []),
    ],
)
def test_the_card_finds_the_seeds_of_a_page(code, seeds):
    assert card.seeds(code) == seeds


def test_the_card_says_when_there_are_local_changes(tmp_path):
    assert card.commit(tmp_path) == "not a git checkout"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tmp_path / "requirements.txt").write_text("one\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    clean = card.commit(tmp_path)
    (tmp_path / "requirements.txt").write_text("two\n")
    assert card.commit(tmp_path) == clean + " with local changes"
