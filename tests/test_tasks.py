"""Tasks: what is loaded, what is refused and how clearly, the tasks made of others; without network."""

import gzip
import hashlib
import http.server
import os
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision import datasets

from ewc import _images, tasks


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory, monkeypatch):
    """Each test has its own settings and an empty data folder; the shared cache lets letters render once."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    for variable in ("EWC_DATASET", "EWC_SCALE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("EWC_DATA", str(tmp_path_factory.mktemp("data")))
    (cache / "ewc" / "download-failed").unlink(missing_ok=True)


@pytest.fixture
def offline(monkeypatch):
    """No server answers; the list holds what was asked for."""
    attempts = []

    def refuse(url):
        attempts.append(url)
        return False

    monkeypatch.setattr(_images, "_answers", refuse)
    return attempts


def contents(seed):
    """Four small files in the IDX format, uncompressed."""
    draw, files = np.random.default_rng(seed), {}
    for part, count in (("train", 30), ("t10k", 20)):
        header = np.array([0x803, count, 28, 28], ">u4").tobytes()
        files[f"{part}-images-idx3-ubyte"] = (
            header + draw.integers(256, size=count * 784, dtype=np.uint8).tobytes()
        )
        header = np.array([0x801, count], ">u4").tobytes()
        files[f"{part}-labels-idx1-ubyte"] = header + (np.arange(count, dtype=np.uint8) % 10).tobytes()
    return files


@pytest.fixture
def small(monkeypatch):
    """Small stand-ins for the real files, whose checksums `load` then expects; returns their contents."""
    files = {"mnist": contents(1), "fashion": contents(2)}
    for name, group in files.items():
        sums = {file: hashlib.md5(content).hexdigest() for file, content in group.items()}
        monkeypatch.setitem(_images.REAL, name, (_images.REAL[name][0], sums))
    return files


def write(files, zipped=False):
    for name, group in files.items():
        folder = _images._data_folder() / _images.REAL[name][0] / "raw"
        folder.mkdir(parents=True)
        for file, content in group.items():
            (folder / (file + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    return folder  # Fashion-MNIST's


# Loading


@pytest.mark.parametrize("name", ["digits", "letters"])
def test_embedded_data(name):
    task = tasks.load(name, "cpu")
    (x, y), (x_test, y_test) = task.train.tensors, task.test.tensors
    assert (task.name, task.classes, task.shape, task.features) == (name, 10, (1, 8, 8), 64)
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (len(y), 1, 8, 8)
    assert x.mean().abs() < 1e-5 and (x.std() - 1).abs() < 1e-5
    pixels = torch.cat([x, x_test]) * task.std + task.mean  # back to a scale from 0 to 1, in sixteenths
    assert pixels.min() >= -1e-5 and pixels.max() <= 1 + 1e-5
    torch.testing.assert_close(pixels * 16, (pixels * 16).round(), rtol=0, atol=1e-4)
    for labels, least in ((y, 70), (y_test, 30)):
        assert torch.bincount(labels, minlength=10).min() >= least


def test_digits_are_scikit_learns():
    task = tasks.load("digits", "cpu")
    assert len(task.train) + len(task.test) == 1797
    counts = torch.bincount(task.test.tensors[1])
    assert counts.max() - counts.min() <= 2  # stratified
    assert task.labels == tuple("0123456789")


def test_letters_are_the_same_bits_every_time():
    first, labels = _images._render_letters(200, seed=0)
    again, same = _images._render_letters(200, seed=0)
    other, _ = _images._render_letters(200, seed=1)
    assert np.array_equal(first, again) and np.array_equal(labels, same)
    assert not np.array_equal(first, other)
    assert len(np.unique(first.reshape(200, -1), axis=0)) == 200
    assert tasks.load("letters", "cpu").labels == tuple("ABCDEFGHIJ")


def test_letters_are_neither_trivial_nor_hopeless():
    task = tasks.load("letters", "cpu")
    (x, y), (x_test, y_test) = (data.tensors for data in (task.train, task.test))
    features = torch.cat([x.flatten(1), torch.ones(len(x), 1)], 1)
    solution = torch.linalg.lstsq(features.T @ features, features.T @ torch.eye(10)[y]).solution
    linear = (torch.cat([x_test.flatten(1), torch.ones(len(x_test), 1)], 1) @ solution).argmax(1)
    assert 0.6 < (linear == y_test).float().mean() < 0.95


def test_letters_are_cached_and_a_damaged_cache_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    rendered = tuple(np.zeros((6000, *shape), np.uint8) for shape in ((8, 8), ()))
    rendered[0][:, 0, 0] = np.arange(6000) % 17

    def render(count, seed):
        calls.append(count)
        return rendered

    monkeypatch.setattr(_images, "_render_letters", render)
    first = _images.letters()
    second = _images.letters()
    assert len(calls) == 1 and all(map(np.array_equal, first, second))
    (path,) = (tmp_path / "ewc").iterdir()  # one file, nothing temporary left behind
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[2000] ^= 0xFF
    for damaged in (whole[:1000], bytes(flipped), b"", b"something else"):
        path.write_bytes(damaged)
        assert all(map(np.array_equal, _images.letters(), first))
        assert path.read_bytes() != damaged
    assert len(calls) == 5
    path.unlink()
    monkeypatch.setattr(_images.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert all(map(np.array_equal, _images.letters(), first))
    assert not list((tmp_path / "ewc").iterdir())


def test_letters_need_no_cache_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(tasks.load("letters", "cpu").train) == 5000


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'cifar'.*'mnist', 'fashion', 'digits', 'letters'"):
        tasks.load("cifar")


@pytest.mark.parametrize("zipped", [False, True])
def test_real_files_are_read(small, offline, zipped):
    write(small, zipped)
    task = tasks.load("mnist", "cpu")
    raw = np.frombuffer(small["mnist"]["train-images-idx3-ubyte"], np.uint8, offset=16).reshape(30, 1, 28, 28)
    pixels = raw / 255
    assert not offline and task.shape == (1, 28, 28) and len(task.test) == 20
    np.testing.assert_allclose(
        task.train.tensors[0], (pixels - pixels.mean()) / pixels.std(ddof=1), rtol=0, atol=1e-5
    )
    assert task.train.tensors[1].tolist() == [k % 10 for k in range(30)]
    assert tasks.load("fashion", "cpu").labels[9] == "Ankle boot"
    if not zipped:  # torchvision finds the same files in the same place
        assert np.array_equal(datasets.MNIST(os.environ["EWC_DATA"]).data, raw[:, 0])


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("damage", ["truncated", "corrupt", "empty"])
def test_damaged_file_is_named_with_the_remedy(small, offline, damage, zipped):
    path = write(small, zipped) / ("train-images-idx3-ubyte" + ".gz" * zipped)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes({"truncated": content[:5000], "corrupt": bytes(content), "empty": b""}[damage])
    with pytest.raises(RuntimeError, match=f"{path.name} is truncated or corrupt.*delete it") as error:
        tasks.load("fashion")
    assert str(path) in str(error.value)
    with pytest.raises(RuntimeError, match="truncated or corrupt"):  # nor does `auto` pass over it in silence
        tasks.pair()
    assert not offline


def test_real_data_if_on_disk(monkeypatch):
    folder = REAL_FOLDER
    if not folder or not os.path.isdir(os.path.join(folder, "MNIST", "raw")):
        pytest.skip("EWC_DATA does not hold MNIST and Fashion-MNIST")
    monkeypatch.setenv("EWC_DATA", folder)
    monkeypatch.setenv("EWC_SCALE", "full")
    mnist, fashion = tasks.pair("cpu")
    assert (mnist.name, fashion.name) == ("mnist", "fashion")
    assert (len(mnist.train), len(mnist.test), mnist.features) == (60000, 10000, 784)
    assert abs(mnist.mean - 0.1307) < 1e-4 and abs(mnist.std - 0.3081) < 1e-4
    assert abs(fashion.mean - 0.2860) < 1e-4 and abs(fashion.std - 0.3530) < 1e-4
    assert mnist.train.tensors[1][:5].tolist() == [5, 0, 4, 1, 9]
    monkeypatch.setenv("EWC_SCALE", "quick")
    monkeypatch.setattr(tasks, "load", lambda name, device: {"mnist": mnist, "fashion": fashion}[name])
    part = tasks.pair("cpu")[0]
    assert (len(part.train), len(part.test)) == (6000, 2000)
    assert part.train.tensors[0].equal(mnist.train.tensors[0][:6000])


REAL_FOLDER = os.path.expanduser(os.environ.get("EWC_DATA", ""))  # read before the fixture hides it


# Downloading


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves `files`, or with `files = None` says nothing at all until the test is over."""

    files: dict[str, bytes] | None = {}
    over = threading.Event()

    def do_GET(self):
        if self.files is None:
            self.over.wait(30)
            return
        content = self.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(small, monkeypatch):
    """A server on this machine that has the small files, as torchvision's only mirror."""
    handler = type("Handler", (Mirror,), {"files": {}, "over": threading.Event()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    for name, files in small.items():
        source = _images._source(name)
        zipped = {file + ".gz": gzip.compress(content) for file, content in files.items()}
        handler.files |= {f"/{name}/{file}": content for file, content in zipped.items()}
        monkeypatch.setattr(source, "mirrors", [f"http://127.0.0.1:{server.server_port}/{name}/"])
        sums = [(file, hashlib.md5(content).hexdigest()) for file, content in zipped.items()]
        monkeypatch.setattr(source, "resources", sums)
    yield handler
    handler.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_download_leaves_whole_files_and_no_trace(mirror, capfd):
    timeout = socket.getdefaulttimeout()
    mnist, fashion = tasks.pair("cpu")
    assert (mnist.name, fashion.name, len(mnist.train)) == ("mnist", "fashion", 30)
    folder = _images._data_folder() / "MNIST" / "raw"
    assert sorted(path.name for path in folder.iterdir()) == sorted(_images.REAL["mnist"][1])
    assert socket.getdefaulttimeout() == timeout
    assert capfd.readouterr() == ("", "")  # no progress bar in a page
    mirror.files.clear()  # the second time the network is not needed
    assert tasks.load("mnist", "cpu").train.tensors[1].equal(mnist.train.tensors[1])


@pytest.mark.parametrize("cut", [1, 2000])
def test_broken_download_is_not_kept(mirror, cut):
    path = "/mnist/train-images-idx3-ubyte.gz"
    mirror.files[path] = mirror.files[path][:-cut]
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        tasks.load("mnist")
    assert not list((_images._data_folder() / "MNIST" / "raw").iterdir())


def test_silent_server_is_given_up_soon(mirror, monkeypatch):
    mirror.files = None
    monkeypatch.setattr(_images, "TIMEOUT", 0.2)
    before = time.monotonic()
    with pytest.raises(FileNotFoundError, match="no server answers"):
        tasks.load("mnist")
    assert time.monotonic() - before < 5


def test_name_lookup_that_never_returns_is_given_up(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(_images, "TIMEOUT", 0.1)

    def lookup(*args, **options):
        over.wait(30)
        raise OSError

    monkeypatch.setattr(_images.urllib.request, "urlopen", lookup)
    before = time.monotonic()
    assert not _images._answers("http://mirror.invalid/")
    over.set()
    assert time.monotonic() - before < 5


def test_missing_data_say_what_to_do(offline):
    timeout = socket.getdefaulttimeout()
    with pytest.raises(FileNotFoundError) as error:
        tasks.load("fashion")
    message = str(error.value)
    for part in (
        "Fashion-MNIST",
        os.environ["EWC_DATA"],
        "set EWC_DATA",
        "FashionMNIST/raw",
        "EWC_DATASET=embedded",
    ):
        assert part in message
    assert "\n" not in message and socket.getdefaulttimeout() == timeout


def test_data_folder_defaults_to_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("EWC_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _images._data_folder() == tmp_path / "ewc"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _images._data_folder() == tmp_path / ".cache" / "ewc"


# Choosing


def names(pair):
    return tuple(task.name for task in pair)


def test_auto_takes_the_embedded_pair_and_remembers_why(offline):
    assert names(tasks.pair("cpu")) == ("digits", "letters")
    assert len(offline) > 0
    offline.clear()
    assert names(tasks.pair("cpu")) == ("digits", "letters")
    assert not offline  # the next chapter does not wait again
    old = time.time() - _images.RETRY - 1
    os.utime(_images._cache_folder() / "download-failed", (old, old))
    tasks.pair("cpu")
    assert len(offline) > 0  # but later it tries again


def test_auto_takes_the_real_pair_from_disk_even_after_a_failed_download(small, offline):
    _images._remember_failed_download()
    write(small)
    assert names(tasks.pair("cpu")) == ("mnist", "fashion")
    assert not offline


def test_dataset_setting_is_obeyed(small, offline, monkeypatch):
    monkeypatch.setenv("EWC_DATASET", "mnist")
    for _ in range(2):  # whoever insists is answered each time
        with pytest.raises(FileNotFoundError, match="set EWC_DATA"):
            tasks.pair()
    write(small)
    monkeypatch.setenv("EWC_DATASET", "embedded")
    assert names(tasks.pair("cpu")) == ("digits", "letters")
    monkeypatch.setenv("EWC_DATASET", "cifar")
    with pytest.raises(ValueError, match="EWC_DATASET='cifar'.*'auto', 'mnist', 'embedded'"):
        tasks.pair()


def test_scale_follows_setting_and_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (tasks.device().type, tasks.scale()) == ("cpu", "quick")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (tasks.device().type, tasks.scale()) == ("cuda", "full")
    monkeypatch.setenv("EWC_SCALE", "quick")
    assert tasks.scale() == "quick"
    monkeypatch.setenv("EWC_SCALE", "huge")
    with pytest.raises(ValueError, match="EWC_SCALE='huge'.*'quick', 'full'"):
        tasks.scale()


# Making tasks of tasks


@pytest.fixture(scope="module")
def digits():
    return tasks.load("digits", "cpu")


def test_take_is_a_prefix(digits):
    part = digits.take(50, 10_000)
    assert len(part.train) == 50 and len(part.test) == len(digits.test)
    assert part.train.tensors[0].equal(digits.train.tensors[0][:50])
    assert set(part.train.tensors[1].tolist()) == set(range(10))  # the order is already random
    with pytest.raises(ValueError, match="at least one image"):
        digits.take(0, 10)


def test_validation_splits_the_training_set_alone(digits):
    part = digits.validation(0.25, seed=1)
    assert len(part.test) == round(0.25 * len(digits.train))

    def rows(*parts):
        return sorted(map(tuple, torch.cat([data.tensors[0].flatten(1) for data in parts]).tolist()))

    assert rows(part.train, part.test) == rows(digits.train)
    assert part.test.tensors[0].equal(digits.validation(0.25, seed=1).test.tensors[0])
    assert not part.test.tensors[0].equal(digits.validation(0.25, seed=2).test.tensors[0])
    assert part.name == "digits validation"
    for fraction in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=f"fraction={fraction}"):
            digits.validation(fraction)


def test_permuted_moves_pixels_alike_everywhere(digits):
    other = tasks.permuted(digits, 3)
    (x, y), (z, w) = digits.train.tensors, other.train.tensors
    assert y.equal(w) and z.shape == x.shape and not z.equal(x)
    assert z.flatten(1).sort(1).values.equal(x.flatten(1).sort(1).values)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    for n in (0, 7):  # an image at a time, pixel by pixel
        image, source = other.test.tensors[0][n].flatten(), digits.test.tensors[0][n].flatten()
        assert image.tolist() == [source[order[i]].item() for i in range(64)]
    assert tasks.permuted(digits, 3).train.tensors[0].equal(z)
    assert not tasks.permuted(digits, 4).train.tensors[0].equal(z)
    assert other.title == "digits permuted 3"


def test_rotated_turns_images(digits):
    x = digits.test.tensors[0]
    assert tasks.rotated(digits, 0).test.tensors[0].allclose(x)
    assert tasks.rotated(digits, 90).test.tensors[0].allclose(x.rot90(1, (2, 3)), atol=1e-5)
    turned = tasks.rotated(digits, 45).test.tensors[0]
    background = (turned[:, 0, 0, 0] * digits.std + digits.mean).abs()
    assert background.max() < 1e-5  # corners come from outside the image: no ink
    assert tasks.rotated(digits, 22.5).name == "digits rotated 22.5"


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_split_shares_out_every_image(digits, scenario):
    parts = tasks.split(digits, scenario=scenario)
    relabel = scenario == "domain"
    assert [part.name for part in parts] == [
        "digits 0-1",
        "digits 2-3",
        "digits 4-5",
        "digits 6-7",
        "digits 8-9",
    ]
    assert sum(len(part.train) for part in parts) == len(digits.train)
    for t, part in enumerate(parts):
        for data, whole in ((part.train, digits.train), (part.test, digits.test)):
            keep = [n for n, k in enumerate(whole.tensors[1].tolist()) if k // 2 == t]
            assert data.tensors[0].equal(whole.tensors[0][keep])
            labels = whole.tensors[1][keep]
            assert data.tensors[1].equal(labels - 2 * t if relabel else labels)
        assert part.classes == (2 if relabel else 10)
        assert part.labels == ((str(2 * t), str(2 * t + 1)) if relabel else digits.labels)
        assert part.head == ((2 * t, 2 * t + 1) if scenario == "task" else None)


def test_split_numbers_classes_in_the_order_of_the_group(digits):
    (part,) = tasks.split(digits, [(7, 2, 5)], scenario="domain")
    original = tasks.split(digits, [(7, 2, 5)])[0].train.tensors[1]
    assert part.labels == ("7", "2", "5") and part.classes == 3
    assert [part.labels[k] for k in part.train.tensors[1]] == [str(k) for k in original.tolist()]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "at least one group"),
        ([(0, 1), ()], "at least one class in each"),
        ([(0, 10)], "classes 0 to 9; there is no class 10"),
        ([(0, -1)], "there is no class -1"),
        ([(0, 1), (1, 2)], "disjoint"),
        ([(3, 3)], "disjoint"),
    ],
)
def test_split_refuses_bad_groups(digits, groups, message):
    with pytest.raises(ValueError, match=message):
        tasks.split(digits, groups)


def test_split_refuses_a_head_of_one_class(digits):
    with pytest.raises(ValueError, match=r"Told the group \(9,\), there is nothing to choose"):
        tasks.split(digits, [(0, 1), (9,)], scenario="task")


def test_split_refuses_bad_scenarios(digits):
    with pytest.raises(ValueError, match="'task', 'domain', 'class'"):
        tasks.split(digits, scenario="instance")
    with pytest.raises(ValueError, match="groups of one size"):
        tasks.split(digits, [(0, 1), (2,)], scenario="domain")


def test_heads_leave_the_classes_of_one_group(digits):
    groups = [(3, 1), (0, 8, 2)]  # any order, any size; classes 4, 5, 6, 7, 9 are in no group
    first, second = tasks.split(digits, groups, scenario="task")
    assert first.head == (3, 1) and second.head == (0, 8, 2)
    logits = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 8, 3, 0])
    masked = first.masked(logits, labels)
    for n, label in enumerate(labels.tolist()):
        group = next(g for g in groups if label in g)
        for k in range(10):
            assert masked[:, n, k].equal(logits[:, n, k] if k in group else torch.full((2,), -torch.inf))
    assert digits.masked(logits, labels) is logits
    both = tasks.joint(first, second)
    assert both.masked(logits, labels).equal(masked)
    with pytest.raises(ValueError, match="one task at a time"):
        both.head


