"""Stands for the Hugging Face Hub in tests, which are offline."""

import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub


class Hub:
    """Stands for the Hub: lists `names`, and downloads those that lie in `folder`."""

    def __init__(self, monkeypatch, folder: Path, cache: Path, names):
        self.folder, self.cache, self.names, self.calls = folder, cache, sorted(names), []
        self.downloaded: set[str] = set()
        monkeypatch.setattr(
            huggingface_hub.HfApi, "model_info", lambda _, repo, **options: self.model_info(repo, **options)
        )
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, repo, *, revision, timeout):
        assert timeout <= 60
        self.calls.append(("list", repo, revision))
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def snapshot_download(self, repo, *, revision, allow_patterns):
        self.calls.append(("download", repo, revision))
        for name in self.names:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                self.downloaded.add(name)
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.folder / name, self.cache / name)
        return str(self.cache)
