import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from batchnorm.surgery._rank import ranks
from batchnorm.surgery._trace import Traced, trace


class Observed(fx.Interpreter):
    """Runs a traced model on real tensors and writes down how many axes each value has."""

    def __init__(self, model: nn.Module, traced: Traced) -> None:
        super().__init__(model, graph=traced.graph)
        self.seen: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen[n.name] = value.dim()
        elif isinstance(value, tuple) and isinstance(value[0], Tensor):
            self.seen[n.name] = value[0].dim()
        return value


class Shapes(nn.Module):
    """Every operation whose effect on the axes is known, on a value whose axes are known."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv1 = nn.Conv2d(3, 4, 3), nn.Conv1d(4, 4, 1)
        self.pool, self.norm = nn.MaxPool2d(2), nn.BatchNorm1d(4)
        self.flat, self.part, self.unflat = nn.Flatten(), nn.Flatten(2), nn.Unflatten(1, (2, 2))
        self.attention, self.lstm = (
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.LSTM(4, 4, batch_first=True),
        )
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
        self.embed, self.linear = nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        image = self.pool(self.conv(x))
        last = image.permute(0, 2, 3, 1)
        tokens = image.flatten(2).transpose(1, 2).contiguous()
        attended = tokens + self.attention(tokens, tokens, tokens)[0]
        rows = torch.flatten(image, 1)
        few = rows[:, :4]
        sums = [
            image.mean(dim=(2, 3)),
            image.sum(3),
            image.amax((2, 3), keepdim=True),
            rows.mean(1, True),
            rows.mean(),
        ]
        views = [
            tokens.view(-1, 4),
            tokens.reshape(tokens.size(0), 4, -1),
            tokens.reshape((2, -1)),
            image.view(-1),
        ]
        cuts = [tokens[:, 0], tokens[:, :-1], tokens[0], image[..., 0], rows[:, None], image[:, :, 0, 0]]
        more = [
            self.flat(image),
            self.part(image),
            torch.flatten(image),
            self.norm(rows[:, :4]),
            self.conv1(self.part(image)),
        ]
        grown = [
            rows.unsqueeze(1),
            torch.stack([rows, rows]),
            torch.cat([rows, rows], 1),
            rows.unsqueeze(1).squeeze(1),
        ]
        pooled = [F.avg_pool2d(image, 1), F.adaptive_avg_pool2d(image, 1), F.max_pool2d(image, 1).relu()]
        states = [
            self.lstm(attended)[0],
            self.layer(attended),
            self.linear(last),
            F.gelu(last) * rows[:, :4].sum(1, True),
        ]
        unknown = [
            torch.einsum("nc,nc->n", rows, rows),
            self.unflat(few),
            rows.argmax(1).unbind(0)[0],
        ]
        tuples = [tokens.max(1)[0], tokens.max(2, keepdim=True)[1], tokens.chunk(2, 1)[0], tokens.topk(1)[0]]
        token = self.embed(tokens.argmax(2))
        return [*sums, *views, *cuts, *more, *grown, *pooled, *states, *unknown, *tuples, token]


def test_what_is_known_about_the_axes_is_true_and_much_is_known() -> None:
    net = Shapes().eval()
    traced = trace(net)
    known = {node.name: rank for node, rank in ranks(traced).items()}
    observed = Observed(net, traced)
    observed.run(torch.randn(2, 3, 6, 6))
    wrong = {
        name: (rank, observed.seen[name])
        for name, rank in known.items()
        if observed.seen.get(name, rank) != rank
    }
    assert wrong == {}
    # Nobody knows what comes in, and the rest say nothing about what they give (getitem_11 is of what unbind gives).
    unknown = observed.seen.keys() - known.keys()
    assert unknown == {"x", "einsum", "unflat", "mean_2", "unbind", "getitem_11"}


def test_what_comes_in_is_unknown_and_stays_so() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Dropout(), nn.Linear(3, 3), nn.Embedding(3, 3))
    assert ranks(trace(net)) == {}


def test_a_permutation_tells_the_axes_of_what_comes_in() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.permute(0, 2, 1))

    assert {node.name: rank for node, rank in ranks(trace(Net())).items()} == {"permute": 3, "linear": 3}
