"""A module with factories, as the tests of `batchnorm check` write it into their folder."""

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, **norm):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4, **norm)

    def forward(self, x):
        return self.bn(self.conv(x)).mean((2, 3))

def settled(net):
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(200):
            net.train()(torch.randn(16, 3, 8, 8))
    return net

def healthy():
    print("making")
    return settled(Net())

def keras():
    return settled(Net(momentum=0.99))

def poisoned():
    net = settled(Net(momentum=0.99))
    net.bn.running_var[1] = float("nan")
    return net

def stale():
    return settled(Net(momentum=0.0001))

def biased():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

def without():
    return nn.Linear(2, 2)

def fails():
    raise RuntimeError("no such\\nlayer")

def loader():
    print("loading")
    generator = torch.Generator().manual_seed(1)
    return [(3 * torch.randn(16, 3, 8, 8, generator=generator) + 1, "labels") for _ in range(12)]

def same():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(3)]

def few():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(3)]

def stream(): return iter(same())
def loaders():
    data = torch.utils.data.TensorDataset(torch.randn(48, 3, 8, 8), torch.zeros(48))
    return torch.utils.data.DataLoader(data, 16), torch.utils.data.DataLoader(data, 24)

def decay(model): return torch.optim.AdamW(model.parameters(), weight_decay=0.01)
def two(model, lr): return torch.optim.SGD(model.parameters(), lr)
def unpaid(model): raise TypeError("no lr")
def parameters(model): return list(model.parameters())

def flat(): return [torch.randn(16, 5)]
def mixed(): return [torch.randn(16, 3, 8, 8), {"y": 3}]
def nothing(): return []
def number(): return 3

class Interrupting(Net):
    def forward(self, x):
        raise KeyboardInterrupt

def interrupting():
    return Interrupting()
"""