def test_a_task_says_what_it_is(digits):
    assert (
        repr(digits) == "Task(digits: 1,437 training and 360 test images of 8×8 pixels, 10 classes, on cpu)"
    )
    assert digits.title == "digits" and digits.device == torch.device("cpu")
    with pytest.raises(AttributeError):
        digits.name = "other"


def test_joint_holds_the_images_of_all_parts(digits):
    letters = tasks.load("letters", "cpu")
    both = tasks.joint(digits, letters)
    assert both.name == "digits and letters" and both.classes == 10
    for whole, *parts in ((both.train, digits.train, letters.train), (both.test, digits.test, letters.test)):
        for k in (0, 1):
            assert whole.tensors[k].equal(torch.cat([part.tensors[k] for part in parts]))
    told, pairs = (tasks.split(digits, scenario=name)[0] for name in ("task", "domain"))
    for bad in ((), (digits, pairs), (digits, told)):
        with pytest.raises(ValueError, match="one shape, number of classes and heads"):
            tasks.joint(*bad)


def test_a_task_without_images_has_no_head():
    part = replace(tasks.load("digits", "cpu").take(1, 1), heads=((0, 1), (2, 3)))
    part.train.tensors[1].fill_(9)
    with pytest.raises(ValueError, match="no training image in any of its heads"):
        part.head
