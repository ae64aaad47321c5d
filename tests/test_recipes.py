"""The code for other people's training loops runs as the page prints it, in frameworks that are three methods long."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ewc import EWC

PAGE = (Path(__file__).parent.parent / "book/api.md").read_text()


def snippet(mark: str, **names) -> dict:
    """The names that the page's block of code with this mark defines when it is run."""
    (code,) = [block for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S) if mark in block]
    exec(compile(code, mark, "exec"), names)
    return names


def data(seed: int) -> TensorDataset:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 3, generator=rng)
    return TensorDataset(x, (x @ torch.randn(3, 4, generator=rng)).argmax(1))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))


def train(model: nn.Module, batches, force=lambda: None) -> None:
    """SGD as the recipes use it, with something done to the gradients before each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for x, y in batches:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        force()
        optimizer.step()


def module(monkeypatch, name: str, **contents) -> None:
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(a.parameters(), b.parameters()))


def test_plain_pytorch(network):
    twin = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    twin.load_state_dict(network.state_dict())
    old, new = (DataLoader(data(s), batch_size=10) for s in (1, 2))
    snippet("memory.consolidate(model, loader_a)", model=network, loader_a=old, loader_b=new)
    memory = EWC(300.0)
    memory.consolidate(twin, old)
    train(twin, new, lambda: memory.add_gradient(twin))
    assert same(network, twin)


def test_plain_pytorch_with_the_proximal_step(network):
    twin = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    twin.load_state_dict(network.state_dict())
    memory, new = EWC(300.0), DataLoader(data(2), batch_size=10)
    memory.consolidate(network, data(1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    names = {"model": network, "memory": memory, "optimizer": optimizer, "loader_b": new}
    snippet("memory.pull(model, step)", cross_entropy=cross_entropy, **names)

    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9)
    for x, y in new:
        optimizer.zero_grad()
        cross_entropy(twin(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                stiffness = 0.1 * 300.0 * memory.fisher[name]
                p.copy_((p + stiffness * memory.theta_star[name]) / (1 + stiffness))
    assert same(network, twin)


class StandInCallback:
    """Lightning's base class has these hooks; they do nothing."""

    def on_fit_start(self, trainer, pl_module): ...
    def on_before_optimizer_step(self, trainer, pl_module, optimizer): ...
    def on_train_end(self, trainer, pl_module): ...
    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict): ...


def fit(module: nn.Module, loader: DataLoader, callback: StandInCallback) -> None:
    """The order in which Lightning's Trainer calls the hooks."""
    module.device, trainer = torch.device("cpu"), SimpleNamespace(train_dataloader=loader)
    callback.on_fit_start(trainer, module)
    train(module, loader, lambda: callback.on_before_optimizer_step(trainer, module, None))
    callback.on_train_end(trainer, module)


def test_lightning_callback(network, monkeypatch):
    module(monkeypatch, "lightning")
    module(monkeypatch, "lightning.pytorch")
    module(monkeypatch, "lightning.pytorch.callbacks", Callback=StandInCallback)
    springs = snippet("class Springs")["Springs"](300.0)
    assert all(name in vars(StandInCallback) for name in vars(type(springs)) if not name.startswith("__"))
    twin = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    twin.load_state_dict(network.state_dict())
    old, new = (DataLoader(data(s), batch_size=10) for s in (1, 2))
    fit(network, old, springs)
    fit(network, new, springs)

    memory = EWC(300.0)
    train(twin, old)
    memory.consolidate(twin, old)
    train(twin, new, lambda: memory.add_gradient(twin))
    assert same(network, twin) and springs.memory.tasks == 2

    restored = type(springs)(1.0)
    restored.load_state_dict(springs.state_dict())
    assert restored.memory.strength == 300.0 and restored.memory.tasks == 2


class Classifier(nn.Module):
    """Answers as a classifier of sequences does in transformers: with a loss and logits."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask, labels=None):
        mask = attention_mask.unsqueeze(-1)
        logits = self.head((self.embedding(input_ids) * mask).sum(1) / mask.sum(1))
        return SimpleNamespace(logits=logits, loss=None if labels is None else cross_entropy(logits, labels))


class StandInTrainer:
    """The part of transformers' Trainer that a subclass overrides."""

    def __init__(self, model):
        self.model, self.accelerator = model, SimpleNamespace(unwrap_model=lambda model: model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_subclass_of_a_trainer(monkeypatch):
    module(monkeypatch, "transformers", Trainer=StandInTrainer)
    names = snippet("class SpringTrainer")
    torch.manual_seed(0)
    model, ids, labels = Classifier(), torch.randint(1, 20, (40, 5)), torch.randint(3, (40,))
    ids[::2, 3:] = 0  # padding
    memory = EWC(50.0)
    memory.consolidate(names["Logits"](model), TensorDataset(ids, labels))
    trainer = names["SpringTrainer"](model.train())
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
    plain = trainer.compute_loss(model, batch)
    trainer.memory = memory
    assert torch.equal(trainer.compute_loss(model, batch), plain), "no penalty at the anchor"
    with torch.no_grad():
        model.head.weight += 0.1
    plain = StandInTrainer.compute_loss(trainer, model, batch)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    F = memory.fisher["model.head.weight"]
    torch.testing.assert_close(loss - plain, 50.0 / 2 * (F * 0.01).sum(), rtol=1e-4, atol=1e-7)
    model.eval()
    assert torch.equal(trainer.compute_loss(model, batch), plain), "evaluated by the task's loss alone"
    loss.backward()
    assert outputs.logits.shape == (40, 3) and model.head.weight.grad is not None
