"""Recorded results: written when asked for, found again, and otherwise an error that lists what there is."""
import pytest
import torch

from ewc import recorded


def test_kept_only_when_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(recorded, "FOLDER", tmp_path)
    monkeypatch.setenv("EWC_DATASET", "embedded")
    for asked, scale in ((None, "full"), ("1", "quick")):
        monkeypatch.setenv("EWC_SCALE", scale)
        monkeypatch.delenv("EWC_RECORD", raising=False) if asked is None else monkeypatch.setenv("EWC_RECORD", asked)
        recorded.keep("sweep", {"mean": [0.5]})
        assert not list(tmp_path.iterdir())
    monkeypatch.setenv("EWC_SCALE", "full")
    recorded.keep("sweep", {"mean": [0.5, 0.25]})
    found = recorded.load("sweep")
    assert found["results"] == {"mean": [0.5, 0.25]}
    assert found["made"]["data"] == "digits → letters" and found["made"]["torch"]
    assert found["made"]["device"].endswith(("thread", "threads")) or torch.cuda.is_available()


def test_unknown_name_lists_the_known(monkeypatch, tmp_path):
    monkeypatch.setattr(recorded, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing yet"):
        recorded.load("sweep")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="'sweep'; recorded so far: other"):
        recorded.load("sweep")
